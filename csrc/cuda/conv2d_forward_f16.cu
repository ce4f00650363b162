#include <cuda_fp16.h>

#include "cuda/conv2d_forward.cuh"

namespace groupconv::cuda {

template cudaError_t launch_forward<__half>(const Conv2dForward&, const Plan&, bool, cudaStream_t);

}  // namespace groupconv::cuda
