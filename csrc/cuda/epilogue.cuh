// activation(x) for one element. Written so that a NaN passes through, as it does in torch.
#pragma once

#include <cmath>

#include "core/epilogue.h"

namespace groupconv::cuda {

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

}  // namespace groupconv::cuda
