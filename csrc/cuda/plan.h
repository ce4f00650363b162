// The plan: a checked, private copy of a partition table with the sums that the kernels need.
//
// The table lies in device memory and may come from anywhere. make_plan (plan.cu) copies it, checks the
// copy, and adds up where each group's weights begin and which tiles are its own. The kernels read only
// the plan, never the table, so a hostile table, or one that another stream overwrites meanwhile, can't
// lead them out of bounds.
//
// A plan has a direction. Its rows are the channels that are written and its sources those that are read:
// forward the outputs and inputs of the groups, transposed (the input gradient) the other way round. Every
// channel of the written image is one row, whoever reads it: where input lists overlap, the row of the
// gradient belongs to the first group that reads the channel, and knows its other readers; a channel that
// nobody reads is a row behind those of the last group.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace groupconv::cuda {

struct PlanProblem {
  const int32_t* table = nullptr;
  int64_t length = 0, in_channels = 0, out_channels = 0, entries = 0;
  bool transposed = false;
  int64_t tile_rows = 1;
  int64_t tile_columns = 0;    // 0: a tile has all sources of its groups
  bool packs_groups = false;   // several small groups to a tile
  bool checks_entries = true;  // else `entries` is a guess
  // The stages of a chain: what lies between them is only known on the device. The channels above are then the
  // most that there can be.
  const int64_t* stage_before = nullptr;  // the summary of the plan whose outputs are the inputs
  bool finds_outputs = false;             // the table says how many
  // The groups write a channel each, in their order, whatever the table says of outputs. `length` is that of a
  // table which would say so.
  bool one_output_each = false;

  __host__ __device__ int64_t row_channels() const { return transposed ? in_channels : out_channels; }
  __host__ __device__ int64_t source_channels() const { return transposed ? out_channels : in_channels; }
};

// How weights lie: packed, block after block, or dense, of which only the blocks are read.
struct WeightLayout {
  bool transposed;
  int64_t dense_columns;  // 0: packed

  __host__ __device__ bool is_dense() const { return dense_columns > 0; }
};

// A header, one group, no reads.
constexpr int64_t shortest_table(int64_t out_channels) { return 8 + out_channels; }

// Views into one block of scratch. How many groups and reads there are is only known on the device, so
// the arrays have room for the most that a table of this length can have.
struct Plan {
  int64_t max_groups, max_reads, max_tiles;
  int64_t* summary;  // valid, groups, slots, groups in a slot, tiles, input and output channels, counter
  int64_t* weight_offsets;  // [groups + 1] in units of one kernel window
  int32_t* row_offsets;     // [groups + 1] into row_list
  int32_t* source_offsets;  // [groups + 1] into source_list
  int32_t* row_list;        // the groups' channels on the written side
  int32_t* source_list;     // and on the side that is read
  int32_t* row_groups;      // the group of every item of row_list
  int32_t* source_groups;   // and of source_list
  int32_t* source_runs;     // how many items from each on are neighbouring channels, up to eight
  int32_t* row_runs;        // the same of row_list
  int32_t* rows;            // the channel of every row
  int32_t* reader_first;    // [rows] into readers
  int32_t* reader_last;     // [rows]
  int32_t* readers;         // items of row_list, row after row, ascending
  int32_t* row_begins;      // [groups + 2] where a group's rows begin; last the channels nobody reads
  int32_t* tile_offsets;    // [slots + 1] the tiles of a slot, which is one group or several small ones
  int32_t* counts;          // working memory: [channels of either side]
  int32_t* starts;          // [channels of the written side]
  int32_t* ranks;           // [row_list + 1]

  Plan() = default;  // of nothing
  // With no scratch it only measures: words() is then how much it would take.
  Plan(int64_t* scratch, const PlanProblem& p)
      : max_groups((p.length - (p.finds_outputs ? 0 : p.out_channels) - 6) / 2),
        max_reads(p.length - (p.finds_outputs ? 0 : p.out_channels) - 8) {
    const int64_t most_rows = p.row_channels();
    const int64_t row_items = p.transposed ? max_reads : p.out_channels;
    const int64_t source_items = p.transposed ? p.out_channels : max_reads;
    max_tiles = max_groups + 1 + most_rows / p.tile_rows;
    if (p.tile_columns > 0) {
      // Of a group with r rows and c columns: at most (r / tile_rows + 1) · (c / tile_columns + 1).
      max_tiles = max_groups + 1 + most_rows / p.tile_rows + source_items / p.tile_columns +
                  p.entries / (p.tile_rows * p.tile_columns);
    }
    const auto take = [&](int64_t words_taken) {
      int64_t* taken = scratch ? scratch + used : nullptr;
      used += words_taken;
      return taken;
    };
    const auto take_short = [&](int64_t count) { return reinterpret_cast<int32_t*>(take((count + 1) / 2)); };
    summary = take(8);
    weight_offsets = take(max_groups + 1);
    row_offsets = take_short(max_groups + 1);
    source_offsets = take_short(max_groups + 1);
    row_list = take_short(row_items);
    source_list = take_short(source_items);
    row_groups = take_short(row_items);
    source_groups = take_short(source_items);
    source_runs = take_short(source_items);
    row_runs = take_short(row_items);
    rows = take_short(most_rows);
    reader_first = take_short(most_rows);
    reader_last = take_short(most_rows);
    readers = take_short(row_items);
    row_begins = take_short(max_groups + 2);
    tile_offsets = take_short(max_groups + 2);
    counts = take_short(p.in_channels > p.out_channels ? p.in_channels : p.out_channels);
    starts = take_short(most_rows);
    ranks = take_short(row_items + 1);
  }

  int64_t words() const { return used; }
  __device__ bool valid() const { return summary[0] != 0; }
  __device__ int64_t groups() const { return summary[1]; }
  __device__ int64_t slots() const { return summary[2]; }
  __device__ int64_t groups_in_slot() const { return summary[3]; }
  __device__ int64_t tiles() const { return summary[4]; }
  __device__ int64_t in_channels() const { return summary[5]; }
  __device__ int64_t out_channels() const { return summary[6]; }
  // Zero, for a kernel that comes next.
  __device__ int32_t* counter() const { return reinterpret_cast<int32_t*>(summary + 7); }

 private:
  int64_t used = 0;
};

// The last list that begins at or before an item: one without items has none.
__device__ inline int list_of(const int32_t* offsets, int64_t lists, int64_t item) {
  int64_t low = 0, high = lists;
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    (offsets[middle] <= item ? low : high) = middle;
  }
  return static_cast<int>(low);
}

// The groups of a slot; the last slot has the rows that no group reads.
struct SlotGroups {
  int64_t begin, end;
  __device__ SlotGroups(int64_t slot, int64_t slots, int64_t groups, int64_t in_slot) {
    const bool last = slot == slots - 1;
    begin = last ? groups : slot * in_slot;
    end = last ? groups + 1 : (begin + in_slot < groups ? begin + in_slot : groups);
  }
};

// Fills the plan on the device, or marks it as not valid.
cudaError_t run_plan(const PlanProblem& problem, const Plan& plan, cudaStream_t stream);

}  // namespace groupconv::cuda
