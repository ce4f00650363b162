// One dimension of the window: which pixels of the image that is read meet a pixel of the one that is written.
//
// Forward, output m meets input m · stride − pad + k · dilation through tap k. In the input gradient, input
// i meets output (i + pad − k · dilation) / stride where that division is exact; so the inputs fall into
// `stride` phases i mod stride, each with taps of its own, and within a phase the positions m = i div stride
// meet m + a constant per tap. A tile lies in one phase and visits only the taps that meet it.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>

#include "core/problem.h"

namespace groupconv::cuda {

struct Axis {
  int64_t size = 1, source_size = 1;  // pixels of the written image, of the image that is read
  int64_t kernel = 1, stride = 1, pad = 0, dilation = 1;
  bool transposed = false;

  __host__ __device__ int64_t phases() const {
    if (!transposed) return 1;
    return stride < size ? stride : size;
  }
  // How many pixels a phase has; phase 0 has most.
  __host__ __device__ int64_t positions(int64_t phase) const {
    return transposed ? (size - phase + stride - 1) / stride : size;
  }
  __host__ __device__ int64_t pixel(int64_t phase, int64_t position) const {
    return transposed ? position * stride + phase : position;
  }
  // Where a position meets its first source: the tap's shift is added.
  __host__ __device__ int64_t origin(int64_t position) const {
    return transposed ? position : position * stride;
  }
  __host__ __device__ bool tap_meets(int64_t phase, int64_t tap) const {
    return !transposed || (phase + pad - tap * dilation) % stride == 0;
  }
  __host__ __device__ int64_t tap_shift(int64_t phase, int64_t tap) const {
    return transposed ? (phase + pad - tap * dilation) / stride : tap * dilation - pad;
  }
  __host__ __device__ bool has_source(int64_t source) const { return source >= 0 && source < source_size; }
};

inline Axis vertical_axis(const Window& w, int64_t size, int64_t source_size, bool transposed) {
  return {size, source_size, w.kernel_h, w.stride_h, w.pad_top, w.dilation_h, transposed};
}
inline Axis horizontal_axis(const Window& w, int64_t size, int64_t source_size, bool transposed) {
  return {size, source_size, w.kernel_w, w.stride_w, w.pad_left, w.dilation_w, transposed};
}

}  // namespace groupconv::cuda
