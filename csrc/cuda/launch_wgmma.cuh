// Launches the kernels of product_wgmma.cuh for one element type.
#pragma once

#include <algorithm>

#include "cuda/launch_product.cuh"
#include "cuda/product_wgmma.cuh"

namespace groupconv::cuda {

template <class T>
int64_t wgmma_pixel_tiles(const ProductArguments<T>& a) {
  return (a.positions() + wgmma_pixels - 1) / wgmma_pixels;
}

template <class T, int Rows>
cudaError_t launch_wgmma_strips(const ProductProblem& problem, const Plan& plan, int64_t strip_tiles,
                                cudaStream_t stream) {
  const ProductArguments<T> a = product_arguments<T>(problem);
  const int64_t pixel_tiles = wgmma_pixel_tiles(a);
  const int64_t blocks =
      blocks_for(plan.max_tiles, a.phases() * ((pixel_tiles + strip_tiles - 1) / strip_tiles));
  const auto kernel = a.source.stride_c == 1 ? wgmma_tiles<T, Rows, true> : wgmma_tiles<T, Rows, false>;
  return launch(kernel, blocks, wgmma_threads, wgmma_shared_bytes<Rows>(), stream, a, plan,
                static_cast<int>(strip_tiles), visits_flat_rows(problem));
}

template <class T, int Rows>
cudaError_t launch_wgmma_tiles(const ProductProblem& problem, const Plan& plan, cudaStream_t stream) {
  const ProductArguments<T> a = product_arguments<T>(problem);
  // A strip as long as leaves work for every multiprocessor of an H100, of one block each, twice.
  constexpr int64_t enough_blocks = 264, longest_strip = 32;
  const int64_t row_tiles = (a.dest.channels + Rows - 1) / Rows;
  const int64_t strip_tiles =
      std::clamp<int64_t>(wgmma_pixel_tiles(a) * a.phases() * row_tiles / enough_blocks, 1, longest_strip);
  return launch_wgmma_strips<T, Rows>(problem, plan, strip_tiles, stream);
}

#define GROUPCONV_LAUNCH_WGMMA(T)                                                                    \
  template <>                                                                                        \
  cudaError_t launch_wgmma<T>(ProductKernel kernel, const ProductProblem& problem, const Plan& plan, \
                              cudaStream_t stream) {                                                 \
    return kernel == ProductKernel::wgmma_128 ? launch_wgmma_tiles<T, 128>(problem, plan, stream)    \
                                              : launch_wgmma_tiles<T, 64>(problem, plan, stream);    \
  }

}  // namespace groupconv::cuda
