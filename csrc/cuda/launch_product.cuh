// Launches the kernels of product_fma.cuh for one element type.
#pragma once

#include "cuda/launch.cuh"
#include "cuda/product_fma.cuh"
#include "cuda/typed.cuh"

namespace groupconv::cuda {

template <class T>
ProductArguments<T> product_arguments(const ProductProblem& p) {
  const bool transposed = p.partition.transposed;
  return {typed<const T>(p.source),
          typed<T>(p.dest),
          typed<const T>(p.residual),
          static_cast<const T*>(p.weight),
          static_cast<const T*>(p.bias),
          vertical_axis(p.window, p.dest.height, p.source.height, transposed),
          horizontal_axis(p.window, p.dest.width, p.source.width, transposed),
          typed<T>(p.before),
          p.activation,
          transposed};
}

template <class T>
cudaError_t launch_product(ProductKernel kernel, const ProductProblem& problem, const Plan& plan,
                           cudaStream_t stream);

#define GROUPCONV_LAUNCH_PRODUCT(T)                                                                    \
  template <>                                                                                          \
  cudaError_t launch_product<T>(ProductKernel kernel, const ProductProblem& problem, const Plan& plan, \
                                cudaStream_t stream) {                                                 \
    return launch_fma<T>(kernel, problem, plan, stream);                                               \
  }

template <class T>
cudaError_t launch_fma(ProductKernel kernel, const ProductProblem& problem, const Plan& plan,
                       cudaStream_t stream) {
  const ProductArguments<T> a = product_arguments<T>(problem);
  const auto pixel_tiles = [&](int64_t pixels) {
    return a.phases() * ((a.positions() + pixels - 1) / pixels);
  };
  switch (kernel) {
    case ProductKernel::pixels: {
      const int64_t blocks = blocks_for(a.dest.channels, pixel_tiles(product_threads));
      return launch(fma_pixels<T>, blocks, product_threads, 0, stream, a, plan);
    }
    case ProductKernel::narrow: {
      const int64_t blocks = blocks_for(plan.max_tiles, pixel_tiles(NarrowTile::pixels));
      return launch(fma_tiles<T, NarrowTile>, blocks, product_threads, 0, stream, a, plan);
    }
    case ProductKernel::wide: {
      const int64_t blocks = blocks_for(plan.max_tiles, pixel_tiles(WideTile::pixels));
      return launch(fma_tiles<T, WideTile>, blocks, product_threads, 0, stream, a, plan);
    }
  }
  return cudaErrorInvalidValue;
}

}  // namespace groupconv::cuda
