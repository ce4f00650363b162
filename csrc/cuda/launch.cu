// What launches have in common on the host.
#include <map>
#include <mutex>
#include <utility>

#include "cuda/launch.cuh"

namespace groupconv::cuda {

cudaError_t allow_shared(const void* kernel, size_t bytes) {
  static std::mutex one_at_a_time;
  static std::map<std::pair<int, const void*>, size_t> allowed;
  int device = 0;
  if (const cudaError_t error = cudaGetDevice(&device); error != cudaSuccess) return error;
  const std::lock_guard lock(one_at_a_time);
  size_t& most = allowed[{device, kernel}];
  if (bytes <= most) return cudaSuccess;
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes));
  if (error == cudaSuccess) most = bytes;
  return error;
}

}  // namespace groupconv::cuda
