// The processor's matrix registers (AMX): eight of them, 16 rows of 64 bytes each.
//
// A product adds to a 16 × 16 block of float32 sums what 16 rows of 32 bfloat16 numbers and 32 rows of 16 make of
// each other, 8192 multiply-adds in the time of 16 vector instructions of 16:
//   sum[m][n] += Σ_k left[m][k] · right[k][n]
// left's row m holds its 32 numbers side by side; right's row k / 2 holds the pairs (k, k + 1) of 16 columns.
// Of bytes, with sums of int32, twice as many: 64 in a row of left, four of each column in a row of right.
#pragma once

#if defined(GROUPCONV_EMULATE_AMX)
#include "cpu/vector/emulated_matrix_instructions.h"
#else
#include "cpu/vector/matrix_instructions.h"
#endif

namespace groupconv::cpu {
namespace {

// The sides of a block of sums, and how many products a sum gets from one instruction.
constexpr int64_t block_rows = 16, block_cols = 16, block_depth = 32;
constexpr int64_t register_row_bytes = 64;
constexpr int64_t register_numbers = block_rows * block_depth;  // of an operand

GROUPCONV_INLINE int64_t round_up(int64_t count, int64_t unit) { return divide_up(count, unit) * unit; }

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
    configure_registers(&config);
  }
  ~MatrixRegisters() { release_registers(); }
  MatrixRegisters(const MatrixRegisters&) = delete;
};

}  // namespace
}  // namespace groupconv::cpu
