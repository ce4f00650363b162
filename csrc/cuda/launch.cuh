// How kernels are started: as many blocks as there is work, up to a bound beyond which blocks take several
// pieces each; an error of the launch itself comes back, nothing waits.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>
#include <type_traits>

namespace groupconv::cuda {

// The tests have few blocks, so that each takes several pieces.
#ifndef GROUPCONV_MOST_BLOCKS
#define GROUPCONV_MOST_BLOCKS (1 << 14)
#endif
constexpr int64_t most_blocks = GROUPCONV_MOST_BLOCKS;

// a · b, or most_blocks where that is more; the product itself may not fit.
inline int64_t blocks_for(int64_t a, int64_t b) {
  if (a <= 0 || b <= 0) return 1;
  return a > most_blocks / b ? most_blocks : a * b;
}
inline int64_t blocks_of_threads(int64_t items, int threads) {
  return blocks_for((items + threads - 1) / threads, 1);
}

// What a kernel may take without asking: 48 KiB in all, and no kernel here declares more than 32 of its own.
constexpr size_t modest_shared_bytes = 16 << 10;

// Lets a kernel take so much memory on the current device, for good: of threads that launch it at the same time
// none may take away what another has asked for.
cudaError_t allow_shared(const void* kernel, size_t bytes);

template <class... Parameters>
cudaError_t launch(void (*kernel)(Parameters...), int64_t blocks, int threads, size_t shared_bytes,
                   cudaStream_t stream, std::type_identity_t<Parameters>... arguments) {
  if (shared_bytes > modest_shared_bytes) {
    const cudaError_t error = allow_shared(reinterpret_cast<const void*>(kernel), shared_bytes);
    if (error != cudaSuccess) return error;
  }
  cudaLaunchConfig_t configuration{};
  configuration.gridDim = dim3(static_cast<unsigned>(blocks));
  configuration.blockDim = dim3(static_cast<unsigned>(threads));
  configuration.dynamicSmemBytes = shared_bytes;
  configuration.stream = stream;
  return cudaLaunchKernelEx(&configuration, kernel, arguments...);
}

}  // namespace groupconv::cuda
