// The convolution and its input gradient on tensor cores, in float16, bfloat16 and TF32: the product of
// product.cuh with pixels on the 16 lines of a matrix instruction and rows on its 8.
//
// A block makes a tile of rows × a strip of pixels. The weights of its rows, all taps, stay in shared memory
// for the whole strip where they fit (else they stream as the pixels do); the pixels flow through a ring of
// stages, asynchronous copies running ahead of the products, from one tile of the strip into the next. Several
// small groups share a tile: their weights are then a block diagonal, and the zeros cost less than tiles of
// their own would.
//
// Coarse channels, those of a two-level convolution, are a product of their own behind the last tap's: more
// chunks for every tile of pixels, which all of its rows read.
//
//   tile   pixels × rows × depth   a warp's    shared memory
//   wide   128 × 64 × 32           32 × 32     30 KiB stages + 5 KiB a chunk of weights + 8 KiB
//   slim   128 × 16 × 32           16 × 16     30 KiB + 1.25 KiB a chunk + 7 KiB; small groups
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/gather.cuh"
#include "cuda/product.cuh"
#include "cuda/strip.cuh"

namespace groupconv::cuda {

constexpr int mma_threads = 256;
constexpr int mma_pixels = 128, mma_stages = 3;
template <class T>
constexpr int mma_depth = 64 / sizeof(T);

template <int Rows, int WarpsAlongPixels>
struct MmaTile {
  static constexpr int rows = Rows;
  static constexpr int warps_along_pixels = WarpsAlongPixels;
  static constexpr int warps_along_rows = mma_threads / 32 / WarpsAlongPixels;
  static constexpr int lines = mma_pixels / warps_along_pixels / 16;  // 16 × 8 parts of a warp
  static constexpr int columns = rows / warps_along_rows / 8;
  template <class T>
  static constexpr int weight_row = mma_depth<T> + row_padding<T>;
  template <class T>
  static constexpr int weight_chunk = rows * weight_row<T>;
  static_assert(columns % 2 == 0);
};
using WideMmaTile = MmaTile<64, 4>;
using SlimMmaTile = MmaTile<16, 8>;

template <class T>
using PixelStage = GatheredTile<T, mma_depth<T>, mma_pixels>;

template <class T, class Tile>
constexpr int64_t mma_shared_bytes(int64_t weight_chunks) {
  constexpr int64_t chunk = Tile::template weight_chunk<T>;
  return sizeof(T) * (mma_stages * PixelStage<T>::elements + weight_chunks * chunk);
}

template <class T, class Tile>
__device__ void load_weights(const ProductArguments<T>& a, const Plan& plan,
                             const StripSteps<mma_depth<T>>& steps, int chunk, const Row* rows,
                             int64_t row_count, T* to) {
  const int64_t area = a.area(), tap = steps.tap_h(chunk) * a.horizontal.kernel + steps.tap_w(chunk);
  const int first = steps.first_source(chunk), count = steps.source_count(chunk);
  for (int i = threadIdx.x; i < Tile::rows * mma_depth<T>; i += mma_threads) {
    const int d = i % mma_depth<T>, line = i / mma_depth<T>;
    const int64_t at = line < row_count && d < count ? weight_of(plan, a.layout, rows[line], first + d) : -1;
    to[line * Tile::template weight_row<T> + d] = at < 0 ? T(0.0f) : a.weight[at * area + tap];
  }
}

// The same for coarse channels from `first` on.
template <class T, class Tile>
__device__ void load_coarse_weights(const ProductArguments<T>& a, int first, const Row* rows,
                                    int64_t row_count, T* to) {
  for (int i = threadIdx.x; i < Tile::rows * mma_depth<T>; i += mma_threads) {
    const int d = i % mma_depth<T>, line = i / mma_depth<T>;
    const bool is_there = line < row_count && first + d < a.coarse.channels;
    to[line * Tile::template weight_row<T> + d] =
        is_there ? a.coarse_weight[rows[line].channel * a.coarse.channels + first + d] : T(0.0f);
  }
}

// `strip_tiles`: tiles of pixels that a block does one after another; `weight_chunks`: what it has room for.
// With coarse channels there is no prologue. They are a kernel of their own for the registers' sake.
template <class T, class Tile, bool HasCoarse = false>
__global__ void __launch_bounds__(mma_threads, 2)
    mma_tiles(ProductArguments<T> a, Plan plan, int strip_tiles, int weight_chunks, bool flat) {
  __shared__ Origin origins[2][mma_pixels];
  __shared__ Row rows[Tile::rows];
  __shared__ int range[2];
  if (!plan.valid()) {
    fill_with_nan(a.dest.data, a.dest.batch * a.dest.channels * a.dest.height * a.dest.width);
    return;
  }
  constexpr int weight_chunk = Tile::template weight_chunk<T>;
  T* const stages = reinterpret_cast<T*>(dynamic_shared());
  T* const weights = stages + mma_stages * PixelStage<T>::elements;
  const GatherSource<T> source{a.source, HasCoarse ? Prologue<float>{} : a.before, a.source.stride_c == 1,
                               flat};
  const GatherSource<T> coarse{
      a.coarse, {}, a.coarse.stride_c == 1, a.coarse.stride_w == 1 && a.coarse.stride_h == a.coarse.width};
  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
  const int first_line = warp % Tile::warps_along_pixels * Tile::lines * 16;
  const int first_column = warp / Tile::warps_along_pixels * Tile::columns * 8;
  const int64_t strip_pixels = static_cast<int64_t>(strip_tiles) * mma_pixels;
  const int64_t work = product_tiles(a, plan, strip_pixels);

  for (int64_t item = blockIdx.x; item < work; item += gridDim.x) {
    const ProductTile tile(a, plan, item, Tile::rows, strip_pixels);
    const int64_t pixels =
        a.dest.batch * a.vertical.positions(tile.phase.row) * a.horizontal.positions(tile.phase.col);
    if (tile.first_pixel >= pixels) continue;
    const int64_t tiles_left = (pixels - tile.first_pixel + mma_pixels - 1) / mma_pixels;
    const int tiles = static_cast<int>(tiles_left < strip_tiles ? tiles_left : strip_tiles);
    __syncthreads();  // the last strip is done with what the rows and weights take the place of
    for (int r = thread; r < tile.rows; r += mma_threads) {
      rows[r] = row_of(plan, a.layout, tile.first_row + r);
    }
    const StripSteps<mma_depth<T>> steps(a, tile.phase, sources_of(plan, rows, tile.rows, range));
    const int coarse_chunks =
        HasCoarse ? static_cast<int>((a.coarse.channels + mma_depth<T> - 1) / mma_depth<T>) : 0;
    const int chunks = steps.chunks + coarse_chunks;
    const auto load_chunk_weights = [&](int chunk, T* to) {
      if (!HasCoarse || chunk < steps.chunks) {
        load_weights<T, Tile>(a, plan, steps, chunk, rows, tile.rows, to);
      } else {
        load_coarse_weights<T, Tile>(a, (chunk - steps.chunks) * mma_depth<T>, rows, tile.rows, to);
      }
    };
    const bool resident = chunks <= weight_chunks;
    if (resident) {
      for (int chunk = 0; chunk < chunks; ++chunk) load_chunk_weights(chunk, weights + chunk * weight_chunk);
    }

    const int step_count = tiles * chunks;
    // For the whole block: the first chunk of a tile of pixels, of either product, has a barrier in it. From
    // one such chunk to the next the origins change sides, so that slower threads may still read the last.
    const auto load_step = [&](int step) {
      const int pixel_tile = step / chunks, chunk = step % chunks;
      const bool is_coarse = HasCoarse && chunk >= steps.chunks;
      Origin* const from = origins[HasCoarse ? is_coarse : pixel_tile % 2];
      if (chunk == 0 || (HasCoarse && chunk == steps.chunks)) {
        if (thread < mma_pixels) {
          Place place;
          Origin origin{0, 0, nowhere, 0};
          if (find_place(a, tile.phase, tile.first_pixel + pixel_tile * mma_pixels + thread, place)) {
            const int64_t row = is_coarse ? place.row : place.source_row;
            const int64_t col = is_coarse ? place.col : place.source_col;
            origin = {offset_of(is_coarse ? a.coarse : a.source, place.image, 0, row, col),
                      static_cast<int32_t>(place.image), static_cast<int32_t>(row),
                      static_cast<int32_t>(col)};
          }
          from[thread] = origin;
        }
        __syncthreads();
      }
      T* const stage = stages + step % mma_stages * PixelStage<T>::elements;
      if (is_coarse) {
        const int64_t first = static_cast<int64_t>(chunk - steps.chunks) * mma_depth<T>;
        const int64_t left = a.coarse.channels - first;
        gather<T, mma_depth<T>, mma_pixels>(coarse, NeighbouringChannels{first},
                                            static_cast<int>(left < mma_depth<T> ? left : mma_depth<T>), from,
                                            Shift{0, 0}, stage);
      } else {
        const int first = steps.first_source(chunk);
        const Shift shift{static_cast<int32_t>(a.vertical.tap_shift(tile.phase.row, steps.tap_h(chunk))),
                          static_cast<int32_t>(a.horizontal.tap_shift(tile.phase.col, steps.tap_w(chunk)))};
        gather<T, mma_depth<T>, mma_pixels>(source, plan.source_list + first, plan.source_runs + first,
                                            steps.source_count(chunk), from, shift, stage);
      }
      if (!resident) load_chunk_weights(chunk, weights + step % mma_stages * weight_chunk);
    };

    float sums[Tile::lines][Tile::columns][4] = {};
    for (int step = 0; step < mma_stages - 1; ++step) {
      if (step < step_count) load_step(step);
      commit_copies();
    }
    for (int step = 0; step < step_count; ++step) {
      wait_copies<mma_stages - 2>();
      __syncthreads();
      if (step + mma_stages - 1 < step_count) load_step(step + mma_stages - 1);
      commit_copies();

      const int chunk = step % chunks;
      const bool is_coarse = HasCoarse && chunk >= steps.chunks;
      const bool by_pixel = is_coarse ? coarse.channels_last : source.channels_last;
      const int row_length = by_pixel ? PixelStage<T>::pixel_row : PixelStage<T>::channel_row;
      const T* const pixel_tile = stages + step % mma_stages * PixelStage<T>::elements;
      const T* const weight_tile = weights + (resident ? chunk : step % mma_stages) * weight_chunk;
#pragma unroll
      for (int depth = 0; depth < mma_depth<T>; depth += mma_summed<T>) {
        unsigned left[Tile::lines][4];
#pragma unroll
        for (int i = 0; i < Tile::lines; ++i) {
          load_left(left[i], pixel_tile, row_length, !by_pixel, first_line + i * 16, depth);
        }
#pragma unroll
        for (int j = 0; j < Tile::columns; j += 2) {
          unsigned right[4];
          load_right(right, weight_tile, Tile::template weight_row<T>, false, first_column + j * 8, depth);
#pragma unroll
          for (int i = 0; i < Tile::lines; ++i) {
            multiply(sums[i][j], left[i], right[0], right[1], T());
            multiply(sums[i][j + 1], left[i], right[2], right[3], T());
          }
        }
      }
      if (chunk + 1 < chunks) continue;

      bool finite = true;
      ProductTile done = tile;
      done.first_pixel += step / chunks * mma_pixels;
#pragma unroll
      for (int i = 0; i < Tile::lines; ++i) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          Place place;
          const int line = first_line + i * 16 + half * 8 + lane / 4;
          const bool there = find_place(a, tile.phase, done.first_pixel + line, place);
#pragma unroll
          for (int j = 0; j < Tile::columns; ++j) {
            const int row = first_column + j * 8 + lane % 4 * 2;
            float& first = sums[i][j][half * 2];
            float& second = sums[i][j][half * 2 + 1];
            if (there) {
              store_two(a, place, rows + row, tile.rows - row, first, second);
              finite &= is_finite(first) && is_finite(second);
            }
            first = second = 0;
          }
        }
      }
      if (!__syncthreads_and(finite)) repair_tile<HasCoarse>(a, plan, done, rows, mma_pixels);
    }
  }
}

}  // namespace groupconv::cuda
