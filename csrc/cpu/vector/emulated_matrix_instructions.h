// The instructions of matrix registers in software, for tests: what uses them runs on every processor with vdpbf16ps and
// vpdpbusd, and the address sanitizer, which cannot look into instructions, sees all that is read and written.
#pragma once

#include <cstring>

#include "cpu/vector/vec.h"

namespace groupconv::cpu {
namespace {

struct EmulatedRegister {
  alignas(64) char rows[16][64];
  int64_t row_bytes, row_count;

  int32_t number(int64_t row, int64_t at) const {  // four bytes
    int32_t bits;
    std::memcpy(&bits, rows[row] + 4 * at, sizeof bits);
    return bits;
  }
};
thread_local EmulatedRegister emulated[8];

// Before they are configured, and when they were released, registers are empty.
void release_registers() { std::memset(emulated, 0, sizeof emulated); }
void configure_registers(const void* config) {
  release_registers();
  const auto* bytes = static_cast<const unsigned char*>(config);
  for (int r = 0; r < 8; ++r) {
    uint16_t row_bytes;
    std::memcpy(&row_bytes, bytes + 16 + 2 * r, sizeof row_bytes);
    emulated[r].row_bytes = row_bytes;
    emulated[r].row_count = bytes[48 + r];
  }
}

template <int Register>
void clear_register() {
  std::memset(emulated[Register].rows, 0, sizeof emulated[Register].rows);
}
template <int Register>
void load_register(const void* first_row, int64_t row_distance) {
  clear_register<Register>();
  EmulatedRegister& to = emulated[Register];
  const char* from = static_cast<const char*>(first_row);
  for (int64_t r = 0; r < to.row_count; ++r, from += row_distance)
    std::memcpy(to.rows[r], from, static_cast<size_t>(to.row_bytes));
}
template <int Register>
void store_register(void* first_row, int64_t row_distance) {
  const EmulatedRegister& from = emulated[Register];
  char* to = static_cast<char*>(first_row);
  for (int64_t r = 0; r < from.row_count; ++r, to += row_distance)
    std::memcpy(to, from.rows[r], static_cast<size_t>(from.row_bytes));
}

// step(16 sums, one number of a row of the left operand in every lane, a row of the right operand)
template <int Sum, int Left, int Right, class Step>
void multiply_emulated(const Step& step) {
  for (int64_t r = 0; r < emulated[Sum].row_count; ++r) {
    __m512i sums = _mm512_load_si512(emulated[Sum].rows[r]);
    for (int64_t k = 0; k < emulated[Left].row_bytes / 4; ++k) {
      sums = step(sums, _mm512_set1_epi32(emulated[Left].number(r, k)),
                  _mm512_load_si512(emulated[Right].rows[k]));
    }
    _mm512_store_si512(emulated[Sum].rows[r], sums);
  }
}
template <int Sum, int Left, int Right>
void multiply_registers() {
  multiply_emulated<Sum, Left, Right>([](__m512i sums, __m512i left, __m512i right) {
    return _mm512_castps_si512(_mm512_dpbf16_ps(_mm512_castsi512_ps(sums), (__m512bh)left, (__m512bh)right));
  });
}
template <int Sum, int Left, int Right>
void multiply_bytes() {
  multiply_emulated<Sum, Left, Right>(
      [](__m512i sums, __m512i left, __m512i right) { return _mm512_dpbusd_epi32(sums, left, right); });
}

}  // namespace
}  // namespace groupconv::cpu
