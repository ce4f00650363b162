// The partitioned convolution, forward, for any partition, window and strides.
//
// An implicit matrix product: a block makes a tile of output channels of one group × pixels, tap by tap
// and a few input channels at a time. A step copies [depth][pixels] of the input and [depth][outputs] of
// the weight to shared memory, where each thread multiplies a tile of its own in registers.
//
//   tile    outputs × pixels × depth   a thread's   shared memory (float sums)
//   wide    32 × 64 × 16               4 × 2        4 KiB input + 2 KiB weight + 1.5 KiB origins
//   narrow  4 × 256 × 8                4 × 1        8 KiB input + 128 B weight + 6 KiB origins
//
// A permutation is part of an address: the channel lists are read where the input is gathered and where
// the output is stored, and nowhere else. Sums are float, of doubles double.
#pragma once

#include <cuda_runtime.h>

#include <cmath>
#include <cstdint>

#include "core/epilogue.h"
#include "core/problem.h"
#include "cuda/epilogue.cuh"
#include "cuda/plan.h"

namespace groupconv::cuda {

constexpr int tile_threads = 256;

template <int Outputs, int Pixels, int Depth, int ThreadOutputs, int ThreadPixels>
struct Tile {
  static constexpr int outputs = Outputs, pixels = Pixels, depth = Depth;
  static constexpr int thread_outputs = ThreadOutputs, thread_pixels = ThreadPixels;
  static constexpr int columns = Pixels / ThreadPixels;  // threads along the pixels
  static_assert(columns * (Outputs / ThreadOutputs) == tile_threads);
};
using WideTile = Tile<32, 64, 16, 4, 2>;
using NarrowTile = Tile<4, 256, 8, 4, 1>;  // for groups of up to about eight outputs

template <class T>
struct SumType {
  using type = float;
};
template <>
struct SumType<double> {
  using type = double;
};

template <class T>
struct ForwardArguments {
  Image<const T> input;
  Image<T> output;
  Image<const T> residual;
  const T* weight;
  const T* bias;
  Window window;
  Activation activation;
};

struct Pixel {
  int64_t image, row, col;
};

__device__ inline Pixel pixel_at(int64_t index, int64_t height, int64_t width) {
  const int64_t line = index / width;
  return {line / height, line % height, index - line * width};
}

template <class T>
__device__ int64_t offset_of(const Image<T>& image, const Pixel& pixel, int64_t channel) {
  return pixel.image * image.stride_n + channel * image.stride_c + pixel.row * image.stride_h +
         pixel.col * image.stride_w;
}

// The last group that begins at or before this tile: one without outputs has no tile.
__device__ inline int64_t group_of_tile(const Plan& plan, int64_t tile) {
  int64_t low = 0, high = plan.groups();
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    (plan.tile_offsets[middle] <= tile ? low : high) = middle;
  }
  return low;
}

// A table that is no partition defines no result. NaN says so; memory left as it was would not.
template <class T>
__device__ void fill_with_nan(const Image<T>& output) {
  const int64_t elements = output.batch * output.channels * output.height * output.width;
  const int64_t step = static_cast<int64_t>(gridDim.x) * tile_threads;
  int64_t i = static_cast<int64_t>(blockIdx.x) * tile_threads + threadIdx.x;
  for (; i < elements; i += step) output.data[i] = static_cast<T>(nanf(""));
}

