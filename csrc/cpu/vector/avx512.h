// Vectors of AVX-512, for vec.h.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "core/inline.h"
#include "core/numeric.h"

namespace groupconv::cpu {
namespace {

template <class T>
struct Vec;

constexpr int vector_registers = 32;
constexpr bool has_compress = true, has_mask_registers = true;

template <>
struct Vec<float> {
  static constexpr int lanes = 16;
  using Mask = __mmask16;
  __m512 v;

  static GROUPCONV_INLINE Mask first(int64_t n) { return static_cast<Mask>((1u << n) - 1); }
  static GROUPCONV_INLINE Mask all() { return first(lanes); }
  static GROUPCONV_INLINE Mask from_bits(uint32_t bits) { return static_cast<Mask>(bits); }
  static GROUPCONV_INLINE uint32_t bits(Mask m) { return m; }
  static GROUPCONV_INLINE Vec broadcast(float x) { return {_mm512_set1_ps(x)}; }
  static GROUPCONV_INLINE Vec load(const float* p) { return {_mm512_loadu_ps(p)}; }
  static GROUPCONV_INLINE Vec load(const float* p, Mask m) { return {_mm512_maskz_loadu_ps(m, p)}; }
  // Lanes p[index[0]], p[index[1]], …, zero where masked out. All of `index` is read, whatever the mask.
  static GROUPCONV_INLINE Vec gather(const float* p, const int32_t* index, Mask m) {
    return {_mm512_mask_i32gather_ps(_mm512_setzero_ps(), m, _mm512_loadu_si512(index), p, 4)};
  }
  using Index = __m512i;
  static GROUPCONV_INLINE Index load_index(const int32_t* p) { return _mm512_loadu_si512(p); }
  // Lane i takes lane index[i]; zero where masked out.
  friend GROUPCONV_INLINE Vec permute(Vec x, Index index, Mask m) {
    return {_mm512_maskz_permutexvar_ps(m, index, x.v)};
  }
  GROUPCONV_INLINE void store(float* p) const { _mm512_storeu_ps(p, v); }
  // Past the caches, to a whole line.
  GROUPCONV_INLINE void stream(float* p) const { _mm512_stream_ps(p, v); }
  GROUPCONV_INLINE void store(float* p, Mask m) const { _mm512_mask_storeu_ps(p, m, v); }
  // bfloat16 numbers, widened and rounded on the way.
  static GROUPCONV_INLINE Vec load(const BFloat16* p) { return widened(_mm256_loadu_si256(as_words(p))); }
  static GROUPCONV_INLINE Vec load(const BFloat16* p, Mask m) {
    return widened(_mm256_maskz_loadu_epi16(m, p));
  }
  GROUPCONV_INLINE void store(BFloat16* p) const {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), rounded());
  }
  GROUPCONV_INLINE void store(BFloat16* p, Mask m) const { _mm256_mask_storeu_epi16(p, m, rounded()); }
  // Elements 0, 2, 4, … of those that exist, of which there are twice as many as lanes.
  static GROUPCONV_INLINE Vec load_even(const BFloat16* p, uint32_t exists) {
    return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_maskz_loadu_epi16(exists, p), 16))};
  }
  // p[index - 1] is read with every element but the first, and p[1] with that one.
  static GROUPCONV_INLINE Vec gather(const BFloat16* p, const int32_t* index, Mask m) {
    const __m512i at = _mm512_loadu_si512(index), one = _mm512_set1_epi32(1);
    const __m512i before = _mm512_sub_epi32(_mm512_max_epi32(at, one), one);
    const __m512i pairs = _mm512_mask_i32gather_epi32(_mm512_setzero_si512(), m, before, p, 2);
    const __m512i words = _mm512_mask_slli_epi32(pairs, _mm512_testn_epi32_mask(at, at), pairs, 16);
    return {_mm512_castsi512_ps(_mm512_and_si512(words, _mm512_set1_epi32(static_cast<int>(0xffff0000u))))};
  }
  GROUPCONV_INLINE float sum() const { return _mm512_reduce_add_ps(v); }
  friend GROUPCONV_INLINE Vec operator+(Vec a, Vec b) { return {_mm512_add_ps(a.v, b.v)}; }
  friend GROUPCONV_INLINE Vec operator*(Vec a, Vec b) { return {_mm512_mul_ps(a.v, b.v)}; }
  friend GROUPCONV_INLINE Vec multiply_add(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
  // Zero where the mask is not set.
  friend GROUPCONV_INLINE Vec only(Vec x, Mask m) { return {_mm512_maskz_mov_ps(m, x.v)}; }
  // The lanes whose bits are set next to each other from the first on, and back. What is elsewhere is zero after
  // expand(), anything after compress().
  friend GROUPCONV_INLINE Vec compress(Vec x, uint32_t bits) {
    return {_mm512_maskz_compress_ps(from_bits(bits), x.v)};
  }
  friend GROUPCONV_INLINE Vec expand(Vec x, uint32_t bits) {
    return {_mm512_maskz_expand_ps(from_bits(bits), x.v)};
  }
  // Elements 0, 2, 4, … of the two together.
  friend GROUPCONV_INLINE Vec even(Vec a, Vec b) {
    const __m512i index = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    return {_mm512_permutex2var_ps(a.v, index, b.v)};
  }
  // min and max return their second operand when either is NaN: put the bound first, and NaN survives.
  friend GROUPCONV_INLINE Vec clamp(Vec low, Vec high, Vec x) {
    return {_mm512_min_ps(high.v, _mm512_max_ps(low.v, x.v))};
  }
  // x where low < y < high or they cannot be compared, zero elsewhere.
  friend GROUPCONV_INLINE Vec between(Vec low, Vec high, Vec y, Vec x) {
    const Mask above = _mm512_cmp_ps_mask(y.v, low.v, _CMP_NLE_UQ);
    return {_mm512_maskz_mov_ps(_mm512_mask_cmp_ps_mask(above, y.v, high.v, _CMP_NGE_UQ), x.v)};
  }
  friend GROUPCONV_INLINE Vec at_least(Vec low, Vec x) { return {_mm512_max_ps(low.v, x.v)}; }

  static GROUPCONV_INLINE Vec widened(__m256i words) {
    return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(words), 16))};
  }
  // To nearest, ties to even, as narrow() does it one by one.
  GROUPCONV_INLINE __m256i rounded() const {
#if defined(__AVX512BF16__)
    const __m256bh words = _mm512_cvtneps_pbh(v);  // and denormals to zero
    __m256i bits;
    __builtin_memcpy(&bits, &words, sizeof bits);
    return bits;
#else
    const __m512i bits = _mm512_castps_si512(v), high = _mm512_srli_epi32(bits, 16);
    const __m512i odd = _mm512_and_si512(high, _mm512_set1_epi32(1));
    const __m512i carried = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
    const __m512i words = _mm512_srli_epi32(carried, 16);
    const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    return _mm512_cvtepi32_epi16(_mm512_mask_mov_epi32(words, nan, _mm512_set1_epi32(0x7fc0)));
#endif
  }

 private:
  static GROUPCONV_INLINE const __m256i* as_words(const BFloat16* p) {
    return reinterpret_cast<const __m256i*>(p);
  }
};

