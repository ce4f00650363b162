// make_plan: one block turns a table into a plan, or into one that is not valid.
//
// The checks are those of core/partition.cpp. Cost: some microseconds, proportional to the number of
// channels; sums over groups and channels are parallel prefix sums, so thousands of groups stay cheap.
#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/launch.cuh"
#include "cuda/plan.h"

namespace groupconv::cuda {
namespace {

constexpr int plan_threads = 256;
constexpr int longest_run = 8;

// Replaces each thread's value by the sum over the threads before it; returns the sum over all.
__device__ int64_t exclusive_sum(int64_t& value, int64_t* shared) {
  const int me = threadIdx.x;
  int64_t sum = value;
  shared[me] = sum;
  __syncthreads();
  for (int distance = 1; distance < plan_threads; distance *= 2) {
    const int64_t before = me >= distance ? shared[me - distance] : 0;
    __syncthreads();
    sum += before;
    shared[me] = sum;
    __syncthreads();
  }
  const int64_t total = shared[plan_threads - 1];
  __syncthreads();
  value = sum - value;
  return total;
}

// A run of neighbouring items for each thread.
struct Run {
  int64_t begin, end;
  __device__ explicit Run(int64_t items) {
    const int64_t length = (items + plan_threads - 1) / plan_threads;
    begin = threadIdx.x * length < items ? threadIdx.x * length : items;
    end = begin + length < items ? begin + length : items;
  }
};

// store(i, sum of value(0) … value(i − 1)) for every item; returns the sum of all.
template <class Value, class Store>
__device__ int64_t prefix_sums(int64_t items, int64_t* shared, Value value, Store store) {
  const Run run(items);
  int64_t sum = 0;
  for (int64_t i = run.begin; i < run.end; ++i) sum += value(i);
  const int64_t total = exclusive_sum(sum, shared);
  for (int64_t i = run.begin; i < run.end; ++i) {
    const int64_t own = value(i);  // before storing, which may be in its place
    store(i, sum);
    sum += own;
  }
  __syncthreads();
  return total;
}

__device__ bool offsets_are_sound(const int32_t* offsets, int64_t groups, int64_t total) {
  bool sound = offsets[0] == 0 && offsets[groups] == total;
  for (int64_t g = threadIdx.x; g < groups; g += plan_threads) sound &= offsets[g] <= offsets[g + 1];
  return sound;
}

__device__ void copy(int32_t* destination, const int32_t* source, int64_t count) {
  for (int64_t i = threadIdx.x; i < count; i += plan_threads) destination[i] = source[i];
}

__device__ bool all_in_range(const int32_t* list, int64_t count, int64_t channels) {
  bool sound = true;
  for (int64_t i = threadIdx.x; i < count; i += plan_threads) sound &= list[i] >= 0 && list[i] < channels;
  return sound;
}

// How long the run of neighbouring channels is that begins at an item.
__device__ void mark_runs(int32_t* runs, const int32_t* list, int64_t items) {
  for (int64_t i = threadIdx.x; i < items; i += plan_threads) {
    int length = 1;
    while (length < longest_run && i + length < items && list[i + length] == list[i] + length) ++length;
    runs[i] = length;
  }
}

// counts[channel] = how often the list has it. The caller has checked the range.
__device__ void count_channels(int32_t* counts, int64_t channels, const int32_t* list, int64_t items) {
  for (int64_t c = threadIdx.x; c < channels; c += plan_threads) counts[c] = 0;
  __syncthreads();
  for (int64_t i = threadIdx.x; i < items; i += plan_threads) atomicAdd(counts + list[i], 1);
  __syncthreads();
}

// Rows that are the items of the list themselves.
__device__ void take_rows_as_listed(const Plan& plan, int64_t groups, int64_t channels) {
  for (int64_t i = threadIdx.x; i < channels; i += plan_threads) {
    plan.rows[i] = plan.row_list[i];
    plan.reader_first[i] = static_cast<int32_t>(i);
    plan.reader_last[i] = static_cast<int32_t>(i) + 1;
    plan.readers[i] = static_cast<int32_t>(i);
  }
  for (int64_t g = threadIdx.x; g < groups + 2; g += plan_threads) {
    plan.row_begins[g] = g <= groups ? plan.row_offsets[g] : static_cast<int32_t>(channels);
  }
  __syncthreads();
}

// One row for every channel, at its first reader's; false where one group reads a channel twice.
__device__ bool take_rows_by_reader(const Plan& plan, int64_t groups, int64_t items, int64_t channels,
                                    int64_t* sums) {
  count_channels(plan.counts, channels, plan.row_list, items);
  prefix_sums(
      channels, sums, [&](int64_t c) { return plan.counts[c]; },
      [&](int64_t c, int64_t before) { plan.starts[c] = plan.counts[c] = static_cast<int32_t>(before); });
  for (int64_t i = threadIdx.x; i < items; i += plan_threads) {
    plan.readers[atomicAdd(plan.counts + plan.row_list[i], 1)] = static_cast<int32_t>(i);
  }
  __syncthreads();
  // In whatever order they came, they are sorted; counts are now where the lists end.
  bool sound = true;
  for (int64_t c = threadIdx.x; c < channels; c += plan_threads) {
    for (int i = plan.starts[c] + 1; i < plan.counts[c]; ++i) {
      const int32_t reader = plan.readers[i];
      int to = i;
      for (; to > plan.starts[c] && plan.readers[to - 1] > reader; --to)
        plan.readers[to] = plan.readers[to - 1];
      plan.readers[to] = reader;
    }
    for (int i = plan.starts[c] + 1; i < plan.counts[c]; ++i) {
      sound &= plan.row_groups[plan.readers[i - 1]] != plan.row_groups[plan.readers[i]];
    }
  }
  if (!__syncthreads_and(sound)) return false;

  const auto place = [&](int64_t row, int32_t channel) {
    plan.rows[row] = channel;
    plan.reader_first[row] = plan.starts[channel];
    plan.reader_last[row] = plan.counts[channel];
  };
  const auto owns = [&](int64_t item) { return plan.readers[plan.starts[plan.row_list[item]]] == item; };
  const int64_t read = prefix_sums(items, sums, owns, [&](int64_t item, int64_t row) {
    plan.ranks[item] = static_cast<int32_t>(row);
    if (owns(item)) place(row, plan.row_list[item]);
  });
  const auto is_unread = [&](int64_t c) { return plan.starts[c] == plan.counts[c]; };
  prefix_sums(channels, sums, is_unread, [&](int64_t c, int64_t before) {
    if (is_unread(c)) place(read + before, static_cast<int32_t>(c));
  });
  if (threadIdx.x == 0) plan.ranks[items] = static_cast<int32_t>(read);
  __syncthreads();
  for (int64_t g = threadIdx.x; g < groups + 2; g += plan_threads) {
    plan.row_begins[g] = g <= groups ? plan.ranks[plan.row_offsets[g]] : static_cast<int32_t>(channels);
  }
  __syncthreads();
  return true;
}

// How many neighbouring groups share a tile: as many as surely fit, if that is more than one.
__device__ int64_t groups_that_fit(const PlanProblem& problem, const Plan& plan, int64_t groups, int* most) {
  if (threadIdx.x < 2) most[threadIdx.x] = 1;
  __syncthreads();
  for (int64_t g = threadIdx.x; g < groups; g += plan_threads) {
    atomicMax(most, plan.row_begins[g + 1] - plan.row_begins[g]);
    atomicMax(most + 1, plan.source_offsets[g + 1] - plan.source_offsets[g]);
  }
  __syncthreads();
  if (!problem.packs_groups) return 1;
  int64_t fit = problem.tile_rows / most[0];
  if (problem.tile_columns > 0 && problem.tile_columns / most[1] < fit) fit = problem.tile_columns / most[1];
  return fit < 1 ? 1 : fit;
}

// How many tiles a slot has along its rows and along its columns.
struct SlotTiles {
  int64_t down, across;
  __device__ SlotTiles(const PlanProblem& problem, const Plan& plan, const SlotGroups& slot, int64_t groups) {
    const int64_t rows = plan.row_begins[slot.end] - plan.row_begins[slot.begin];
    down = (rows + problem.tile_rows - 1) / problem.tile_rows;
    across = 1;
    if (problem.tile_columns > 0) {
      const int64_t end = slot.end < groups ? slot.end : groups;
      const int64_t columns = plan.source_offsets[end] - plan.source_offsets[slot.begin];
      across = (columns + problem.tile_columns - 1) / problem.tile_columns;
    }
  }
};

__global__ void __launch_bounds__(plan_threads) make_plan(PlanProblem problem, Plan plan) {
  __shared__ int64_t header[4];  // read once, so that all threads act on the same one
  __shared__ int64_t sums[plan_threads];
  __shared__ int most[2];
  if (threadIdx.x < 4) header[threadIdx.x] = problem.table[threadIdx.x];
  if (threadIdx.x == 0) plan.summary[0] = plan.summary[7] = 0;
  __syncthreads();
  const bool follows_sound = problem.stage_before == nullptr || problem.stage_before[0] != 0;
  const int64_t in_channels = problem.stage_before ? problem.stage_before[6] : problem.in_channels;
  const int64_t out_channels = problem.finds_outputs ? header[1] : problem.out_channels;
  const int64_t groups = header[2], reads = header[3];
  if (!follows_sound || out_channels < 0 || in_channels > problem.in_channels ||
      out_channels > problem.out_channels || header[0] != in_channels ||
      (problem.one_output_each ? groups : header[1]) != out_channels || groups < 1 || reads < 0 ||
      problem.length != 4 + 2 * (groups + 1) + reads + out_channels) {
    return;
  }

  const bool transposed = problem.transposed;
  int32_t* in_offsets = transposed ? plan.row_offsets : plan.source_offsets;
  int32_t* out_offsets = transposed ? plan.source_offsets : plan.row_offsets;
  int32_t* inputs = transposed ? plan.row_list : plan.source_list;
  int32_t* outputs = transposed ? plan.source_list : plan.row_list;
  const int32_t* cursor = problem.table + 4;
  copy(in_offsets, cursor, groups + 1);
  copy(inputs, cursor + 2 * (groups + 1), reads);
  if (problem.one_output_each) {
    for (int64_t g = threadIdx.x; g <= groups; g += plan_threads) out_offsets[g] = static_cast<int32_t>(g);
    for (int64_t g = threadIdx.x; g < groups; g += plan_threads) outputs[g] = static_cast<int32_t>(g);
  } else {
    copy(out_offsets, cursor + groups + 1, groups + 1);
    copy(outputs, cursor + 2 * (groups + 1) + reads, out_channels);
  }
  __syncthreads();
  bool sound =
      offsets_are_sound(in_offsets, groups, reads) && offsets_are_sound(out_offsets, groups, out_channels);
  sound &= all_in_range(inputs, reads, in_channels);
  sound &= all_in_range(outputs, out_channels, out_channels);
  if (!__syncthreads_and(sound)) return;
  // out_channels channels, all in range and none twice: every output is covered.
  count_channels(plan.counts, out_channels, outputs, out_channels);
  for (int64_t c = threadIdx.x; c < out_channels; c += plan_threads) sound &= plan.counts[c] == 1;
  if (!__syncthreads_and(sound)) return;

  const int64_t row_items = transposed ? reads : out_channels;
  const int64_t source_items = transposed ? out_channels : reads;
  for (int64_t i = threadIdx.x; i < row_items; i += plan_threads) {
    plan.row_groups[i] = list_of(plan.row_offsets, groups, i);
  }
  for (int64_t i = threadIdx.x; i < source_items; i += plan_threads) {
    plan.source_groups[i] = list_of(plan.source_offsets, groups, i);
  }
  __syncthreads();
  mark_runs(plan.row_runs, plan.row_list, row_items);
  mark_runs(plan.source_runs, plan.source_list, source_items);
  if (!transposed) {
    take_rows_as_listed(plan, groups, out_channels);
  } else if (!take_rows_by_reader(plan, groups, reads, in_channels, sums)) {
    return;
  }

  const int64_t weights = prefix_sums(
      groups, sums,
      [&](int64_t g) {
        return static_cast<int64_t>(plan.row_offsets[g + 1] - plan.row_offsets[g]) *
               (plan.source_offsets[g + 1] - plan.source_offsets[g]);
      },
      [&](int64_t g, int64_t before) { plan.weight_offsets[g] = before; });

  const int64_t in_slot = groups_that_fit(problem, plan, groups, most);
  const int64_t slots = (groups + in_slot - 1) / in_slot + 1;
  const int64_t tiles = prefix_sums(
      slots, sums,
      [&](int64_t slot) {
        const SlotTiles cut(problem, plan, SlotGroups(slot, slots, groups, in_slot), groups);
        return cut.down * cut.across;
      },
      [&](int64_t slot, int64_t before) { plan.tile_offsets[slot] = static_cast<int32_t>(before); });
  if (threadIdx.x == 0) {
    plan.weight_offsets[groups] = weights;
    plan.tile_offsets[slots] = static_cast<int32_t>(tiles);
    plan.summary[1] = groups;
    plan.summary[2] = slots;
    plan.summary[3] = in_slot;
    plan.summary[4] = tiles;
    plan.summary[5] = in_channels;
    plan.summary[6] = out_channels;
    plan.summary[0] = !problem.checks_entries || weights == problem.entries;
  }
}

}  // namespace

cudaError_t run_plan(const PlanProblem& problem, const Plan& plan, cudaStream_t stream) {
  return launch(make_plan, 1, plan_threads, 0, stream, problem, plan);
}

}  // namespace groupconv::cuda
