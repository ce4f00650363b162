// bfloat16 multiplied as it is stored: vdpbf16ps multiplies two vectors of bfloat16 and adds neighbouring
// products to float32 sums, two multiply-adds for each sum.
//
// Operand types, beside those that are computed in themselves:
//   Pair<BFloat16>  two channels of a pixel, or their weights (multiply_rows, multiply_pixels)
//   BFloat16        a pixel of a row as it lies in the image; two of them add to a sum (correlate_rows)
#pragma once

#include "cpu/vector/convert.h"
#include "cpu/vector/vec.h"

namespace groupconv::cpu {
namespace {

template <class Stored>
struct Pair {
  Stored first, second;
};

// What products of operands are summed in.
template <class Operand>
struct SumType {
  using type = Operand;
};
template <>
struct SumType<BFloat16> {
  using type = float;
};
template <class Stored>
struct SumType<Pair<Stored>> : SumType<Stored> {};
template <class Operand>
using sum_t = typename SumType<Operand>::type;

// How many channels an operand holds.
template <class Operand>
constexpr int64_t channels_in = 1;
template <class Stored>
constexpr int64_t channels_in<Pair<Stored>> = 2;

template <class Operand>
GROUPCONV_INLINE int64_t operands_for(int64_t channels) {
  return divide_up(channels, channels_in<Operand>);
}

#if defined(__AVX512BF16__)

template <class Stored>
constexpr bool multiplies_stored = __is_same(Stored, BFloat16);

// The sixteen or thirty-two bfloat16 numbers of a register.
struct Words {
  __m512i v;

  friend GROUPCONV_INLINE Vec<float> multiply_add(Words a, Words b, Vec<float> sum) {
    __m512bh x, y;
    __builtin_memcpy(&x, &a.v, sizeof x);
    __builtin_memcpy(&y, &b.v, sizeof y);
    return {_mm512_dpbf16_ps(sum.v, x, y)};
  }
};

template <>
struct Vec<BFloat16> : Words {
  static constexpr int lanes = 32;
  using Mask = __mmask32;

  static GROUPCONV_INLINE Mask first(int64_t n) { return static_cast<Mask>((uint64_t{1} << n) - 1); }
  static GROUPCONV_INLINE Mask all() { return first(lanes); }
  static GROUPCONV_INLINE Mask from_bits(uint32_t bits) { return static_cast<Mask>(bits); }
  static GROUPCONV_INLINE Vec load(const BFloat16* p) { return {_mm512_loadu_si512(p)}; }
  static GROUPCONV_INLINE Vec load(const BFloat16* p, Mask m) { return {_mm512_maskz_loadu_epi16(m, p)}; }
  GROUPCONV_INLINE void store(BFloat16* p, Mask m) const { _mm512_mask_storeu_epi16(p, m, v); }
  static GROUPCONV_INLINE Vec nothing() { return {_mm512_setzero_si512()}; }
  static GROUPCONV_INLINE Vec load_index(const uint16_t* p) { return {_mm512_loadu_si512(p)}; }
  // Lane i takes lane index[i] of x where the mask is set, and keeps its own elsewhere.
  friend GROUPCONV_INLINE Vec merge_permuted(Vec own, Mask m, Vec index, Vec x) {
    return {_mm512_mask_permutexvar_epi16(own.v, m, index.v, x.v)};
  }
};

template <>
struct Vec<Pair<BFloat16>> : Words {
  static constexpr int lanes = 16;
  using Mask = __mmask16;

  static GROUPCONV_INLINE Mask first(int64_t n) { return Vec<float>::first(n); }
  static GROUPCONV_INLINE Mask all() { return first(lanes); }
  static GROUPCONV_INLINE uint32_t bits(Mask m) { return m; }
  static GROUPCONV_INLINE Vec broadcast(const Pair<BFloat16>& x) {
    int bits;
    __builtin_memcpy(&bits, &x, sizeof bits);
    return {_mm512_set1_epi32(bits)};
  }
  static GROUPCONV_INLINE Vec load(const Pair<BFloat16>* p) { return {_mm512_loadu_si512(p)}; }
  static GROUPCONV_INLINE Vec load(const Pair<BFloat16>* p, Mask m) {
    return {_mm512_maskz_loadu_epi32(m, p)};
  }
  // Pairs of a number of either row; zero stands for the row that is not there.
  static GROUPCONV_INLINE Vec interleave(const BFloat16* row, const BFloat16* partner, Mask m) {
    const __m512i first = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(m, row));
    if (!partner) return {first};
    const __m512i second = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(m, partner));
    return {_mm512_or_si512(first, _mm512_slli_epi32(second, 16))};
  }
  // The same of two vectors' numbers of either row: one permutation for a vector of pairs.
  static GROUPCONV_INLINE void interleave_two(const BFloat16* row, const BFloat16* partner, Vec (&pairs)[2]) {
    const __m512i low = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7,
                                         38, 6, 37, 5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
    const __m512i high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
    const __m512i first = _mm512_loadu_si512(row), second = _mm512_loadu_si512(partner);
    pairs[0].v = _mm512_permutex2var_epi16(first, low, second);
    pairs[1].v = _mm512_permutex2var_epi16(first, high, second);
  }
  // Of numbers that were widened, as weights are.
  static GROUPCONV_INLINE Vec interleave(const float* row, const float* partner, Mask m) {
    const __m512i first = _mm512_srli_epi32(_mm512_maskz_loadu_epi32(m, row), 16);
    if (!partner) return {first};
    const __m512i second = _mm512_maskz_loadu_epi32(m, partner);
    return {_mm512_or_si512(first, _mm512_andnot_si512(_mm512_set1_epi32(0xffff), second))};
  }
  static GROUPCONV_INLINE Mask from_bits(uint32_t bits) { return static_cast<Mask>(bits); }
  // The first lanes to where the mask is set, zero elsewhere.
  friend GROUPCONV_INLINE Vec expand(Vec x, uint32_t bits) {
    return {_mm512_maskz_expand_epi32(static_cast<Mask>(bits), x.v)};
  }
  GROUPCONV_INLINE void store(Pair<BFloat16>* p) const { _mm512_storeu_si512(p, v); }
  GROUPCONV_INLINE void store(Pair<BFloat16>* p, Mask m) const { _mm512_mask_storeu_epi32(p, m, v); }
};

#else

template <class Stored>
constexpr bool multiplies_stored = false;

#endif

}  // namespace
}  // namespace groupconv::cpu
