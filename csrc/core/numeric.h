// What the kernels know about floating-point formats.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

namespace groupconv {

// Storage only: 16 bits that widen to a float32 by a shift and round to nearest even on the way back.
struct BFloat16 {
  uint16_t bits;
};

// An exponent of all ones, as infinities and NaN have it, carries into the sign when one is added.
template <class T>
bool all_finite(const T* values, int64_t count) {
  using Bits = std::conditional_t<sizeof(T) == 8, uint64_t, uint32_t>;
  constexpr int mantissa = sizeof(T) == 8 ? 52 : 23;
  constexpr Bits sign = Bits{1} << (8 * sizeof(T) - 1), least = Bits{1} << mantissa;
  constexpr Bits exponent = sign - least;
  Bits any = 0;
  for (int64_t i = 0; i < count; ++i) {
    Bits bits;
    std::memcpy(&bits, values + i, sizeof(T));
    any |= (bits & exponent) + least;
  }
  return (any & sign) == 0;
}

}  // namespace groupconv
