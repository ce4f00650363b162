// Launches the kernels of weight_grad_fma.cuh for one element type.
#pragma once

#include "cuda/channel_pass.cuh"
#include "cuda/launch.cuh"
#include "cuda/typed.cuh"
#include "cuda/weight_grad_fma.cuh"

namespace groupconv::cuda {

template <class T>
cudaError_t launch_weight_grad(const WeightGradChoice& choice, const WeightGradProblem& p, const Plan& plan,
                               cudaStream_t stream);

template <class T>
cudaError_t launch_weight_grad_fma(const WeightGradChoice& choice, const WeightGradProblem& p,
                                   const Plan& plan, cudaStream_t stream) {
  const WeightGradArguments<T> a{typed<const T>(p.grad),
                                 typed<const T>(p.input),
                                 static_cast<Sum<T>*>(p.partial),
                                 choice.partition.entries,
                                 choice.slices,
                                 vertical_axis(p.window, p.grad.height, p.input.height, false),
                                 horizontal_axis(p.window, p.grad.width, p.input.width, false),
                                 typed<T>(p.before)};
  cudaError_t error;
  if (choice.by_entry) {
    const int lanes = a.input.stride_c == 1 ? 1 : warp_lanes;
    const int64_t blocks =
        blocks_for(a.slices * a.area(), (a.entries * lanes + weight_grad_threads - 1) / weight_grad_threads);
    error = launch(weight_grad_entries<T>, blocks, weight_grad_threads, 0, stream, a, plan, lanes);
  } else {
    const int64_t blocks = blocks_for(plan.max_tiles, a.slices * a.area());
    error = launch(weight_grad_tiles<T>, blocks, weight_grad_threads, 0, stream, a, plan);
  }
  if (error != cudaSuccess) return error;
  const int64_t count = a.entries * a.area();
  return launch(add_slices<Sum<T>, T>, blocks_of_threads(count, pass_threads), pass_threads, 0, stream,
                a.partial, a.slices, count, static_cast<T*>(p.weight_grad), count);
}

#define GROUPCONV_LAUNCH_WEIGHT_GRAD(T)                                                               \
  template <>                                                                                         \
  cudaError_t launch_weight_grad<T>(const WeightGradChoice& choice, const WeightGradProblem& problem, \
                                    const Plan& plan, cudaStream_t stream) {                          \
    return launch_weight_grad_fma<T>(choice, problem, plan, stream);                                  \
  }

}  // namespace groupconv::cuda
