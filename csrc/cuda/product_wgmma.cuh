// The convolution and its input gradient by Hopper's warp-group instructions, in float16 and bfloat16, for groups
// of many channels: the product of product.cuh with 64 pixels on the lines of an instruction and a tile's rows
// on its columns. Never measured.
//
// As in product_mma.cuh a block makes a tile of rows × a strip of pixels, and copies run ahead of the products
// through a ring of stages, from one tile of the strip into the next. Here the products run ahead of the threads
// too: while those gather the stage after next, the tensor cores are busy with this one and, at most, the last.
//
//   tile   pixels × rows × depth   a warp-group's   shared memory
//          128 × 128 × 64          64 × 128         64 KiB stages + 9 chunks of weights, 16 KiB each + 13 KiB
//          128 × 64 × 64           64 × 64          64 KiB + 18 chunks, 8 KiB each + 12 KiB
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/gather.cuh"
#include "cuda/instructions.cuh"
#include "cuda/product.cuh"
#include "cuda/strip.cuh"
#include "cuda/swizzled.cuh"
#include "cuda/wgmma.cuh"

namespace groupconv::cuda {

constexpr int wgmma_threads = 256, wgmma_pixels = wgmma_threads / 2;  // 64 for each warp-group
constexpr int wgmma_depth = swizzled_row;                             // sources of a step
constexpr int wgmma_summed = 16;                                      // what one instruction sums over
constexpr int wgmma_stages = 4;
using WgmmaStage = SwizzledTile<wgmma_depth, wgmma_pixels>;

// Weights of a step, and for how many steps there is room. Where a tile has more, they stream as pixels do.
template <int Rows>
constexpr int wgmma_weight_chunk = Rows * wgmma_depth;
template <int Rows>
constexpr int wgmma_weight_chunks = 9 * 128 / Rows;

template <int Rows>
constexpr int64_t wgmma_shared_bytes() {
  constexpr int64_t elements =
      wgmma_stages * WgmmaStage::elements + wgmma_weight_chunks<Rows> * wgmma_weight_chunk<Rows>;
  return swizzled_alignment + elements * sizeof(uint16_t);
}

// The weights of a chunk, rows of the product as rows: eight neighbours in memory by one asynchronous copy, others
// one by one.
template <int Rows, class T>
__device__ void load_swizzled_weights(const ProductArguments<T>& a, const Plan& plan,
                                      const StripSteps<wgmma_depth>& steps, int chunk, const Row* rows,
                                      int64_t row_count, T* to) {
  constexpr int run = run_length<T>;
  const int64_t area = a.area(), tap = steps.tap_h(chunk) * a.horizontal.kernel + steps.tap_w(chunk);
  const int first = steps.first_source(chunk), count = steps.source_count(chunk);
  const bool row_by_row = !a.layout.transposed && !a.layout.is_dense() && area == 1;
  for (int unit = threadIdx.x; unit < wgmma_weight_chunk<Rows> / run; unit += wgmma_threads) {
    const int line = unit / (wgmma_depth / run), d = unit % (wgmma_depth / run) * run;
    T* const destination = to + swizzled(line, d);
    if (line >= row_count || d >= count) {
      copy_16_async(destination, a.weight, false);
      continue;
    }
    if (row_by_row && d + run <= count &&
        plan.source_groups[first + d] == plan.source_groups[first + d + run - 1]) {
      const int64_t at = weight_of(plan, a.layout, rows[line], first + d);
      if (at < 0 || is_aligned(a.weight + at)) {
        copy_16_async(destination, at < 0 ? a.weight : a.weight + at, at >= 0);
        continue;
      }
    }
    SixteenBytes<T> elements;
#pragma unroll
    for (int i = 0; i < run; ++i) {
      const int64_t at = d + i < count ? weight_of(plan, a.layout, rows[line], first + d + i) : -1;
      elements.values[i] = at < 0 ? T(0.0f) : a.weight[at * area + tap];
    }
    store_16(destination, elements);
  }
}

// `strip_tiles`: tiles of pixels that a block does one after another. ChannelsLast: the source's channels are
// neighbours in memory.
template <class T, int Rows, bool ChannelsLast>
__global__ void __launch_bounds__(wgmma_threads, 1)
    wgmma_tiles(ProductArguments<T> a, Plan plan, int strip_tiles, bool flat) {
#if GROUPCONV_WGMMA
  // A tile's pixels are located before the products of the tile so many before it have begun, since a product
  // under way leaves the compiler no division (a function's call).
  constexpr int located_tiles = wgmma_stages - 1;
  __shared__ Origin origins[located_tiles][wgmma_pixels];
  __shared__ Row rows[Rows];
  __shared__ int range[2];
  if (!plan.valid()) {
    fill_with_nan(a.dest.data, a.dest.batch * a.dest.channels * a.dest.height * a.dest.width);
    return;
  }
  constexpr int weight_chunk = wgmma_weight_chunk<Rows>;
  char* const memory = dynamic_shared();
  const unsigned beyond = shared_address(memory) % swizzled_alignment;
  T* const stages = reinterpret_cast<T*>(memory + (swizzled_alignment - beyond) % swizzled_alignment);
  T* const weights = stages + wgmma_stages * WgmmaStage::elements;
  const GatherSource<T> source{a.source, a.before, ChannelsLast, flat};
  const int thread = threadIdx.x, lane = thread % 32, group = thread / 128;
  const int first_line = thread / 32 * 16 + lane / 4;  // and eight on
  const int64_t strip_pixels = static_cast<int64_t>(strip_tiles) * wgmma_pixels;
  const int64_t work = product_tiles(a, plan, strip_pixels);

  for (int64_t item = blockIdx.x; item < work; item += gridDim.x) {
    const ProductTile tile(a, plan, item, Rows, strip_pixels);
    const int64_t pixels =
        a.dest.batch * a.vertical.positions(tile.phase.row) * a.horizontal.positions(tile.phase.col);
    if (tile.first_pixel >= pixels) continue;
    const int64_t tiles_left = (pixels - tile.first_pixel + wgmma_pixels - 1) / wgmma_pixels;
    const int tiles = static_cast<int>(tiles_left < strip_tiles ? tiles_left : strip_tiles);
    __syncthreads();  // the last strip is done with what this one takes the place of
    for (int r = thread; r < tile.rows; r += wgmma_threads) {
      rows[r] = row_of(plan, a.layout, tile.first_row + r);
    }
    const auto locate = [&](int pixel_tile) {
      if (thread >= wgmma_pixels) return;
      origins[pixel_tile % located_tiles][thread] =
          origin_of(a, tile.phase, tile.first_pixel + pixel_tile * wgmma_pixels + thread);
    };
    for (int pixel_tile = 0; pixel_tile < located_tiles; ++pixel_tile) locate(pixel_tile);
    const StripSteps<wgmma_depth> steps(a, tile.phase, sources_of(plan, rows, tile.rows, range));
    const bool resident = steps.chunks <= wgmma_weight_chunks<Rows>;
    if (resident) {
      for (int chunk = 0; chunk < steps.chunks; ++chunk) {
        load_swizzled_weights<Rows>(a, plan, steps, chunk, rows, tile.rows, weights + chunk * weight_chunk);
      }
    }

    const int step_count = tiles * steps.chunks;
    const auto load_step = [&](int step) {
      const int pixel_tile = step / steps.chunks, chunk = step % steps.chunks;
      const int first = steps.first_source(chunk);
      gather<T, wgmma_depth, wgmma_pixels, WgmmaStage>(
          source, plan.source_list + first, plan.source_runs + first, steps.source_count(chunk),
          origins[pixel_tile % located_tiles], steps.shift(chunk),
          stages + step % wgmma_stages * WgmmaStage::elements);
      if (!resident) {
        load_swizzled_weights<Rows>(a, plan, steps, chunk, rows, tile.rows,
                                    weights + step % wgmma_stages * weight_chunk);
      }
    };

    float sums[Rows / 2] = {};
    for (int step = 0; step < wgmma_stages - 2; ++step) {
      if (step < step_count) load_step(step);
      commit_copies();
    }
    for (int pixel_tile = 0; pixel_tile < tiles; ++pixel_tile) {
      for (int chunk = 0; chunk < steps.chunks; ++chunk) {
        const int step = pixel_tile * steps.chunks + chunk;
        wait_copies<wgmma_stages - 3>();
        show_to_products();
        __syncthreads();
        const unsigned pixel_block =
            shared_address(stages + step % wgmma_stages * WgmmaStage::elements + group * swizzled_block);
        const unsigned weight_tile =
            shared_address(weights + (resident ? chunk : step % wgmma_stages) * weight_chunk);
        begin_products();
#pragma unroll
        for (int depth = 0; depth < wgmma_depth; depth += wgmma_summed) {
          const unsigned along_row = depth * sizeof(T), along_rows = depth * swizzled_row_bytes;
          multiply_async<!ChannelsLast>(
              sums, describe_swizzled(pixel_block + (ChannelsLast ? along_row : along_rows)),
              describe_swizzled(weight_tile + along_row), chunk + depth > 0, T());
        }
        commit_products();
        // Before the barrier above every thread waited for the products before the last: their stage is free.
        if (step + wgmma_stages - 2 < step_count) load_step(step + wgmma_stages - 2);
        commit_copies();
        wait_products<1>(sums);
      }
      wait_products<0>(sums);

      bool finite = true;
      ProductTile done = tile;
      done.first_pixel += pixel_tile * wgmma_pixels;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        Place place;
        if (!find_place(a, tile.phase, done.first_pixel + first_line + half * 8, place)) continue;
#pragma unroll
        for (int j = 0; j < Rows / 8; ++j) {
          const int row = j * 8 + lane % 4 * 2;
          const float first = sums[j * 4 + half * 2], second = sums[j * 4 + half * 2 + 1];
          store_two(a, place, rows + row, tile.rows - row, first, second);
          finite &= is_finite(first) && is_finite(second);
        }
      }
      locate(pixel_tile + located_tiles);
      if (!__syncthreads_and(finite)) repair_tile(a, plan, done, rows, wgmma_pixels);
    }
  }
#else
  __trap();  // the launcher sees what the kernel was compiled for
#endif
}

}  // namespace groupconv::cuda
