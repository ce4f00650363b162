// The weight gradient by multiply-adds, for any partition, window, strides and dtype:
//
//   dW[o, i, tap] = Σ over pixels p of dY[o, p] · x[i, p · stride − pad + tap · dilation]
//
// The pixels are cut into a number of slices that only sizes decide. Every slice makes a gradient of its
// own in float (of doubles in double), [slices][entries][window], and add_slices sums them up in order:
// the same call gives the same bits, and no atomic addition is needed.
//
// weight_grad_tiles: a block makes a tile of one group's outputs × inputs for one tap and slice, a few
// pixels at a time through shared memory. weight_grad_entries: for groups of a few channels a warp (rows of
// pixels) or a thread (channels_last) sums up one entry straight from memory.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/axis.h"
#include "cuda/element.cuh"
#include "cuda/plan.h"

namespace groupconv::cuda {

template <class T>
struct WeightGradArguments {
  Image<const T> grad, input;
  Sum<T>* partial;            // [slices][entries][window]
  int64_t entries, slices;    // of a gradient
  int64_t dense_columns;      // 0: packed
  Axis vertical, horizontal;  // forward
  Prologue<Sum<T>> before;    // of the input

  __host__ __device__ int64_t area() const { return vertical.kernel * horizontal.kernel; }
  __host__ __device__ int64_t pixels() const { return grad.batch * grad.height * grad.width; }
};

struct PixelRange {
  int64_t begin, end;
  __device__ PixelRange(int64_t pixels, int64_t slice, int64_t slices) {
    const int64_t length = (pixels + slices - 1) / slices;
    begin = slice * length < pixels ? slice * length : pixels;
    end = begin + length < pixels ? begin + length : pixels;
  }
};

// Where an output pixel lies in grad, and where its tap meets input; false where that is padding.
template <class T>
__device__ bool find_pair(const WeightGradArguments<T>& a, int64_t tap, int64_t pixel, int64_t& of_grad,
                          int64_t& of_input) {
  const int64_t line = pixel / a.grad.width, col = pixel - line * a.grad.width;
  const int64_t image = line / a.grad.height, row = line - image * a.grad.height;
  const int64_t h = a.vertical.origin(row) + a.vertical.tap_shift(0, tap / a.horizontal.kernel);
  const int64_t w = a.horizontal.origin(col) + a.horizontal.tap_shift(0, tap % a.horizontal.kernel);
  of_grad = offset_of(a.grad, image, 0, row, col);
  of_input = offset_of(a.input, image, 0, h, w);
  return a.vertical.has_source(h) && a.horizontal.has_source(w);
}

// From products that exist and no others, as sum_of_products.
template <class T>
__device__ Sum<T> sum_over_pixels(const WeightGradArguments<T>& a, int32_t output, int32_t input, int64_t tap,
                                  int64_t begin, int64_t end, int64_t step) {
  Sum<T> sum = 0;
  for (int64_t pixel = begin; pixel < end; pixel += step) {
    int64_t of_grad, of_input;
    if (!find_pair(a, tap, pixel, of_grad, of_input)) continue;
    const auto x = static_cast<Sum<T>>(a.input.data[of_input + input * a.input.stride_c]);
    sum += static_cast<Sum<T>>(a.grad.data[of_grad + output * a.grad.stride_c]) * prepare(a.before, input, x);
  }
  return sum;
}

// The entry of two items of the lists, −1 where they share no group.
__device__ inline int64_t entry_of(const Plan& plan, int64_t dense_columns, int64_t row, int64_t column) {
  const int group = plan.row_groups[row];
  if (plan.source_groups[column] != group) return -1;
  if (dense_columns > 0) return plan.row_list[row] * dense_columns + plan.source_list[column];
  const int64_t columns = plan.source_offsets[group + 1] - plan.source_offsets[group];
  return plan.weight_offsets[group] + (row - plan.row_offsets[group]) * columns + column -
         plan.source_offsets[group];
}

// A tile of one slot: rows (outputs) × columns (inputs), both items of the plan's lists.
struct WeightTile {
  int64_t first_row, rows, first_column, columns;

