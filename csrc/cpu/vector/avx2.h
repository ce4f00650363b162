// Vectors of AVX2, for vec.h.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "core/inline.h"

namespace groupconv::cpu {
namespace {

template <class T>
struct Vec;

constexpr int vector_registers = 16;
constexpr bool has_compress = true, has_mask_registers = false;

// For each set of eight lanes where every lane of a compressed and of an expanded vector comes from, a byte each. A
// negative one: it is zero.
struct LaneSources {
  int64_t compressed[256], expanded[256];
};
constexpr LaneSources list_lane_sources() {
  LaneSources list{};
  for (int bits = 0; bits < 256; ++bits) {
    uint64_t compressed = 0, expanded = 0;
    int count = 0;
    for (int lane = 0; lane < 8; ++lane) {
      const bool taken = bits >> lane & 1;
      expanded |= uint64_t(taken ? count : 0x80) << 8 * lane;
      if (taken) compressed |= uint64_t(lane) << 8 * count++;
    }
    list.compressed[bits] = static_cast<int64_t>(compressed);
    list.expanded[bits] = static_cast<int64_t>(expanded);
  }
  return list;
}
constexpr LaneSources lane_sources = list_lane_sources();
GROUPCONV_INLINE __m256i lanes_from(int64_t bytes) { return _mm256_cvtepi8_epi32(_mm_cvtsi64_si128(bytes)); }

// A mask of all lanes, as a type: of a mask in a register the compiler does not know that nothing is masked.
struct AllLanes {
  GROUPCONV_INLINE operator __m256i() const { return _mm256_set1_epi32(-1); }
};

// The first numbers of four; a bit each. Plain stores, since a core of AMD takes vmaskmovps apart into dozens of steps.
GROUPCONV_INLINE void store_first(float* p, __m128 four, uint32_t bits) {
  if (bits & 2) {
    _mm_storel_pi(reinterpret_cast<__m64*>(p), four);
    four = _mm_movehl_ps(four, four);
    p += 2;
    bits >>= 2;
  }
  if (bits & 1) _mm_store_ss(p, four);
}

template <>
struct Vec<float> {
  static constexpr int lanes = 8;
  using Mask = __m256i;
  __m256 v;

