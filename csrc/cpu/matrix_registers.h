// The processor's matrix registers (AMX): eight of them, 16 rows of 64 bytes each.
//
// A product adds to a 16 × 16 block of float32 sums what 16 rows of 32 bfloat16 numbers and 32 rows of 16 make of
// each other, 8192 multiply-adds in the time of 16 vector instructions of 16:
//   sum[m][n] += Σ_k left[m][k] · right[k][n]
// left's row m holds its 32 numbers side by side; right's row k / 2 holds the pairs (k, k + 1) of 16 columns.
// Of bytes, with sums of int32, twice as many: 64 in a row of left, four of each column in a row of right.
//
// Written as instructions, since the compiler's own functions for them promise nothing about the memory that they
// read and write.
#pragma once

#include "cpu/vec.h"

namespace groupconv::cpu {
namespace {

// The sides of a block of sums, and how many products a sum gets from one instruction.
constexpr int64_t block_rows = 16, block_cols = 16, block_depth = 32;
constexpr int64_t register_row_bytes = 64;
constexpr int64_t register_numbers = block_rows * block_depth;  // of an operand

// For as long as it lives the calling thread has matrix registers: sums in 0 to 3, left operands in 4 and 5, right
// ones in 6 and 7. All of full size, unless sums have fewer rows, or left operands fewer bytes in a row.
class MatrixRegisters {
 public:
  explicit MatrixRegisters(int64_t rows = block_rows, int64_t depth_bytes = register_row_bytes) {
    struct {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {};
      uint8_t rows[16] = {};
    } config;
    static_assert(sizeof config == 64);
    for (int r = 0; r < 8; ++r) {
      const bool left = r == 4 || r == 5, right = r >= 6;
      config.row_bytes[r] = static_cast<uint16_t>(left ? depth_bytes : register_row_bytes);
      config.rows[r] = static_cast<uint8_t>(right ? depth_bytes / 4 : rows);
    }
    asm volatile("ldtilecfg %0" : : "m"(config));
  }
  ~MatrixRegisters() { asm volatile("tilerelease"); }
  MatrixRegisters(const MatrixRegisters&) = delete;
};

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
