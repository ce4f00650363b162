// Launches the kernels of whole_pixels.cuh for one element type.
#pragma once

#include <algorithm>

#include "cuda/launch_product.cuh"
#include "cuda/whole_pixels.cuh"

namespace groupconv::cuda {

template <class T>
cudaError_t launch_whole_pixels(const ProductChoice& choice, const ProductProblem& problem, const Plan& plan,
                                cudaStream_t stream);

template <class T, int Columns>
cudaError_t launch_whole_pixels_by(const WholePixelCut& cut, const ProductProblem& problem, const Plan& plan,
                                   cudaStream_t stream) {
  const ProductArguments<T> a = product_arguments<T>(problem);
  const WholePixelLayout layout(problem.plan, plan, problem.partition, sizeof(T));
  const int64_t tiles = blocks_for(plan.max_tiles, 1);
  if (const cudaError_t error =
          launch(lay_out_weights<T, Columns>, tiles, whole_pixel_threads, 0, stream, a, plan, layout);
      error != cudaSuccess) {
    return error;
  }
  const WholePixelSizes sizes = whole_pixel_sizes(problem.partition, plan, sizeof(T),
                                                  problem.residual.data != nullptr, problem.bias != nullptr);
  const WholePixelMemory memory(sizes, cut);
  const int64_t runs = a.phases() * ((a.positions() + cut.pixels - 1) / cut.pixels);
  return launch(whole_pixels<T, Columns>, std::min(runs, cut.blocks), whole_pixel_threads,
                static_cast<size_t>(memory.bytes), stream, a, plan, layout, memory, cut);
}

#define GROUPCONV_LAUNCH_WHOLE_PIXELS(T)                                                                \
  template <>                                                                                           \
  cudaError_t launch_whole_pixels<T>(const ProductChoice& choice, const ProductProblem& problem,        \
                                     const Plan& plan, cudaStream_t stream) {                           \
    return choice.partition.tile_rows == wide_tile_rows                                                 \
               ? launch_whole_pixels_by<T, wide_tile_rows / fragment_rows>(choice.cut, problem, plan,   \
                                                                           stream)                      \
               : launch_whole_pixels_by<T, narrow_tile_rows / fragment_rows>(choice.cut, problem, plan, \
                                                                             stream);                   \
  }

}  // namespace groupconv::cuda
