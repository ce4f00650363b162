// The element types, and what happens to a single element before and after a sum.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cmath>
#include <cstdint>
#include <type_traits>

#include "core/epilogue.h"
#include "core/problem.h"
#include "core/prologue.h"

namespace groupconv::cuda {

// Sums are float, of doubles double.
template <class T>
using Sum = std::conditional_t<std::is_same_v<T, double>, double, float>;

// Written so that a NaN passes through, as it does in torch.
template <class A>
__device__ A clamp(A x, A low, A high) {
  const A above = x < low ? low : x;
  return above > high ? high : above;
}

template <class A>
__device__ A activate(Activation activation, A x) {
  switch (activation) {
    case Activation::none: return x;
    case Activation::relu: return x < A(0) ? A(0) : x;
    case Activation::relu6: return clamp(x, A(0), A(6));
    case Activation::silu: return x / (A(1) + std::exp(-x));
    case Activation::hardswish: return x * clamp(x + A(3), A(0), A(6)) / A(6);
  }
  return x;
}

// Whether a clamp passed its input on, by its output; a NaN did.
template <class A>
__device__ bool passed(Activation activation, A output) {
  if (activation == Activation::none) return true;
  return !(output <= A(0)) && !(activation == Activation::relu6 && output >= A(6));
}

template <class A>
__device__ A prepare(const Prologue<A>& before, int64_t channel, A x) {
  if (before.scale == nullptr) return x;
  const A y = x * before.scale[channel] + before.shift[channel];
  return before.relu && y < A(0) ? A(0) : y;
}

template <class A>
__device__ bool is_finite(A x) {
  return x - x == A(0);
}

template <class T>
__device__ T not_a_number() {
  return static_cast<T>(nanf(""));
}

// A table that is no partition defines no result. NaN says so; memory left as it was would not.
template <class T>
__device__ void fill_with_nan(T* data, int64_t count) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
  int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  for (; i < count; i += step) data[i] = not_a_number<T>();
}

template <class T>
__device__ int64_t offset_of(const Image<T>& image, int64_t n, int64_t c, int64_t h, int64_t w) {
  return n * image.stride_n + c * image.stride_c + h * image.stride_h + w * image.stride_w;
}

}  // namespace groupconv::cuda
