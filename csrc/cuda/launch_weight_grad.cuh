// Launches the kernels of weight_grad_fma.cuh and weight_grad_mma.cuh for one element type.
#pragma once

#include "cuda/channel_pass.cuh"
#include "cuda/labels.cuh"
#include "cuda/launch.cuh"
#include "cuda/typed.cuh"
#include "cuda/weight_grad_fma.cuh"
#include "cuda/weight_grad_mma.cuh"

namespace groupconv::cuda {

template <class T>
cudaError_t launch_weight_grad(const WeightGradChoice& choice, const WeightGradProblem& p, const Plan& plan,
                               cudaStream_t stream);

// Neighbouring pixels of an image are neighbours in memory from row to row.
template <class T>
bool is_one_row(const Image<const T>& image) {
  return image.stride_w == 1 && image.flat();
}

template <class T, class Tile>
cudaError_t launch_weight_grad_mma(const WeightGradArguments<T>& a, const Window& w, const Plan& plan,
                                   cudaStream_t stream) {
  const bool same_pixels = w.area() == 1 && w.pad_top == 0 && w.pad_left == 0 && w.stride_h == 1 &&
                           w.stride_w == 1 && a.input.height == a.grad.height &&
                           a.input.width == a.grad.width;
  const int64_t blocks = blocks_for(plan.max_tiles, a.slices * a.area());
  return launch(weight_grad_mma<T, Tile>, blocks, weight_mma_threads, Tile::shared_bytes, stream, a, plan,
                is_one_row(a.grad), same_pixels && is_one_row(a.input));
}

template <class T>
cudaError_t launch_slices(WeightGradKernel kernel, const WeightGradArguments<T>& a, const Window& window,
                          const Plan& plan, cudaStream_t stream) {
  if constexpr (sizeof(T) <= sizeof(float)) {
    if (kernel == WeightGradKernel::mma_wide) {
      return launch_weight_grad_mma<T, WideWeightTile<T>>(a, window, plan, stream);
    }
    if (kernel == WeightGradKernel::mma_slim) {
      return launch_weight_grad_mma<T, SlimWeightTile<T>>(a, window, plan, stream);
    }
  }
  if (kernel == WeightGradKernel::tiles) {
    const int64_t blocks = blocks_for(plan.max_tiles, a.slices * a.area());
    return launch(weight_grad_tiles<T>, blocks, weight_grad_threads, 0, stream, a, plan);
  }
  const int lanes = a.input.stride_c == 1 ? 1 : warp_lanes;
  const int64_t blocks =
      blocks_for(a.slices * a.area(), (a.entries * lanes + weight_grad_threads - 1) / weight_grad_threads);
  return launch(weight_grad_entries<T>, blocks, weight_grad_threads, 0, stream, a, plan, lanes);
}

#define GROUPCONV_LAUNCH_WEIGHT_GRAD(T)                                                               \
  template <>                                                                                         \
  cudaError_t launch_weight_grad<T>(const WeightGradChoice& choice, const WeightGradProblem& problem, \
                                    const Plan& plan, cudaStream_t stream) {                          \
    return launch_and_add_slices<T>(choice, problem, plan, stream);                                   \
  }

template <class T>
cudaError_t launch_and_add_slices(const WeightGradChoice& choice, const WeightGradProblem& p,
                                  const Plan& plan, cudaStream_t stream) {
  const WeightGradArguments<T> a{typed<const T>(p.grad),
                                 typed<const T>(p.input),
                                 static_cast<Sum<T>*>(p.partial),
                                 p.size,
                                 choice.slices,
                                 p.in_labels ? choice.partition.in_channels : 0,
                                 vertical_axis(p.window, p.grad.height, p.input.height, false),
                                 horizontal_axis(p.window, p.grad.width, p.input.width, false),
                                 typed<T>(p.before)};
  const cudaError_t error = launch_slices(choice.kernel, a, p.window, plan, stream);
  if (error != cudaSuccess) return error;
  const int64_t count = a.entries * a.area();
  if (p.in_labels) {
    return launch(add_labelled_slices<Sum<T>, T>, blocks_of_threads(count, pass_threads), pass_threads, 0,
                  stream, a.partial, a.slices, static_cast<T*>(p.weight_grad), count,
                  {p.in_labels, p.out_labels, a.dense_columns, a.area()});
  }
  return launch(add_slices<Sum<T>, T>, blocks_of_threads(count, pass_threads), pass_threads, 0, stream,
                a.partial, a.slices, count, static_cast<T*>(p.weight_grad), count);
}

}  // namespace groupconv::cuda
