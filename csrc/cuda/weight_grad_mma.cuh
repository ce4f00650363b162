// The weight gradient on tensor cores, in float16, bfloat16 and TF32: outputs on the 16 lines of a matrix
// instruction, inputs on its 8, and pixels are what is summed over. See weight_grad_fma.cuh for the slices.
//
// A block makes a tile of outputs × inputs of one slot for one tap and slice. Both images flow through a ring
// of stages; where pixels lie is worked out for 256 at once.
//
//   tile   outputs × inputs × pixels   a warp's   shared memory
//   wide   64 × 64 × 32                16 × 32    3 × 10 KiB + 24 KiB
//   slim   16 × 16 × 128               16 × 16    3 × 12 KiB + 24 KiB, each warp 16 of the pixels; small groups
//
// In TF32 a step has half as many pixels.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/gather.cuh"
#include "cuda/weight_grad_fma.cuh"

namespace groupconv::cuda {

constexpr int weight_mma_threads = 256, weight_mma_warps = weight_mma_threads / 32;
constexpr int weight_mma_stages = 3;
constexpr int located_pixels = 256;  // at once

// WarpsDown × WarpsAcross warps share the tile; those that are left share the pixels of a step.
template <class T, int Side, int PixelBytes, int WarpsDown, int WarpsAcross>
struct WeightMmaTile {
  static constexpr int side = Side, pixels = PixelBytes / sizeof(T);
  static constexpr int warps_down = WarpsDown, warps_across = WarpsAcross;
  static constexpr int parts = weight_mma_warps / (WarpsDown * WarpsAcross);
  static constexpr int lines = side / warps_down / 16, columns = side / warps_across / 8;
  static constexpr int depth = pixels / parts;  // a warp's pixels of a step
  static constexpr int steps_located = located_pixels / pixels;
  using Half = GatheredTile<T, Side, pixels>;
  static constexpr int64_t stage_bytes = sizeof(T) * weight_mma_stages * 2 * Half::elements;
  static constexpr int64_t sum_bytes = parts > 1 ? 4 * parts * Side * Side : 0;
  static constexpr int64_t shared_bytes = stage_bytes > sum_bytes ? stage_bytes : sum_bytes;
  static_assert(columns % 2 == 0 && depth % mma_summed<T> == 0 && lines >= 1);
};
constexpr int wide_weight_side = 64, slim_weight_side = 16;
template <class T>
using WideWeightTile = WeightMmaTile<T, wide_weight_side, 64, 4, 2>;
template <class T>
using SlimWeightTile = WeightMmaTile<T, slim_weight_side, 256, 1, 1>;

template <class T>
__device__ void store_weight(const WeightGradArguments<T>& a, const Plan& plan, const WeightTile& tile,
                             int row, int column, int64_t tap, int64_t slice, const PixelRange& range,
                             float sum) {
  if (row >= tile.rows || column >= tile.columns) return;
  const int64_t entry = entry_of(plan, a.dense_columns, tile.first_row + row, tile.first_column + column);
  if (entry < 0) return;
  if (!is_finite(sum)) {
    sum = sum_over_pixels(a, plan.row_list[tile.first_row + row],
                          plan.source_list[tile.first_column + column], tap, range.begin, range.end, 1);
  }
  a.partial[(slice * a.entries + entry) * a.area() + tap] = sum;
}

template <class T, class Tile>
__global__ void __launch_bounds__(weight_mma_threads, 2)
    weight_grad_mma(WeightGradArguments<T> a, Plan plan, bool flat_grad, bool flat_input) {
  __shared__ Origin origins[2][2][located_pixels];  // of grad, of input
  if (!plan.valid()) {
    fill_with_nan(a.partial, a.slices * a.entries * a.area());
    return;
  }
  constexpr int half = Tile::Half::elements;
  T* const stages = reinterpret_cast<T*>(dynamic_shared());
  const GatherSource<T> grads{a.grad, {}, a.grad.stride_c == 1, flat_grad};
  const GatherSource<T> inputs{a.input, a.before, a.input.stride_c == 1, flat_input};
  const auto row_length = [](bool channels_last) {
    return channels_last ? Tile::Half::pixel_row : Tile::Half::channel_row;
  };
  const int grad_row = row_length(grads.channels_last), input_row = row_length(inputs.channels_last);
  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
  const int first_line = warp % Tile::warps_down * Tile::lines * 16;
  const int first_column = warp / Tile::warps_down % Tile::warps_across * Tile::columns * 8;
  const int part = warp / (Tile::warps_down * Tile::warps_across);
  const int64_t area = a.area(), tiles = plan.tiles(), work = tiles * area * a.slices;

  for (int64_t item = blockIdx.x; item < work; item += gridDim.x) {
    const WeightTile tile(plan, item % tiles, Tile::side, Tile::side);
    const int64_t tap = item / tiles % area, slice = item / tiles / area;
    const PixelRange range(a.pixels(), slice, a.slices);
    const Shift shift{static_cast<int32_t>(a.vertical.tap_shift(0, tap / a.horizontal.kernel)),
                      static_cast<int32_t>(a.horizontal.tap_shift(0, tap % a.horizontal.kernel))};
    const int step_count = static_cast<int>((range.end - range.begin + Tile::pixels - 1) / Tile::pixels);
    __syncthreads();  // the last tile is done with the stages and origins

    // For the whole block: every so many steps there is a barrier in it.
    const auto load_step = [&](int step) {
      const int located = step / Tile::steps_located, within = step % Tile::steps_located * Tile::pixels;
      if (within == 0) {
        const int64_t pixel = range.begin + static_cast<int64_t>(located) * located_pixels + thread;
        Origin of_grad{0, 0, nowhere, 0}, of_input{0, 0, nowhere, 0};
        if (pixel < range.end) {
          const int64_t line = pixel / a.grad.width, col = pixel - line * a.grad.width;
          const int64_t image = line / a.grad.height, row = line - image * a.grad.height;
          const int64_t h = a.vertical.origin(row), w = a.horizontal.origin(col);
          of_grad = {offset_of(a.grad, image, 0, row, col), static_cast<int32_t>(image),
                     static_cast<int32_t>(row), static_cast<int32_t>(col)};
          of_input = {offset_of(a.input, image, 0, h, w), static_cast<int32_t>(image),
                      static_cast<int32_t>(h), static_cast<int32_t>(w)};
        }
        origins[located % 2][0][thread] = of_grad;
        origins[located % 2][1][thread] = of_input;
        __syncthreads();
      }
      T* const stage = stages + step % weight_mma_stages * 2 * half;
      gather<T, Tile::side, Tile::pixels>(grads, plan.row_list + tile.first_row,
                                          plan.row_runs + tile.first_row, static_cast<int>(tile.rows),
                                          origins[located % 2][0] + within, {0, 0}, stage);
      gather<T, Tile::side, Tile::pixels>(
          inputs, plan.source_list + tile.first_column, plan.source_runs + tile.first_column,
          static_cast<int>(tile.columns), origins[located % 2][1] + within, shift, stage + half);
    };

    float sums[Tile::lines][Tile::columns][4] = {};
    for (int step = 0; step < weight_mma_stages - 1; ++step) {
      if (step < step_count) load_step(step);
      commit_copies();
    }
    for (int step = 0; step < step_count; ++step) {
      wait_copies<weight_mma_stages - 2>();
      __syncthreads();
      if (step + weight_mma_stages - 1 < step_count) load_step(step + weight_mma_stages - 1);
      commit_copies();
      const T* const stage = stages + step % weight_mma_stages * 2 * half;
#pragma unroll
      for (int depth = 0; depth < Tile::depth; depth += mma_summed<T>) {
        const int pixel = part * Tile::depth + depth;
        unsigned left[Tile::lines][4];
#pragma unroll
        for (int i = 0; i < Tile::lines; ++i) {
          load_left(left[i], stage, grad_row, grads.channels_last, first_line + i * 16, pixel);
        }
#pragma unroll
        for (int j = 0; j < Tile::columns; j += 2) {
          unsigned right[4];
          load_right(right, stage + half, input_row, inputs.channels_last, first_column + j * 8, pixel);
#pragma unroll
          for (int i = 0; i < Tile::lines; ++i) {
            multiply(sums[i][j], left[i], right[0], right[1], T());
            multiply(sums[i][j + 1], left[i], right[2], right[3], T());
          }
        }
      }
    }

    float* const shared_sums = reinterpret_cast<float*>(stages);
    if (Tile::parts > 1) __syncthreads();  // the stages are no longer read
#pragma unroll
    for (int i = 0; i < Tile::lines; ++i) {
#pragma unroll
      for (int j = 0; j < Tile::columns; ++j) {
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          const int row = first_line + i * 16 + k / 2 * 8 + lane / 4;
          const int column = first_column + j * 8 + lane % 4 * 2 + k % 2;
          if (Tile::parts > 1) {
            shared_sums[(part * Tile::side + row) * Tile::side + column] = sums[i][j][k];
          } else {
            store_weight(a, plan, tile, row, column, tap, slice, range, sums[i][j][k]);
          }
        }
      }
    }
    if (Tile::parts > 1) {
      __syncthreads();
      for (int at = thread; at < Tile::side * Tile::side; at += weight_mma_threads) {
        float sum = 0;
        for (int p = 0; p < Tile::parts; ++p) sum += shared_sums[p * Tile::side * Tile::side + at];
        store_weight(a, plan, tile, at / Tile::side, at % Tile::side, tap, slice, range, sum);
      }
    }
  }
}

}  // namespace groupconv::cuda
