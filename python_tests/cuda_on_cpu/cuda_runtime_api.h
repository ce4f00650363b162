// The host's side of cuda_runtime.h beside this.
#pragma once

#include <cstddef>
#include <map>

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1 };
enum cudaDeviceAttr { cudaDevAttrMaxSharedMemoryPerBlockOptin, cudaDevAttrMultiProcessorCount };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
using cudaStream_t = void*;

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  explicit dim3(unsigned x = 1) : x(x) {}
};

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
};

inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t) { return "an error"; }
namespace cuda_on_cpu {
inline bool hopper =
    false;  // an H100 with the kernels for sm_90a; else the smallest GPU that there is code for
// A block has 99 KiB on GPUs of compute capability 8.6 and 8.9, the smallest that the kernels run on, and 227 on
// an H100; those that ask for much declare up to 8, there 13, by themselves.
inline int shared_bytes_of_a_block() { return (hopper ? 227 - 13 : 99 - 8) << 10; }
// What kernels asked for that take more than 48 KiB, with the 32 at most that they declare; and how often one took
// back what it, or another thread, had been given.
constexpr int modest_bytes = (48 - 32) << 10;
inline std::map<const void*, int> shared_bytes_of_kernels;
inline int taken_back = 0;
}  // namespace cuda_on_cpu
inline cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute, int bytes) {
  if (bytes > cuda_on_cpu::shared_bytes_of_a_block()) return cudaErrorInvalidValue;
  int& given = cuda_on_cpu::shared_bytes_of_kernels[kernel];
  cuda_on_cpu::taken_back += bytes < given;
  given = bytes;
  return cudaSuccess;
}
// So few multiprocessors that a block that stays takes several pieces of work.
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  const bool count = attribute == cudaDevAttrMultiProcessorCount;
  *value = count ? 2 : cuda_on_cpu::shared_bytes_of_a_block();
  return cudaSuccess;
}
inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}

struct cudaFuncAttributes {
  int binaryVersion = 0;
  size_t sharedSizeBytes = 0;
};
inline cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void*) {
  *attributes = cuda_on_cpu::hopper ? cudaFuncAttributes{90, 12 << 10} : cudaFuncAttributes{80, 0};
  return cudaSuccess;
}