  static GROUPCONV_INLINE Mask first(int64_t n) { return from_bits((1u << n) - 1); }
  static GROUPCONV_INLINE AllLanes all() { return {}; }
  static GROUPCONV_INLINE Mask from_bits(uint32_t bits) {
    const __m256i lane_bit = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    const __m256i all = _mm256_set1_epi32(static_cast<int>(bits));
    return _mm256_cmpeq_epi32(_mm256_and_si256(all, lane_bit), lane_bit);
  }
  static GROUPCONV_INLINE uint32_t bits(Mask m) {
    return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_castsi256_ps(m)));
  }
  static GROUPCONV_INLINE uint32_t bits(AllLanes) { return 0xff; }
  static GROUPCONV_INLINE Vec broadcast(float x) { return {_mm256_set1_ps(x)}; }
  static GROUPCONV_INLINE Vec load(const float* p) { return {_mm256_loadu_ps(p)}; }
  static GROUPCONV_INLINE Vec load(const float* p, Mask m) { return {_mm256_maskload_ps(p, m)}; }
  static GROUPCONV_INLINE Vec load(const float* p, AllLanes) { return load(p); }
  static GROUPCONV_INLINE Vec gather(const float* p, const int32_t* index, Mask m) {
    const __m256i from = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(index));
    return {_mm256_mask_i32gather_ps(_mm256_setzero_ps(), p, from, _mm256_castsi256_ps(m), 4)};
  }
  // One by one: half of what the instruction takes AMD, and Intel where it has been made safe.
  static GROUPCONV_INLINE Vec gather(const float* p, const int32_t* index, AllLanes) {
    const auto two = [&](int i) GROUPCONV_INLINE_LAMBDA {
      int64_t both;
      __builtin_memcpy(&both, index + i, sizeof both);
      return _mm_insert_ps(_mm_load_ss(p + static_cast<int32_t>(both)), _mm_load_ss(p + (both >> 32)), 0x10);
    };
    return {_mm256_set_m128(_mm_movelh_ps(two(4), two(6)), _mm_movelh_ps(two(0), two(2)))};
  }
  using Index = __m256i;
  static GROUPCONV_INLINE Index load_index(const int32_t* p) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  }
  friend GROUPCONV_INLINE Vec permute(Vec x, Index index, Mask m) {
    return {_mm256_and_ps(_mm256_permutevar8x32_ps(x.v, index), _mm256_castsi256_ps(m))};
  }
  friend GROUPCONV_INLINE Vec permute(Vec x, Index index, AllLanes) {
    return {_mm256_permutevar8x32_ps(x.v, index)};
  }
  GROUPCONV_INLINE void store(float* p) const { _mm256_storeu_ps(p, v); }
  GROUPCONV_INLINE void store(float* p, AllLanes) const { store(p); }
  // Of the first lanes only: m = first(n).
  GROUPCONV_INLINE void store(float* p, Mask m) const {
    const uint32_t bits = Vec::bits(m);
    if (bits == 0xff) return store(p);
    const __m128 low = _mm256_castps256_ps128(v);
    if (!(bits & 8)) return store_first(p, low, bits);
    _mm_storeu_ps(p, low);
    store_first(p + 4, _mm256_extractf128_ps(v, 1), bits >> 4);
  }
  GROUPCONV_INLINE float sum() const {
    __m128 x = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    x = _mm_add_ps(x, _mm_movehl_ps(x, x));
    return _mm_cvtss_f32(_mm_add_ss(x, _mm_movehdup_ps(x)));
  }
  friend GROUPCONV_INLINE Vec operator+(Vec a, Vec b) { return {_mm256_add_ps(a.v, b.v)}; }
  friend GROUPCONV_INLINE Vec operator*(Vec a, Vec b) { return {_mm256_mul_ps(a.v, b.v)}; }
  friend GROUPCONV_INLINE Vec multiply_add(Vec a, Vec b, Vec c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
  friend GROUPCONV_INLINE Vec only(Vec x, Mask m) { return {_mm256_and_ps(_mm256_castsi256_ps(m), x.v)}; }
  friend GROUPCONV_INLINE Vec compress(Vec x, uint32_t bits) {
    return {_mm256_permutevar8x32_ps(x.v, lanes_from(lane_sources.compressed[bits]))};
  }
  friend GROUPCONV_INLINE Vec expand(Vec x, uint32_t bits) {
    const __m256i from = lanes_from(lane_sources.expanded[bits]);
    return {_mm256_blendv_ps(_mm256_permutevar8x32_ps(x.v, from), _mm256_setzero_ps(),
                             _mm256_castsi256_ps(from))};
  }
  friend GROUPCONV_INLINE Vec even(Vec a, Vec b) {
    const __m256d pairs = _mm256_castps_pd(_mm256_shuffle_ps(a.v, b.v, 0x88));
    return {_mm256_castpd_ps(_mm256_permute4x64_pd(pairs, 0xd8))};
  }
  friend GROUPCONV_INLINE Vec clamp(Vec low, Vec high, Vec x) {
    return {_mm256_min_ps(high.v, _mm256_max_ps(low.v, x.v))};
  }
  friend GROUPCONV_INLINE Vec between(Vec low, Vec high, Vec y, Vec x) {
    const auto above = _mm256_cmp_ps(y.v, low.v, _CMP_NLE_UQ),
               below = _mm256_cmp_ps(y.v, high.v, _CMP_NGE_UQ);
    return {_mm256_and_ps(_mm256_and_ps(above, below), x.v)};
  }
  friend GROUPCONV_INLINE Vec at_least(Vec low, Vec x) { return {_mm256_max_ps(low.v, x.v)}; }
};

template <>
struct Vec<double> {
  static constexpr int lanes = 4;
  using Mask = __m256i;
  __m256d v;