template <class T, class Tile>
__global__ void __launch_bounds__(tile_threads) forward_tiles(ForwardArguments<T> a, Plan plan) {
  using Sum = typename SumType<T>::type;
  __shared__ Sum inputs[Tile::depth][Tile::pixels];
  __shared__ Sum weights[Tile::depth][Tile::outputs];
  __shared__ Pixel origins[Tile::pixels];  // the input pixel under the window's corner; image −1: none

  if (!plan.valid()) {
    fill_with_nan(a.output);
    return;
  }
  const Window& w = a.window;
  const int thread = threadIdx.x;
  const int column = thread % Tile::columns;
  const int first_line = thread / Tile::columns * Tile::thread_outputs;
  const int64_t area = w.kernel_h * w.kernel_w;
  const int64_t pixels = a.output.batch * a.output.height * a.output.width;
  const int64_t tiles = plan.tiles();
  const int64_t work = tiles * ((pixels + Tile::pixels - 1) / Tile::pixels);

  // Blocks that run at the same time share their pixels and differ in channels: in channels_last the
  // sectors that one group leaves half used are still in L2 for the next.
  for (int64_t item = blockIdx.x; item < work; item += gridDim.x) {
    const int64_t tile = item % tiles;
    const int64_t first_pixel = item / tiles * Tile::pixels;
    const int64_t group = group_of_tile(plan, tile);
    const int64_t skipped = (tile - plan.tile_offsets[group]) * Tile::outputs;
    const int64_t outputs_left = plan.out_offsets[group + 1] - plan.out_offsets[group] - skipped;
    const int lines = static_cast<int>(outputs_left < Tile::outputs ? outputs_left : Tile::outputs);
    const int64_t* out_channels = plan.outputs + plan.out_offsets[group] + skipped;
    const int64_t* in_channels = plan.inputs + plan.in_offsets[group];
    const int64_t in_count = plan.in_offsets[group + 1] - plan.in_offsets[group];
    const T* block = a.weight + (plan.weight_offsets[group] + skipped * in_count) * area;

    // No barrier: after the last tile's last barrier its origins were not read again.
    for (int p = thread; p < Tile::pixels; p += tile_threads) {
      Pixel origin{-1, 0, 0};
      if (first_pixel + p < pixels) {
        origin = pixel_at(first_pixel + p, a.output.height, a.output.width);
        origin.row = origin.row * w.stride_h - w.pad_top;
        origin.col = origin.col * w.stride_w - w.pad_left;
      }
      origins[p] = origin;
    }

    Sum sums[Tile::thread_outputs][Tile::thread_pixels] = {};
    for (int64_t tap = 0; tap < area; ++tap) {
      const int64_t shift_h = tap / w.kernel_w * w.dilation_h;
      const int64_t shift_w = tap % w.kernel_w * w.dilation_w;
      for (int64_t first = 0; first < in_count; first += Tile::depth) {
        const int64_t inputs_left = in_count - first;
        const int depth = static_cast<int>(inputs_left < Tile::depth ? inputs_left : Tile::depth);

        __syncthreads();
        for (int i = thread; i < Tile::depth * Tile::pixels; i += tile_threads) {
          // Neighbouring threads read neighbouring memory: channels in channels_last, else pixels.
          const bool across = a.input.stride_c == 1;
          const int d = across ? i % Tile::depth : i / Tile::pixels;
          const int p = across ? i / Tile::depth : i % Tile::pixels;
          if (d >= depth) continue;
          const Pixel from{origins[p].image, origins[p].row + shift_h, origins[p].col + shift_w};
          const bool inside = from.image >= 0 && from.row >= 0 && from.row < a.input.height &&
                              from.col >= 0 && from.col < a.input.width;
          inputs[d][p] =
              inside ? static_cast<Sum>(a.input.data[offset_of(a.input, from, in_channels[first + d])])
                     : Sum(0);
        }
        for (int i = thread; i < Tile::depth * Tile::outputs; i += tile_threads) {
          const int d = i % Tile::depth, line = i / Tile::depth;
          if (d >= depth) continue;
          weights[d][line] =
              line < lines ? static_cast<Sum>(block[(line * in_count + first + d) * area + tap]) : Sum(0);
        }
        __syncthreads();

        for (int d = 0; d < depth; ++d) {
#pragma unroll
          for (int r = 0; r < Tile::thread_outputs; ++r) {
            const Sum weight = weights[d][first_line + r];
#pragma unroll
            for (int p = 0; p < Tile::thread_pixels; ++p) {
              sums[r][p] += weight * inputs[d][column + p * Tile::columns];
            }
          }
        }
      }
    }

#pragma unroll
    for (int p = 0; p < Tile::thread_pixels; ++p) {
      const int64_t index = first_pixel + column + p * Tile::columns;
      if (index >= pixels) continue;
      const Pixel to = pixel_at(index, a.output.height, a.output.width);
#pragma unroll
      for (int r = 0; r < Tile::thread_outputs; ++r) {
        if (first_line + r >= lines) continue;
        const int64_t channel = out_channels[first_line + r];
        Sum value = sums[r][p];
        if (a.bias) value += static_cast<Sum>(a.bias[channel]);
        if (a.residual.data) {
          value += static_cast<Sum>(a.residual.data[offset_of(a.residual, to, channel)]);
        }
        a.output.data[offset_of(a.output, to, channel)] = static_cast<T>(activate(a.activation, value));
      }
    }
  }
}

}  // namespace groupconv::cuda
