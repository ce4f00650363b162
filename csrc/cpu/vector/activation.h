// Activations, one element at a time in branch-free code that the compiler turns into vectors.
#pragma once

#include <cmath>
#include <cstring>
#include <limits>

#include "core/epilogue.h"
#include "cpu/vector/vec.h"

namespace groupconv::cpu {
namespace {

template <class T>
struct ClampRange {
  T low, high;
};

// relu and relu6 as bounds; no activation as bounds that nothing exceeds.
template <class T>
GROUPCONV_INLINE ClampRange<T> clamp_range(Activation activation) {
  constexpr T infinity = std::numeric_limits<T>::infinity();
  return {activation == Activation::none ? -infinity : T(0),
          activation == Activation::relu6 ? T(6) : infinity};
}

GROUPCONV_INLINE double exponential(double x) { return std::exp(x); }

// exp(x) = 2^n · e^r, n = round(x / ln 2), |r| ≤ ln 2 / 2. Adding 1.5 · 2^23 leaves n in the low bits of
// the sum, so no rounding instruction is needed. Relative error below 2e-7 where the result is normal;
// 0 below and infinity above the range of normal numbers.
GROUPCONV_INLINE float exponential(float x) {
  constexpr float magic = 12582912.0f;
  const float shifted = x * 1.44269504f + magic;
  const float n = shifted - magic;
  const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  float p = 1.0f / 5040.0f;
  p = p * r + 1.0f / 720.0f;
  p = p * r + 1.0f / 120.0f;
  p = p * r + 1.0f / 24.0f;
  p = p * r + 1.0f / 6.0f;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  uint32_t bits;
  std::memcpy(&bits, &shifted, sizeof bits);
  bits = (bits + 127u) << 23;
  float scale;
  std::memcpy(&scale, &bits, sizeof scale);
  const float value = p * scale;
  const float low = x < -87.3f ? 0.0f : value;
  return x > 88.3f ? std::numeric_limits<float>::infinity() : low;
}

template <class T>
GROUPCONV_INLINE T silu(T x) {
  return x / (T(1) + exponential(-x));
}

template <class T>
GROUPCONV_INLINE T hardswish(T x) {
  const T shifted = x + T(3);
  const T above = shifted < T(0) ? T(0) : shifted;
  const T gate = above > T(6) ? T(6) : above;
  return x * gate / T(6);
}

template <class T>
GROUPCONV_INLINE T activate(Activation activation, T x, ClampRange<T> range) {
  if (activation == Activation::silu) return silu(x);
  if (activation == Activation::hardswish) return hardswish(x);
  const T above = x < range.low ? range.low : x;  // false for NaN, which passes through
  return above > range.high ? range.high : above;
}

}  // namespace
}  // namespace groupconv::cpu