  static GROUPCONV_INLINE Mask first(int64_t n) { return from_bits((1u << n) - 1); }
  static GROUPCONV_INLINE AllLanes all() { return {}; }
  static GROUPCONV_INLINE Mask from_bits(uint32_t bits) {
    const __m256i lane_bit = _mm256_setr_epi64x(1, 2, 4, 8);
    const __m256i all = _mm256_set1_epi64x(static_cast<int64_t>(bits));
    return _mm256_cmpeq_epi64(_mm256_and_si256(all, lane_bit), lane_bit);
  }
  static GROUPCONV_INLINE uint32_t bits(Mask m) {
    return static_cast<uint32_t>(_mm256_movemask_pd(_mm256_castsi256_pd(m)));
  }
  static GROUPCONV_INLINE Vec broadcast(double x) { return {_mm256_set1_pd(x)}; }
  static GROUPCONV_INLINE Vec load(const double* p) { return {_mm256_loadu_pd(p)}; }
  static GROUPCONV_INLINE Vec load(const double* p, Mask m) { return {_mm256_maskload_pd(p, m)}; }
  static GROUPCONV_INLINE Vec load(const double* p, AllLanes) { return load(p); }
  static GROUPCONV_INLINE Vec gather(const double* p, const int32_t* index, Mask m) {
    const __m128i from = _mm_loadu_si128(reinterpret_cast<const __m128i*>(index));
    return {_mm256_mask_i32gather_pd(_mm256_setzero_pd(), p, from, _mm256_castsi256_pd(m), 8)};
  }
  GROUPCONV_INLINE void store(double* p) const { _mm256_storeu_pd(p, v); }
  GROUPCONV_INLINE void store(double* p, Mask m) const { _mm256_maskstore_pd(p, m, v); }
  GROUPCONV_INLINE void store(double* p, AllLanes) const { store(p); }
  GROUPCONV_INLINE double sum() const {
    const __m128d x = _mm_add_pd(_mm256_castpd256_pd128(v), _mm256_extractf128_pd(v, 1));
    return _mm_cvtsd_f64(_mm_add_sd(x, _mm_unpackhi_pd(x, x)));
  }
  friend GROUPCONV_INLINE Vec operator+(Vec a, Vec b) { return {_mm256_add_pd(a.v, b.v)}; }
  friend GROUPCONV_INLINE Vec operator*(Vec a, Vec b) { return {_mm256_mul_pd(a.v, b.v)}; }
  friend GROUPCONV_INLINE Vec multiply_add(Vec a, Vec b, Vec c) { return {_mm256_fmadd_pd(a.v, b.v, c.v)}; }
  friend GROUPCONV_INLINE Vec only(Vec x, Mask m) { return {_mm256_and_pd(_mm256_castsi256_pd(m), x.v)}; }
  // One by one: float64 is for gradient checks.
  friend GROUPCONV_INLINE Vec compress(Vec x, uint32_t bits) {
    double from[lanes], to[lanes] = {};
    x.store(from);
    for (int lane = 0, count = 0; lane < lanes; ++lane) {
      if (bits >> lane & 1) to[count++] = from[lane];
    }
    return load(to);
  }
  friend GROUPCONV_INLINE Vec expand(Vec x, uint32_t bits) {
    double from[lanes], to[lanes] = {};
    x.store(from);
    for (int lane = 0, count = 0; lane < lanes; ++lane) {
      if (bits >> lane & 1) to[lane] = from[count++];
    }
    return load(to);
  }
  friend GROUPCONV_INLINE Vec even(Vec a, Vec b) {
    return {_mm256_permute4x64_pd(_mm256_unpacklo_pd(a.v, b.v), 0xd8)};
  }
  friend GROUPCONV_INLINE Vec clamp(Vec low, Vec high, Vec x) {
    return {_mm256_min_pd(high.v, _mm256_max_pd(low.v, x.v))};
  }
  friend GROUPCONV_INLINE Vec between(Vec low, Vec high, Vec y, Vec x) {
    const auto above = _mm256_cmp_pd(y.v, low.v, _CMP_NLE_UQ),
               below = _mm256_cmp_pd(y.v, high.v, _CMP_NGE_UQ);
    return {_mm256_and_pd(_mm256_and_pd(above, below), x.v)};
  }
  friend GROUPCONV_INLINE Vec at_least(Vec low, Vec x) { return {_mm256_max_pd(low.v, x.v)}; }
};

template <class T>
GROUPCONV_INLINE void pin(Vec<T>& x) {
  asm("" : "+x"(x.v));
}

GROUPCONV_INLINE void sum_eight(const Vec<float>* sums, float* out) {
  __m256 pairs[4], quads[2];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const __m256 a = sums[2 * i].v, b = sums[2 * i + 1].v;
    pairs[i] = _mm256_add_ps(_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b));
  }
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) {
    const __m256d a = _mm256_castps_pd(pairs[2 * i]), b = _mm256_castps_pd(pairs[2 * i + 1]);
    quads[i] =
        _mm256_add_ps(_mm256_castpd_ps(_mm256_unpacklo_pd(a, b)), _mm256_castpd_ps(_mm256_unpackhi_pd(a, b)));
  }
  _mm256_storeu_ps(out, _mm256_add_ps(_mm256_permute2f128_ps(quads[0], quads[1], 0x20),
                                      _mm256_permute2f128_ps(quads[0], quads[1], 0x31)));
}

}  // namespace
}  // namespace groupconv::cpu