  __device__ WeightTile(const Plan& plan, int64_t tile, int64_t tile_rows, int64_t tile_columns) {
    const int64_t slots = plan.slots(), groups = plan.groups();
    const int slot = list_of(plan.tile_offsets, slots, tile);
    const SlotGroups range(slot, slots, groups, plan.groups_in_slot());
    const int64_t end = range.end < groups ? range.end : groups;
    const int64_t last_row = plan.row_begins[range.end], last_column = plan.source_offsets[end];
    const int64_t across = (last_column - plan.source_offsets[range.begin] + tile_columns - 1) / tile_columns;
    const int64_t local = tile - plan.tile_offsets[slot];
    first_row = plan.row_begins[range.begin] + local / across * tile_rows;
    first_column = plan.source_offsets[range.begin] + local % across * tile_columns;
    rows = last_row - first_row < tile_rows ? last_row - first_row : tile_rows;
    columns = last_column - first_column < tile_columns ? last_column - first_column : tile_columns;
  }
};

constexpr int weight_grad_threads = 256;
constexpr int weight_tile_side = 32, weight_tile_depth = 32;

template <class T>
__global__ void __launch_bounds__(weight_grad_threads, 2)
    weight_grad_tiles(WeightGradArguments<T> a, Plan plan) {
  using S = Sum<T>;
  constexpr int side = weight_tile_side, depth = weight_tile_depth;
  constexpr int each = 2, across = side / each;  // a thread sums up each × each
  static_assert(across * across == weight_grad_threads);
  __shared__ S grads[depth][side + 1];
  __shared__ S inputs[depth][side + 1];
  __shared__ int64_t of_grad[depth], of_input[depth];  // of_input −1: no product

  if (!plan.valid()) {
    fill_with_nan(a.partial, a.slices * a.entries * a.area());
    return;
  }
  const int thread = threadIdx.x, column = thread % across, line = thread / across;
  const int64_t area = a.area(), tiles = plan.tiles(), work = tiles * area * a.slices;
  for (int64_t item = blockIdx.x; item < work; item += gridDim.x) {
    const WeightTile tile(plan, item % tiles, side, side);
    const int64_t tap = item / tiles % area, slice = item / tiles / area;
    const PixelRange range(a.pixels(), slice, a.slices);
    S sums[each][each] = {};
    for (int64_t first = range.begin; first < range.end; first += depth) {
      __syncthreads();
      if (thread < depth) {
        int64_t g = 0, x = 0;
        const bool meets = first + thread < range.end && find_pair(a, tap, first + thread, g, x);
        of_grad[thread] = meets ? g : 0;
        of_input[thread] = meets ? x : -1;
      }
      __syncthreads();
      const auto load = [&](const Image<const T>& image, const int64_t* offsets, const int32_t* list,
                            int64_t count, S(*to)[side + 1], bool prepares) {
        const bool by_channel = image.stride_c == 1;
        for (int i = thread; i < depth * side; i += weight_grad_threads) {
          const int c = by_channel ? i % side : i / depth, p = by_channel ? i / side : i % depth;
          S value = 0;
          if (c < count && of_input[p] >= 0) {
            value = static_cast<S>(image.data[offsets[p] + list[c] * image.stride_c]);
            if (prepares) value = prepare(a.before, list[c], value);
          }
          to[p][c] = value;
        }
      };
      load(a.grad, of_grad, plan.row_list + tile.first_row, tile.rows, grads, false);
      load(a.input, of_input, plan.source_list + tile.first_column, tile.columns, inputs, true);
      __syncthreads();
#pragma unroll 4
      for (int d = 0; d < depth; ++d) {
#pragma unroll
        for (int r = 0; r < each; ++r) {
#pragma unroll
          for (int c = 0; c < each; ++c) {
            sums[r][c] += grads[d][line + r * across] * inputs[d][column + c * across];
          }
        }
      }
    }
#pragma unroll
    for (int r = 0; r < each; ++r) {
#pragma unroll
      for (int c = 0; c < each; ++c) {
        const int64_t row = tile.first_row + line + r * across, col = tile.first_column + column + c * across;
        if (row >= tile.first_row + tile.rows || col >= tile.first_column + tile.columns) continue;
        const int64_t entry = entry_of(plan, a.dense_columns, row, col);
        if (entry < 0) continue;
        S sum = sums[r][c];
        if (!is_finite(sum)) {
          sum = sum_over_pixels(a, plan.row_list[row], plan.source_list[col], tap, range.begin, range.end, 1);
        }
        a.partial[(slice * a.entries + entry) * area + tap] = sum;
      }
    }
  }
}

constexpr int warp_lanes = 32;

// `lanes` threads share an entry: a warp along rows of pixels, one where channels are neighbours.
template <class T>
__global__ void __launch_bounds__(weight_grad_threads, 2)
    weight_grad_entries(WeightGradArguments<T> a, Plan plan, int lanes) {
  if (!plan.valid()) {
    fill_with_nan(a.partial, a.slices * a.entries * a.area());
    return;
  }
  const int64_t area = a.area(), entries = plan.weight_offsets[plan.groups()],
                items = entries * area * a.slices;
  const int64_t step = static_cast<int64_t>(gridDim.x) * weight_grad_threads / lanes;
  const int lane = threadIdx.x % lanes;
  int64_t item = (static_cast<int64_t>(blockIdx.x) * weight_grad_threads + threadIdx.x) / lanes;
  for (; item < items; item += step) {
    const int64_t packed = item % entries, tap = item / entries % area, slice = item / entries / area;
    int64_t low = 0, high = plan.groups();  // the last group whose weights begin at or before
    while (high - low > 1) {
      const int64_t middle = (low + high) / 2;
      (plan.weight_offsets[middle] <= packed ? low : high) = middle;
    }
    const int64_t columns = plan.source_offsets[low + 1] - plan.source_offsets[low];
    const int64_t within = packed - plan.weight_offsets[low];
    const int32_t output = plan.row_list[plan.row_offsets[low] + within / columns];
    const int32_t input = plan.source_list[plan.source_offsets[low] + within % columns];
    const PixelRange range(a.pixels(), slice, a.slices);
    Sum<T> sum = sum_over_pixels(a, output, input, tap, range.begin + lane, range.end, lanes);
    for (int distance = lanes / 2; distance > 0; distance /= 2) {
      sum += __shfl_down_sync(0xffffffffu, sum, distance);
    }
    const int64_t entry = a.dense_columns > 0 ? output * a.dense_columns + input : packed;
    if (lane == 0) a.partial[(slice * a.entries + entry) * area + tap] = sum;
  }
}

}  // namespace groupconv::cuda
