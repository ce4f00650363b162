#include "cuda/launch_wgmma.cuh"

namespace groupconv::cuda {

GROUPCONV_LAUNCH_WGMMA(__half)

// The body of a kernel that was compiled for another architecture is empty, and uses no shared memory.
bool has_wgmma() {
  cudaFuncAttributes attributes;
  const auto kernel = reinterpret_cast<const void*>(wgmma_tiles<__half, 64, true>);
  if (cudaFuncGetAttributes(&attributes, kernel) != cudaSuccess) {
    cudaGetLastError();  // an answer like any other, not an error of the next launch
    return false;
  }
  return attributes.binaryVersion == 90 && attributes.sharedSizeBytes > 0;
}

}  // namespace groupconv::cuda
