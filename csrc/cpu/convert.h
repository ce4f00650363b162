// One element from the type it is stored in to the type it is computed in, and back.
#pragma once

#include <cstdint>
#include <cstring>

#include "core/numeric.h"
#include "cpu/vec.h"

namespace groupconv::cpu {
namespace {

template <class Stored>
struct ComputeType {
  using type = Stored;
};
template <>
struct ComputeType<BFloat16> {
  using type = float;
};
template <class Stored>
using compute_t = typename ComputeType<Stored>::type;

template <class T>
GROUPCONV_INLINE T widen(T x) {
  return x;
}
GROUPCONV_INLINE float widen(BFloat16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

template <class T>
GROUPCONV_INLINE void narrow(T x, T& stored) {
  stored = x;
}
// To nearest, ties to even; the carry of the increment may turn a finite number into infinity, as it
// should, and must not turn a NaN into one.
GROUPCONV_INLINE void narrow(float x, BFloat16& stored) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  stored.bits = static_cast<uint16_t>(x != x ? 0x7fc0 : rounded);
}

}  // namespace
}  // namespace groupconv::cpu
