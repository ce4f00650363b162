// Launches the kernels of product_fma.cuh and product_mma.cuh for one element type.
#pragma once

#include <algorithm>

#include "cuda/launch.cuh"
#include "cuda/product_fma.cuh"
#include "cuda/product_mma.cuh"
#include "cuda/typed.cuh"

namespace groupconv::cuda {

template <class T>
ProductArguments<T> product_arguments(const ProductProblem& p) {
  const bool transposed = p.partition.transposed;
  return {typed<const T>(p.source),
          typed<T>(p.dest),
          typed<const T>(p.residual),
          typed<const T>(p.coarse),
          static_cast<const T*>(p.weight),
          static_cast<const T*>(p.coarse_weight),
          static_cast<const T*>(p.bias),
          vertical_axis(p.window, p.dest.height, p.source.height, transposed),
          horizontal_axis(p.window, p.dest.width, p.source.width, transposed),
          typed<T>(p.before),
          p.activation,
          {transposed, p.dense_columns}};
}

template <class T>
cudaError_t launch_product(ProductKernel kernel, const ProductProblem& problem, const Plan& plan,
                           cudaStream_t stream);
template <class T>
cudaError_t launch_wgmma(ProductKernel kernel, const ProductProblem& problem, const Plan& plan,
                         cudaStream_t stream);
// Whether the current device has Hopper's warp-group instructions and this build code for them.
bool has_wgmma();

template <class T>
cudaError_t launch_fma(ProductKernel kernel, const ProductProblem& problem, const Plan& plan,
                       cudaStream_t stream) {
  const ProductArguments<T> a = product_arguments<T>(problem);
  const auto pixel_tiles = [&](int64_t pixels) {
    return a.phases() * ((a.positions() + pixels - 1) / pixels);
  };
  if (a.coarse.data && kernel != ProductKernel::wide) return cudaErrorInvalidValue;
  switch (kernel) {
    case ProductKernel::pixels: {
      const int64_t strips = (product_strips(a) + product_threads - 1) / product_threads;
      const int64_t blocks = blocks_for(a.dest.channels * a.phases(), strips);
      return launch(fma_pixels<T>, blocks, product_threads, 0, stream, a, plan);
    }
    case ProductKernel::narrow: {
      const int64_t blocks = blocks_for(plan.max_tiles, pixel_tiles(NarrowTile::pixels));
      return launch(fma_tiles<T, NarrowTile>, blocks, product_threads, 0, stream, a, plan);
    }
    case ProductKernel::wide: {
      const int64_t blocks = blocks_for(plan.max_tiles, pixel_tiles(WideTile::pixels));
      const auto tiles = a.coarse.data ? fma_tiles<T, WideTile, true> : fma_tiles<T, WideTile>;
      return launch(tiles, blocks, product_threads, 0, stream, a, plan);
    }
    default: return cudaErrorInvalidValue;
  }
}

// Neighbouring pixels of the source are neighbours in memory from row to row, and all of them are visited.
inline bool visits_flat_rows(const ProductProblem& p) {
  const Window& w = p.window;
  const bool bare = w.pad_top == 0 && w.pad_left == 0 && w.stride_h == 1 && w.stride_w == 1;
  return bare && w.area() == 1 && p.source.stride_w == 1 && p.source.flat() &&
         p.source.height == p.dest.height && p.source.width == p.dest.width;
}

template <class T, class Tile>
cudaError_t launch_mma(const ProductProblem& problem, const Plan& plan, cudaStream_t stream) {
  const ProductArguments<T> a = product_arguments<T>(problem);
  const int64_t rows = std::max<int64_t>(a.dest.channels, 1);
  const int64_t pixel_tiles = (a.positions() + mma_pixels - 1) / mma_pixels;
  // A strip as long as leaves work for every multiprocessor of a large GPU a few times.
  constexpr int64_t enough_blocks = 528, longest_strip = 16;
  const int64_t row_tiles = (rows + Tile::rows - 1) / Tile::rows;
  const int64_t strip_tiles =
      std::clamp<int64_t>(pixel_tiles * a.phases() * row_tiles / enough_blocks, 1, longest_strip);
  // Room for the weights of groups up to twice as deep as the average, within a bound that the smallest GPUs
  // have (99 KiB a block, compute capability 8.6) and that leaves an H100 room for two blocks.
  constexpr int64_t most_bytes = 56 << 10;
  const int64_t depth = 2 * std::max<int64_t>(problem.partition.entries / rows, Tile::rows);
  const int64_t most_chunks = most_bytes / static_cast<int64_t>(sizeof(T) * Tile::template weight_chunk<T>);
  const auto chunks_of = [](int64_t channels) { return (channels + mma_depth<T> - 1) / mma_depth<T>; };
  const int64_t weight_chunks =
      std::clamp<int64_t>(std::min(most_chunks, a.area()) * chunks_of(depth) + chunks_of(a.coarse.channels),
                          mma_stages, most_chunks);
  const int64_t blocks =
      blocks_for(plan.max_tiles, a.phases() * ((pixel_tiles + strip_tiles - 1) / strip_tiles));
  const auto kernel = a.coarse.data ? mma_tiles<T, Tile, true> : mma_tiles<T, Tile>;
  return launch(kernel, blocks, mma_threads, mma_shared_bytes<T, Tile>(weight_chunks), stream, a, plan,
                static_cast<int>(strip_tiles), static_cast<int>(weight_chunks), visits_flat_rows(problem));
}

#define GROUPCONV_LAUNCH_PRODUCT(T)                                                                    \
  template <>                                                                                          \
  cudaError_t launch_product<T>(ProductKernel kernel, const ProductProblem& problem, const Plan& plan, \
                                cudaStream_t stream) {                                                 \
    if constexpr (sizeof(T) == sizeof(uint16_t)) {                                                     \
      const bool wgmma = kernel == ProductKernel::wgmma_64 || kernel == ProductKernel::wgmma_128;      \
      if (wgmma) return launch_wgmma<T>(kernel, problem, plan, stream);                                \
    }                                                                                                  \
    if constexpr (sizeof(T) <= sizeof(float)) {                                                        \
      if (kernel == ProductKernel::mma_wide) return launch_mma<T, WideMmaTile>(problem, plan, stream); \
      if (kernel == ProductKernel::mma_slim) return launch_mma<T, SlimMmaTile>(problem, plan, stream); \
    }                                                                                                  \
    return launch_fma<T>(kernel, problem, plan, stream);                                               \
  }

}  // namespace groupconv::cuda
