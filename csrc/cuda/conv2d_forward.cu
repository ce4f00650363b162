// The entry point of the forward convolution: makes the plan, then hands over to the element type.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>

#include "cuda/conv2d_forward.cuh"
#include "cuda/plan.cuh"

namespace groupconv::cuda {

extern template cudaError_t launch_forward<float>(const Conv2dForward&, const Plan&, bool, cudaStream_t);
extern template cudaError_t launch_forward<double>(const Conv2dForward&, const Plan&, bool, cudaStream_t);
extern template cudaError_t launch_forward<__half>(const Conv2dForward&, const Plan&, bool, cudaStream_t);
extern template cudaError_t launch_forward<__nv_bfloat16>(const Conv2dForward&, const Plan&, bool,
                                                          cudaStream_t);

namespace {

// A guess at the outputs of a group, to choose a tile by. It may be wrong (the number of groups is on the
// device; here every input is taken to be read once); every tile gives the same result.
bool has_small_groups(const Conv2dForward& f) {
  const int64_t offsets = f.table_length - 6 - f.input.channels - f.output.channels;
  return f.output.channels <= 8 * std::max<int64_t>(1, offsets / 2);
}

}  // namespace

int64_t plan_words(int64_t table_length, int64_t out_channels) {
  return Plan(nullptr, table_length, out_channels).words();
}

cudaError_t conv2d_forward(Element element, const Conv2dForward& f, int device, cudaStream_t stream) {
  // The static runtime has a current device of its own beside the one of torch's runtime.
  if (const cudaError_t error = cudaSetDevice(device); error != cudaSuccess) return error;
  const bool narrow = has_small_groups(f);
  const Plan plan(f.plan, f.table_length, f.output.channels);
  const PlanProblem problem{f.table,          f.table_length,
                            f.input.channels, f.output.channels,
                            f.entries,        narrow ? NarrowTile::outputs : WideTile::outputs};
  make_plan<<<1, plan_threads, 0, stream>>>(problem, plan);
  if (const cudaError_t error = cudaGetLastError(); error != cudaSuccess) return error;
  switch (element) {
    case Element::f32: return launch_forward<float>(f, plan, narrow, stream);
    case Element::f64: return launch_forward<double>(f, plan, narrow, stream);
    case Element::f16: return launch_forward<__half>(f, plan, narrow, stream);
    case Element::bf16: return launch_forward<__nv_bfloat16>(f, plan, narrow, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace groupconv::cuda