template <>
struct Vec<double> {
  static constexpr int lanes = 8;
  using Mask = __mmask8;
  __m512d v;

  static GROUPCONV_INLINE Mask first(int64_t n) { return static_cast<Mask>((1u << n) - 1); }
  static GROUPCONV_INLINE Mask all() { return first(lanes); }
  static GROUPCONV_INLINE Mask from_bits(uint32_t bits) { return static_cast<Mask>(bits); }
  static GROUPCONV_INLINE uint32_t bits(Mask m) { return m; }
  static GROUPCONV_INLINE Vec broadcast(double x) { return {_mm512_set1_pd(x)}; }
  static GROUPCONV_INLINE Vec load(const double* p) { return {_mm512_loadu_pd(p)}; }
  static GROUPCONV_INLINE Vec load(const double* p, Mask m) { return {_mm512_maskz_loadu_pd(m, p)}; }
  static GROUPCONV_INLINE Vec gather(const double* p, const int32_t* index, Mask m) {
    return {_mm512_mask_i32gather_pd(_mm512_setzero_pd(), m,
                                     _mm256_loadu_si256(reinterpret_cast<const __m256i*>(index)), p, 8)};
  }
  GROUPCONV_INLINE void store(double* p) const { _mm512_storeu_pd(p, v); }
  // Past the caches, to a whole line.
  GROUPCONV_INLINE void stream(double* p) const { _mm512_stream_pd(p, v); }
  GROUPCONV_INLINE void store(double* p, Mask m) const { _mm512_mask_storeu_pd(p, m, v); }
  GROUPCONV_INLINE double sum() const { return _mm512_reduce_add_pd(v); }
  friend GROUPCONV_INLINE Vec operator+(Vec a, Vec b) { return {_mm512_add_pd(a.v, b.v)}; }
  friend GROUPCONV_INLINE Vec operator*(Vec a, Vec b) { return {_mm512_mul_pd(a.v, b.v)}; }
  friend GROUPCONV_INLINE Vec multiply_add(Vec a, Vec b, Vec c) { return {_mm512_fmadd_pd(a.v, b.v, c.v)}; }
  friend GROUPCONV_INLINE Vec only(Vec x, Mask m) { return {_mm512_maskz_mov_pd(m, x.v)}; }
  friend GROUPCONV_INLINE Vec compress(Vec x, uint32_t bits) {
    return {_mm512_maskz_compress_pd(from_bits(bits), x.v)};
  }
  friend GROUPCONV_INLINE Vec expand(Vec x, uint32_t bits) {
    return {_mm512_maskz_expand_pd(from_bits(bits), x.v)};
  }
  friend GROUPCONV_INLINE Vec even(Vec a, Vec b) {
    return {_mm512_permutex2var_pd(a.v, _mm512_setr_epi64(0, 2, 4, 6, 8, 10, 12, 14), b.v)};
  }
  friend GROUPCONV_INLINE Vec clamp(Vec low, Vec high, Vec x) {
    return {_mm512_min_pd(high.v, _mm512_max_pd(low.v, x.v))};
  }
  friend GROUPCONV_INLINE Vec between(Vec low, Vec high, Vec y, Vec x) {
    const Mask above = _mm512_cmp_pd_mask(y.v, low.v, _CMP_NLE_UQ);
    return {_mm512_maskz_mov_pd(_mm512_mask_cmp_pd_mask(above, y.v, high.v, _CMP_NGE_UQ), x.v)};
  }
  friend GROUPCONV_INLINE Vec at_least(Vec low, Vec x) { return {_mm512_max_pd(low.v, x.v)}; }
};

