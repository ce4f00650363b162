// How the product of whole pixels (whole_pixels.cuh) is cut: what lies where in shared memory, how many pixels
// a run has, and when the kernel is taken at all. Plain host code, from sizes alone.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/plan.h"

namespace groupconv::cuda {

struct Device {
  int64_t shared_bytes;  // the most that a block may ask for
  int64_t multiprocessors;
};

// A fragment: eight rows × what one matrix instruction sums over, in the order of the instruction's lanes.
constexpr int64_t fragment_bytes = 256;
constexpr int fragment_rows = 8;
// What a warp takes at once: two times the lines of a matrix instruction, and the rows of a tile.
constexpr int line_pixels = 32;
constexpr int narrow_tile_rows = 32, wide_tile_rows = 64;
constexpr int whole_pixel_threads = 256, whole_pixel_warps = whole_pixel_threads / 32;
// Channels, and the one behind those of a source, are numbered in two bytes.
constexpr int64_t most_whole_pixel_channels = 1 << 15;
// Tiles begin at a multiple of this in the list of sources, so that a lane reads its own at once.
constexpr int source_alignment = 4;

struct WholePixelSizes {
  int64_t source_channels, row_channels;
  int64_t source_items;  // the most that the list of sources can have
  int64_t element_bytes;
  bool has_residual, has_bias;
};
WholePixelSizes whole_pixel_sizes(const PlanProblem& partition, const Plan& plan, int64_t element_bytes,
                                  bool has_residual, bool has_bias);

struct WholePixelCut {
  int32_t pixels = 0;    // of a run; 0: the kernel is not taken
  int32_t stages = 0;    // runs in shared memory: one is computed, the others arrive
  int32_t resident = 0;  // fragments of weights that stay in shared memory
  int64_t blocks = 0;    // that run at the same time
};

// Sixteen bytes or more than a pixel has, so that eight pixels below each other lie in different banks. What
// is behind the channels of a source is zero: the channel of a source that does not exist.
constexpr int64_t pixel_pitch(int64_t bytes) { return bytes + (bytes % 32 == 0 ? 16 : 32); }

// Where everything lies in shared memory, in bytes.
struct WholePixelMemory {
  int32_t source_pitch, dest_pitch;
  int32_t source_stage, dest_stage;         // from one run to the next; 0: all runs use the same
  int32_t sources, dests;                   // pixels
  int32_t source_at, dest_at, residual_at;  // their offsets in the images, −1: none
  int32_t fragments, bias;
  int32_t rows, items;  // the channels of rows and of sources, two bytes each
  int32_t bytes = 0;

  WholePixelMemory(const WholePixelSizes& sizes, const WholePixelCut& cut)
      : source_pitch(static_cast<int32_t>(pixel_pitch(sizes.source_channels * sizes.element_bytes))),
        dest_pitch(static_cast<int32_t>(pixel_pitch(sizes.row_channels * sizes.element_bytes))),
        source_stage(cut.pixels * source_pitch),
        dest_stage(sizes.has_residual ? cut.pixels * dest_pitch : 0) {
    const auto take = [&](int64_t wanted) {
      const int32_t taken = bytes;
      bytes += static_cast<int32_t>((wanted + 15) / 16 * 16);
      return taken;
    };
    const int64_t run_offsets = static_cast<int64_t>(sizeof(int64_t)) * cut.pixels * cut.stages;
    sources = take(static_cast<int64_t>(source_stage) * cut.stages);
    dests = take(static_cast<int64_t>(cut.pixels) * dest_pitch * (sizes.has_residual ? cut.stages : 1));
    fragments = take(fragment_bytes * cut.resident);
    source_at = take(run_offsets);
    dest_at = take(run_offsets);
    residual_at = take(sizes.has_residual ? run_offsets : 0);
    bias = take(sizes.has_bias ? static_cast<int64_t>(sizeof(float)) * sizes.row_channels : 0);
    rows = take(2 * sizes.row_channels);
    items = take(2 * padded_items(sizes.source_items));
  }

  // A tile's last step may reach beyond the list.
  static constexpr int64_t padded_items(int64_t items) { return items + 16; }
};

// `weight_bytes`: a guess, the groups are on the device.
WholePixelCut cut_whole_pixels(const WholePixelSizes& sizes, int64_t pixels, int64_t weight_bytes,
                               const Device& device);

// A tile: the rows of ProductTile, eight to a column of fragments. Columns differ in the steps that they take
// part in, a step being what one matrix instruction sums over.
struct WholePixelTile {
  static constexpr int most_columns = wide_tile_rows / fragment_rows;
  int32_t first_row, rows;
  int32_t first_item, steps;               // of source_list
  int32_t first_fragment, fragment_count;  // step after step, the columns that take part
  int32_t sources_are_neighbours;          // from every multiple of source_alignment on
  uint32_t range[most_columns];            // the column's first step, and above sixteen bits where they end

  static __host__ __device__ int begin(uint32_t range) { return static_cast<int>(range & 0xffff); }
  static __host__ __device__ int end(uint32_t range) { return static_cast<int>(range >> 16); }
  static __host__ __device__ bool takes_part(uint32_t range, int step) {
    return step >= begin(range) && step < end(range);
  }
  // Where the fragment of a column and one of its steps lies, from the first on.
  __host__ __device__ int fragment_of(int column, int step) const {
    int before = 0;
    for (int j = 0; j < most_columns; ++j) {
      const int last = step < end(range[j]) ? step : end(range[j]);
      before += last > begin(range[j]) ? last - begin(range[j]) : 0;
      before += j < column && takes_part(range[j], step);
    }
    return before;
  }
};

// What lies behind the plan in its scratch.
struct WholePixelLayout {
  WholePixelTile* tiles = nullptr;  // [plan.max_tiles]
  char* fragments = nullptr;

  // Without scratch it only measures, as the plan does.
  WholePixelLayout(int64_t* scratch, const Plan& plan, const PlanProblem& partition, int64_t element_bytes);
  int64_t words() const { return used; }

 private:
  int64_t used = 0;
};

// More than the fragments of any table of the plan's sizes. Of tiles, all but the empty ones have a row.
int64_t most_fragments(const Plan& plan, const PlanProblem& partition, int64_t element_bytes);

}  // namespace groupconv::cuda
