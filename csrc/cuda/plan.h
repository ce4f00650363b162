// The plan: a checked, private copy of a partition table with the sums that a convolution kernel needs.
//
// The table lies in device memory and may come from anywhere. make_plan (plan.cuh) copies it, checks the
// copy, and adds up where each group's weights begin and which output tiles are its own. The convolution
// reads only the plan, never the table, so a hostile table, or one that another stream overwrites
// meanwhile, can't lead it out of bounds.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace groupconv::cuda {

// Views into one block of scratch. How many groups and reads there are is only known on the device, so
// the arrays have room for the most that a table of this length can have.
struct Plan {
  int64_t max_groups;
  int64_t max_reads;
  int64_t* summary;         // valid, groups, tiles
  int64_t* in_offsets;      // [groups + 1]
  int64_t* out_offsets;     // [groups + 1]
  int64_t* weight_offsets;  // [groups + 1] in units of one kernel window
  int64_t* tile_offsets;    // [groups + 1] in output tiles
  int64_t* inputs;          // [reads]
  int64_t* outputs;         // [out_channels]
  int64_t* writers;         // [out_channels] how often each output channel is written

  // With no scratch it only measures: words() is then how much it would take.
  Plan(int64_t* scratch, int64_t table_length, int64_t out_channels)
      : max_groups((table_length - out_channels - 6) / 2), max_reads(table_length - out_channels - 8) {
    const auto take = [&](int64_t count) {
      int64_t* taken = scratch ? scratch + used : nullptr;
      used += count;
      return taken;
    };
    summary = take(3);
    in_offsets = take(max_groups + 1);
    out_offsets = take(max_groups + 1);
    weight_offsets = take(max_groups + 1);
    tile_offsets = take(max_groups + 1);
    inputs = take(max_reads);
    outputs = take(out_channels);
    writers = take(out_channels);
  }

  int64_t words() const { return used; }
  __device__ bool valid() const { return summary[0] != 0; }
  __device__ int64_t groups() const { return summary[1]; }
  __device__ int64_t tiles() const { return summary[2]; }

 private:
  int64_t used = 0;
};

struct PlanProblem {
  const int32_t* table;
  int64_t length, in_channels, out_channels, entries;
  int64_t tile_outputs;  // output channels in a tile
};

}  // namespace groupconv::cuda
