// The convolution and its input gradient by multiply-adds, for any partition, window, strides and dtype.
//
// fma_tiles: an implicit matrix product. A block makes a tile of rows of one group × pixels, tap by tap and
// a few sources at a time. A step copies [depth][pixels] of the source and [depth][rows] of the weight to
// shared memory, where each thread multiplies a tile of its own in registers.
//
//   tile    rows × pixels × depth   a thread's   shared memory (float sums)
//   wide    32 × 64 × 16            4 × 2        4 KiB pixels + 2 KiB weights
//   narrow  4 × 256 × 8             4 × 1        8 KiB pixels + 128 B weights
//
// fma_pixels: a thread sums up four pixels of one channel, below each other, straight from memory. For groups
// of a few channels, depthwise above all, whose pixels are read by a handful of threads each, neighbours in
// one block. Weights and where they lie are looked up once for the four.
//
// Coarse channels, those of a two-level convolution, are steps of fma_tiles like those of one more tap, from an
// image of their own.
//
// A permutation is part of an address: the channel lists are read where pixels are gathered and stored.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/product.cuh"

namespace groupconv::cuda {

constexpr int product_threads = 256;

template <int Rows, int Pixels, int Depth, int ThreadRows, int ThreadPixels>
struct FmaTile {
  static constexpr int rows = Rows, pixels = Pixels, depth = Depth;
  static constexpr int thread_rows = ThreadRows, thread_pixels = ThreadPixels;
  static constexpr int columns = Pixels / ThreadPixels;  // threads along the pixels
  static_assert(columns * (Rows / ThreadRows) == product_threads);
};
using WideTile = FmaTile<32, 64, 16, 4, 2>;
using NarrowTile = FmaTile<4, 256, 8, 4, 1>;  // for groups of up to about eight rows

constexpr int strip_pixels = 4;

// Of the largest phase, all images.
template <class T>
__host__ __device__ int64_t product_strips(const ProductArguments<T>& a) {
  return a.dest.batch * ((a.vertical.positions(0) + strip_pixels - 1) / strip_pixels) *
         a.horizontal.positions(0);
}

// The first source pixel of a place; `inside` is false behind the last pixel.
struct Corner {
  int64_t offset, row, col;
  bool inside;
};

template <class T, class Tile, bool HasCoarse = false>
__global__ void __launch_bounds__(product_threads, 2) fma_tiles(ProductArguments<T> a, Plan plan) {
  using S = Sum<T>;
  __shared__ S pixels[Tile::depth][Tile::pixels];
  __shared__ S weights[Tile::depth][Tile::rows];
  __shared__ Corner corners[Tile::pixels];
  __shared__ Row rows[Tile::rows];
  __shared__ int range[2];

  if (!plan.valid()) {
    fill_with_nan(a.dest.data, a.dest.batch * a.dest.channels * a.dest.height * a.dest.width);
    return;
  }
  const int thread = threadIdx.x;
  const int column = thread % Tile::columns;
  const int first_line = thread / Tile::columns * Tile::thread_rows;
  const int64_t area = a.area();
  const int64_t work = product_tiles(a, plan, Tile::pixels);

  for (int64_t item = blockIdx.x; item < work; item += gridDim.x) {
    const ProductTile tile(a, plan, item, Tile::rows, Tile::pixels);
    for (int p = thread; p < Tile::pixels; p += product_threads) {
      Place place;
      Corner corner{0, 0, 0, find_place(a, tile.phase, tile.first_pixel + p, place)};
      if (corner.inside) {
        corner.row = place.source_row;
        corner.col = place.source_col;
        corner.offset = offset_of(a.source, place.image, 0, corner.row, corner.col);
      }
      corners[p] = corner;
    }
    for (int r = thread; r < tile.rows; r += product_threads) {
      rows[r] = row_of(plan, a.layout, tile.first_row + r);
    }
    const SourceRange sources = sources_of(plan, rows, tile.rows, range);

    S sums[Tile::thread_rows][Tile::thread_pixels] = {};
    // `depth` products more of each sum. `pixel_at(d, p)` and `weight_at(d, line)` are asked for what exists.
    const auto add_step = [&](int depth, bool channels_last, const auto& pixel_at, const auto& weight_at) {
      __syncthreads();
      for (int i = thread; i < Tile::depth * Tile::pixels; i += product_threads) {
        // Neighbouring threads read neighbouring memory: channels in channels_last, else pixels.
        const int d = channels_last ? i % Tile::depth : i / Tile::pixels;
        const int p = channels_last ? i / Tile::depth : i % Tile::pixels;
        if (d < depth) pixels[d][p] = corners[p].inside ? pixel_at(d, p) : S(0);
      }
      for (int i = thread; i < Tile::depth * Tile::rows; i += product_threads) {
        const int d = i % Tile::depth, line = i / Tile::depth;
        if (d < depth) weights[d][line] = line < tile.rows ? weight_at(d, line) : S(0);
      }
      __syncthreads();

      for (int d = 0; d < depth; ++d) {
#pragma unroll
        for (int r = 0; r < Tile::thread_rows; ++r) {
          const S weight = weights[d][first_line + r];
#pragma unroll
          for (int p = 0; p < Tile::thread_pixels; ++p) {
            sums[r][p] += weight * pixels[d][column + p * Tile::columns];
          }
        }
      }
    };
    for (int64_t tap = 0; tap < area; ++tap) {
      const int64_t tap_h = tap / a.horizontal.kernel, tap_w = tap % a.horizontal.kernel;
      if (!a.vertical.tap_meets(tile.phase.row, tap_h) || !a.horizontal.tap_meets(tile.phase.col, tap_w)) {
        continue;
      }
      const int64_t shift_h = a.vertical.tap_shift(tile.phase.row, tap_h);
      const int64_t shift_w = a.horizontal.tap_shift(tile.phase.col, tap_w);
      const int64_t shift = shift_h * a.source.stride_h + shift_w * a.source.stride_w;
      for (int first = sources.first; first < sources.last; first += Tile::depth) {
        const int left = sources.last - first;
        add_step(
            left < Tile::depth ? left : Tile::depth, a.source.stride_c == 1,
            [&](int d, int p) {
              const Corner& corner = corners[p];
              if (!a.vertical.has_source(corner.row + shift_h) ||
                  !a.horizontal.has_source(corner.col + shift_w)) {
                return S(0);
              }
              const int32_t channel = plan.source_list[first + d];
              const T x = a.source.data[corner.offset + shift + channel * a.source.stride_c];
              return prepare(HasCoarse ? Prologue<S>{} : a.before, channel, static_cast<S>(x));
            },
            [&](int d, int line) {
              const int64_t at = weight_of(plan, a.layout, rows[line], first + d);
              if (at < 0) return S(0);
              return static_cast<S>(a.weight[at * area + tap]);
            });
      }
    }
    if constexpr (HasCoarse) {
      __syncthreads();
      for (int p = thread; p < Tile::pixels; p += product_threads) {
        Place place;
        if (!find_place(a, tile.phase, tile.first_pixel + p, place)) continue;
        corners[p].offset = offset_of(a.coarse, place.image, 0, place.row, place.col);
      }
      for (int64_t first = 0; first < a.coarse.channels; first += Tile::depth) {
        const int64_t left = a.coarse.channels - first;
        add_step(
            static_cast<int>(left < Tile::depth ? left : Tile::depth), a.coarse.stride_c == 1,
            [&](int d, int p) {
              return static_cast<S>(a.coarse.data[corners[p].offset + (first + d) * a.coarse.stride_c]);
            },
            [&](int d, int line) {
              return static_cast<S>(a.coarse_weight[rows[line].channel * a.coarse.channels + first + d]);
            });
      }
    }

    bool finite = true;
#pragma unroll
    for (int p = 0; p < Tile::thread_pixels; ++p) {
      Place place;
      if (!find_place(a, tile.phase, tile.first_pixel + column + p * Tile::columns, place)) continue;
#pragma unroll
      for (int r = 0; r < Tile::thread_rows; ++r) {
        if (first_line + r >= tile.rows) continue;
        store(a, place, rows[first_line + r].channel, sums[r][p]);
        finite &= is_finite(sums[r][p]);
      }
    }
    if (!__syncthreads_and(finite)) {
      repair_tile<HasCoarse>(a, plan, tile, rows, Tile::pixels);
      __syncthreads();
    }
  }
}

template <class T>
__global__ void __launch_bounds__(product_threads, 2) fma_pixels(ProductArguments<T> a, Plan plan) {
  const int64_t channels = a.dest.channels;
  if (!plan.valid()) {
    fill_with_nan(a.dest.data, a.dest.batch * channels * a.dest.height * a.dest.width);
    return;
  }
  // Neighbouring threads write neighbouring memory.
  const bool across = a.dest.stride_c == 1;
  const int64_t strips = product_strips(a), items = strips * channels * a.phases();
  const int64_t step = static_cast<int64_t>(gridDim.x) * product_threads;
  int64_t i = static_cast<int64_t>(blockIdx.x) * product_threads + threadIdx.x;
  for (; i < items; i += step) {
    const int64_t line = across ? i / channels : i / strips;
    const int64_t row = across ? i % channels : line % channels;
    const int64_t strip = across ? line % strips : i % strips;
    const int64_t phase_index = line / (across ? strips : channels);
    const Phase phase{phase_index / a.horizontal.phases(), phase_index % a.horizontal.phases()};
    const int64_t rows = a.vertical.positions(phase.row), cols = a.horizontal.positions(phase.col);
    const int64_t strips_down = (rows + strip_pixels - 1) / strip_pixels;
    if (strip >= a.dest.batch * strips_down * cols) continue;
    const int64_t strip_line = strip / cols, first = strip_line % strips_down * strip_pixels;
    Place place;
    const int64_t index = (strip_line / strips_down * rows + first) * cols + strip % cols;
    if (!find_place(a, phase, index, place)) continue;
    const int there = static_cast<int>(rows - first < strip_pixels ? rows - first : strip_pixels);
    const Row found = row_of(plan, a.layout, row);
    Sum<T> sums[strip_pixels] = {};
    add_products(a, plan, found, phase, place, there, sums);
#pragma unroll
    for (int p = 0; p < strip_pixels; ++p) {
      if (p >= there) continue;
      store(a, place, found.channel, sums[p]);
      place.row = a.vertical.pixel(phase.row, first + p + 1);
    }
  }
}

}  // namespace groupconv::cuda
