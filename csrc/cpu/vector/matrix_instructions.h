// The instructions of the matrix registers (matrix_registers.h), one function each. Written as instructions, since the
// compiler's own functions for them promise nothing about the memory that they read and write.
#pragma once

#include "cpu/vector/vec.h"

namespace groupconv::cpu {
namespace {

// 64 bytes: palette, first row, 14 of nothing; 16 lengths of rows in bytes, two bytes each; 16 numbers of rows.
GROUPCONV_INLINE void configure_registers(const void* config) {
  asm volatile("ldtilecfg (%0)" : : "r"(config) : "memory");
}
GROUPCONV_INLINE void release_registers() { asm volatile("tilerelease"); }

template <int Register>
GROUPCONV_INLINE void clear_register() {
  asm volatile("tilezero %%tmm%c0" : : "i"(Register));
}
template <int Register>
GROUPCONV_INLINE void load_register(const void* first_row, int64_t row_distance) {
  asm volatile("tileloadd (%1,%2,1), %%tmm%c0"
               :
               : "i"(Register), "r"(first_row), "r"(row_distance)
               : "memory");
}
template <int Register>
GROUPCONV_INLINE void store_register(void* first_row, int64_t row_distance) {
  asm volatile("tilestored %%tmm%c0, (%1,%2,1)"
               :
               : "i"(Register), "r"(first_row), "r"(row_distance)
               : "memory");
}
template <int Sum, int Left, int Right>
GROUPCONV_INLINE void multiply_registers() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(Sum), "i"(Left), "i"(Right));
}
// uint8 on the left, int8 on the right, int32 sums that wrap around.
template <int Sum, int Left, int Right>
GROUPCONV_INLINE void multiply_bytes() {
  asm volatile("tdpbusd %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(Sum), "i"(Left), "i"(Right));
}

}  // namespace
}  // namespace groupconv::cpu
