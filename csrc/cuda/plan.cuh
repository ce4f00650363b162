// make_plan: one block turns a table into a plan, or into one that is not valid.
//
// The checks are those of core/partition.cpp. Cost: a few microseconds, proportional to the number of
// channels; the sums over groups are a parallel prefix sum, so thousands of groups stay cheap.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/plan.h"

namespace groupconv::cuda {

constexpr int plan_threads = 1024;

// Replaces each thread's value by the sum over the threads before it; returns the sum over all.
__device__ inline int64_t exclusive_sum(int64_t& value, int64_t* shared) {
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

__device__ inline bool offsets_are_sound(const int64_t* offsets, int64_t groups, int64_t total) {
  bool sound = offsets[0] == 0 && offsets[groups] == total;
  for (int64_t g = threadIdx.x; g < groups; g += plan_threads) sound &= offsets[g] <= offsets[g + 1];
  return sound;
}

__device__ inline void copy_widened(int64_t* destination, const int32_t* source, int64_t count) {
  for (int64_t i = threadIdx.x; i < count; i += plan_threads) destination[i] = source[i];
}

__global__ void __launch_bounds__(plan_threads) make_plan(PlanProblem problem, Plan plan) {
  __shared__ int64_t header[4];  // read once, so that all threads act on the same one
  __shared__ int64_t sums[plan_threads];
  if (threadIdx.x < 4) header[threadIdx.x] = problem.table[threadIdx.x];
  if (threadIdx.x == 0) plan.summary[0] = 0;
  __syncthreads();
  const int64_t out_channels = problem.out_channels, groups = header[2], reads = header[3];
  if (header[0] != problem.in_channels || header[1] != out_channels || groups < 1 || reads < 0 ||
      problem.length != 4 + 2 * (groups + 1) + reads + out_channels) {
    return;
  }

  const int32_t* cursor = problem.table + 4;
  copy_widened(plan.in_offsets, cursor, groups + 1);
  copy_widened(plan.out_offsets, cursor + groups + 1, groups + 1);
  copy_widened(plan.inputs, cursor + 2 * (groups + 1), reads);
  copy_widened(plan.outputs, cursor + 2 * (groups + 1) + reads, out_channels);
  for (int64_t i = threadIdx.x; i < out_channels; i += plan_threads) plan.writers[i] = 0;
  __syncthreads();

  bool sound = offsets_are_sound(plan.in_offsets, groups, reads) &&
               offsets_are_sound(plan.out_offsets, groups, out_channels);
  for (int64_t i = threadIdx.x; i < reads; i += plan_threads) {
    sound &= plan.inputs[i] >= 0 && plan.inputs[i] < problem.in_channels;
  }
  // out_channels channels, all in range and none twice: every output is covered.
  for (int64_t i = threadIdx.x; i < out_channels; i += plan_threads) {
    const int64_t channel = plan.outputs[i];
    sound = sound && channel >= 0 && channel < out_channels &&
            atomicAdd(reinterpret_cast<unsigned long long*>(plan.writers + channel), 1ull) == 0;
  }
  if (!__syncthreads_and(sound)) return;

  // Each thread adds up a run of neighbouring groups.
  const int64_t run = (groups + plan_threads - 1) / plan_threads;
  const int64_t begin = threadIdx.x * run < groups ? threadIdx.x * run : groups;
  const int64_t end = begin + run < groups ? begin + run : groups;
  const auto outputs_of = [&](int64_t g) { return plan.out_offsets[g + 1] - plan.out_offsets[g]; };
  const auto weights_of = [&](int64_t g) {
    return outputs_of(g) * (plan.in_offsets[g + 1] - plan.in_offsets[g]);
  };
  const auto tiles_of = [&](int64_t g) {
    return (outputs_of(g) + problem.tile_outputs - 1) / problem.tile_outputs;
  };
  int64_t weights = 0, tiles = 0;
  for (int64_t g = begin; g < end; ++g) {
    weights += weights_of(g);
    tiles += tiles_of(g);
  }
  const int64_t all_weights = exclusive_sum(weights, sums);
  const int64_t all_tiles = exclusive_sum(tiles, sums);
  for (int64_t g = begin; g < end; ++g) {
    plan.weight_offsets[g] = weights;
    plan.tile_offsets[g] = tiles;
    weights += weights_of(g);
    tiles += tiles_of(g);
  }
  if (threadIdx.x == 0) {
    plan.weight_offsets[groups] = all_weights;
    plan.tile_offsets[groups] = all_tiles;
    plan.summary[1] = groups;
    plan.summary[2] = all_tiles;
    plan.summary[0] = all_weights == problem.entries;
  }
}

}  // namespace groupconv::cuda