GROUPCONV_INLINE Vec<float> add_where(Vec<float> sum, Vec<float> x, Vec<float>::Mask mask) {
  return {_mm512_mask_add_ps(sum.v, mask, sum.v, x.v)};
}
GROUPCONV_INLINE Vec<double> add_where(Vec<double> sum, Vec<double> x, Vec<double>::Mask mask) {
  return {_mm512_mask_add_pd(sum.v, mask, sum.v, x.v)};
}

GROUPCONV_INLINE void store_every_second(Vec<float> x, BFloat16* to, int64_t count) {
  const auto spaced = static_cast<__mmask32>(0x55555555u & ((uint64_t{1} << 2 * count) - 1));
  _mm512_mask_storeu_epi16(to, spaced, _mm512_cvtepu16_epi32(x.rounded()));
}

template <class T>
GROUPCONV_INLINE void pin(Vec<T>& x) {
  asm("" : "+v"(x.v));
}

// The sums of either half of eight vectors, in quarters: the lower halves' sums 0 … 3, the upper halves', then 4 … 7 of
// both.
GROUPCONV_INLINE __m512 sum_eight_halves(const Vec<float>* sums) {
  __m512 pairs[4], quads[2];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const __m512 a = sums[2 * i].v, b = sums[2 * i + 1].v;
    pairs[i] = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
  }
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) {
    const __m512d a = _mm512_castps_pd(pairs[2 * i]), b = _mm512_castps_pd(pairs[2 * i + 1]);
    quads[i] =
        _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(a, b)), _mm512_castpd_ps(_mm512_unpackhi_pd(a, b)));
  }
  // Each quarter of quads[i] now holds a part of the sums 4i … 4i + 3.
  return _mm512_add_ps(_mm512_shuffle_f32x4(quads[0], quads[1], 0x88),
                       _mm512_shuffle_f32x4(quads[0], quads[1], 0xdd));
}
GROUPCONV_INLINE void sum_eight(const Vec<float>* sums, float* out) {
  const __m512 halves = sum_eight_halves(sums);
  const __m512 total = _mm512_add_ps(halves, _mm512_shuffle_f32x4(halves, halves, 0xb1));
  _mm_storeu_ps(out, _mm512_castps512_ps128(total));
  _mm_storeu_ps(out + 4, _mm512_extractf32x4_ps(total, 2));
}

// The sums of the lower and of the upper lanes.
template <int Count>
GROUPCONV_INLINE void sum_each_half(const Vec<float>* sums, float* lower, float* upper) {
  constexpr int whole = Count / 8 * 8;
#pragma GCC unroll 4
  for (int i = 0; i < whole; i += 8) {
    const __m512 halves = sum_eight_halves(sums + i);
    _mm_storeu_ps(lower + i, _mm512_castps512_ps128(halves));
    _mm_storeu_ps(upper + i, _mm512_extractf32x4_ps(halves, 1));
    _mm_storeu_ps(lower + i + 4, _mm512_extractf32x4_ps(halves, 2));
    _mm_storeu_ps(upper + i + 4, _mm512_extractf32x4_ps(halves, 3));
  }
#pragma GCC unroll 8
  for (int i = whole; i < Count; ++i) {
    __m512 x = sums[i].v;
    x = _mm512_add_ps(x, _mm512_shuffle_f32x4(x, x, 0xb1));
    x = _mm512_add_ps(x, _mm512_shuffle_ps(x, x, 0x4e));
    x = _mm512_add_ps(x, _mm512_shuffle_ps(x, x, 0xb1));
    lower[i] = _mm512_cvtss_f32(x);
    upper[i] = _mm_cvtss_f32(_mm512_extractf32x4_ps(x, 2));
  }
}

}  // namespace
}  // namespace groupconv::cpu
