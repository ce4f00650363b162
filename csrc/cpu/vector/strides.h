// Nine equally spaced places from one pointer. What an x86 address can hold is a pointer and one, two,
// four or eight times a register, so four registers reach all nine. A pointer for each would not fit the
// general registers; they would be kept in vector registers, and fetching one from there takes a
// multiplier's port.
#pragma once

#include "cpu/vector/vec.h"

namespace groupconv::cpu {
namespace {

struct Strides {
  int64_t one, three, five, seven;  // bytes

  explicit GROUPCONV_INLINE Strides(int64_t bytes)
      : one(bytes), three(3 * bytes), five(5 * bytes), seven(7 * bytes) {
    asm("" : "+r"(one), "+r"(three), "+r"(five), "+r"(seven));
  }
  template <class T>
  GROUPCONV_INLINE const T* at(const T* first, int index) const {
    const int64_t bytes[] = {0, one, 2 * one, three, 4 * one, five, 2 * three, seven, 8 * one};
    return reinterpret_cast<const T*>(reinterpret_cast<const char*>(first) + bytes[index]);
  }
};

}  // namespace
}  // namespace groupconv::cpu
