// Sixteen sums of products of bytes: what the quantised kernels compute with, for every instruction set.
//
//   sum[lane] += Σ_{i<4} weight[lane][i] · quads[lane mod Share][i]       int8 · uint8, exact in int32
//
//   AVX-512 with VNNI   one vpdpbusd for the sixteen lanes
//   AVX-512, AVX2       bytes widened to 16 bits, vpmaddwd and an addition, two neighbouring partial sums for
//                       each lane (vpmaddubsw would be half the work, but saturates)
//   any processor       one by one
//
// Quads are what lies in memory, repeated over the lanes. Totals are the sixteen finished sums; rescale.h takes
// them on. A sum that exceeds 32 bits wraps around everywhere.
#pragma once

#include "core/quantized_layout.h"
#include "cpu/vector/vec.h"

namespace groupconv::cpu {
namespace {

// One quad or two, repeated by the load.
template <int Share>
GROUPCONV_INLINE long long load_quads(const uint8_t* p) {
  static_assert(Share <= 2);
  long long bytes = 0;
  std::memcpy(&bytes, p, Share * quad);
  return bytes;
}

#if defined(__AVX512F__)

struct Totals {
  __m512i v;
};

GROUPCONV_INLINE __m128i load_128(const void* p) { return _mm_loadu_si128(static_cast<const __m128i*>(p)); }
GROUPCONV_INLINE __m256i load_256(const void* p) {
  return _mm256_loadu_si256(static_cast<const __m256i*>(p));
}

template <int Share>
GROUPCONV_INLINE __m512i repeat_quads(const uint8_t* p) {
  if constexpr (Share == 1) return _mm512_set1_epi32(static_cast<int>(load_quads<1>(p)));
  if constexpr (Share == 2) return _mm512_set1_epi64(load_quads<2>(p));
  if constexpr (Share == 4) return _mm512_broadcast_i32x4(load_128(p));
  if constexpr (Share == 8) return _mm512_broadcast_i64x4(load_256(p));
  if constexpr (Share == 16) return _mm512_loadu_si512(p);
}

#if defined(__AVX512VNNI__)

constexpr int most_quad_pixels = 14;  // the widths that networks have are multiples
constexpr int most_quad_blocks = 2;   // 28 sums, 2 weights and a pixel of 32 registers

struct QuadWeights {
  __m512i v;

  GROUPCONV_INLINE void load(const int8_t* p) { v = _mm512_loadu_si512(p); }
};

template <int Share>
struct Quads {
  __m512i v;

  explicit GROUPCONV_INLINE Quads(const uint8_t* p) : v(repeat_quads<Share>(p)) {}
};

struct QuadSums {
  __m512i v;

  static GROUPCONV_INLINE QuadSums starting(const int32_t* p) { return {_mm512_loadu_si512(p)}; }
  template <int Share>
  GROUPCONV_INLINE void add(const QuadWeights& weights, const Quads<Share>& quads) {
    // With the intrinsic the compiler copies every sum twice in every step.
    asm("vpdpbusd %2, %1, %0" : "+v"(v) : "v"(quads.v), "v"(weights.v));
  }
  GROUPCONV_INLINE Totals totals() const { return {v}; }
};

#else

constexpr int most_quad_pixels = 12;  // 24 sums, 2 weights, a pixel and a product of 32 registers
constexpr int most_quad_blocks = 1;

struct QuadWeights {
  __m512i v[2];

  GROUPCONV_INLINE void load(const int8_t* p) {
    v[0] = _mm512_cvtepi8_epi16(load_256(p));
    v[1] = _mm512_cvtepi8_epi16(load_256(p + 32));
  }
};

// Of lanes 0 … 7 and 8 … 15, the same unless sixteen groups share them.
template <int Share>
struct Quads {
  __m512i v[2];

  explicit GROUPCONV_INLINE Quads(const uint8_t* p) {
    if constexpr (Share <= 2) {
      v[0] = v[1] = _mm512_unpacklo_epi8(repeat_quads<Share>(p), _mm512_setzero_si512());
    } else if constexpr (Share == 4) {
      v[0] = v[1] = _mm512_cvtepu8_epi16(_mm256_broadcastsi128_si256(load_128(p)));
    } else {
      v[0] = _mm512_cvtepu8_epi16(load_256(p));
      v[1] = Share == 8 ? v[0] : _mm512_cvtepu8_epi16(load_256(p + Share / 16 * 32));
    }
  }
};

struct QuadSums {
  __m512i v[2];  // lanes 0 … 7 and 8 … 15, each as two 32-bit parts

  static GROUPCONV_INLINE QuadSums starting(const int32_t* p) {
    return {{_mm512_cvtepu32_epi64(load_256(p)), _mm512_cvtepu32_epi64(load_256(p + 8))}};
  }
  template <int Share>
  GROUPCONV_INLINE void add(const QuadWeights& weights, const Quads<Share>& quads) {
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) v[i] = _mm512_add_epi32(v[i], _mm512_madd_epi16(quads.v[i], weights.v[i]));
  }
  GROUPCONV_INLINE Totals totals() const {
    return {_mm512_inserti64x4(_mm512_castsi256_si512(joined(v[0])), joined(v[1]), 1)};
  }

 private:
  static GROUPCONV_INLINE __m256i joined(__m512i parts) {
    return _mm512_cvtepi64_epi32(_mm512_add_epi32(parts, _mm512_srli_epi64(parts, 32)));
  }
};

#endif

#elif defined(__AVX2__)

constexpr int most_quad_pixels = 2;  // 8 sums, 4 weights, a pixel and a product of 16 registers
constexpr int most_quad_blocks = 1;

struct Totals {
  __m256i v[2];
};

GROUPCONV_INLINE __m128i load_128(const void* p) { return _mm_loadu_si128(static_cast<const __m128i*>(p)); }

struct QuadWeights {
  __m256i v[4];

  GROUPCONV_INLINE void load(const int8_t* p) {
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) v[i] = _mm256_cvtepi8_epi16(load_128(p + 16 * i));
  }
};

// Of four lanes each, of which no more than are needed are different.
template <int Share>
struct Quads {
  __m256i v[4];

  explicit GROUPCONV_INLINE Quads(const uint8_t* p) {
    constexpr int different = Share <= 4 ? 1 : Share / 4;
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) v[i] = i < different ? widened(p + 16 * i) : v[i % different];
  }

 private:
  static GROUPCONV_INLINE __m256i widened(const uint8_t* p) {
    const __m256i zero = _mm256_setzero_si256();
    if constexpr (Share == 1) {
      return _mm256_unpacklo_epi8(_mm256_set1_epi32(static_cast<int>(load_quads<1>(p))), zero);
    } else if constexpr (Share == 2) {
      return _mm256_unpacklo_epi8(_mm256_set1_epi64x(load_quads<2>(p)), zero);
    } else {
      return _mm256_cvtepu8_epi16(load_128(p));
    }
  }
};

struct QuadSums {
  __m256i v[4];  // four lanes each, in two 32-bit parts

  static GROUPCONV_INLINE QuadSums starting(const int32_t* p) {
    QuadSums sums;
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) sums.v[i] = _mm256_cvtepu32_epi64(load_128(p + 4 * i));
    return sums;
  }
  template <int Share>
  GROUPCONV_INLINE void add(const QuadWeights& weights, const Quads<Share>& quads) {
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) v[i] = _mm256_add_epi32(v[i], _mm256_madd_epi16(quads.v[i], weights.v[i]));
  }
  GROUPCONV_INLINE Totals totals() const { return {{joined(v[0], v[1]), joined(v[2], v[3])}}; }

 private:
  static GROUPCONV_INLINE __m256i joined(__m256i a, __m256i b) {
    return _mm256_permute4x64_epi64(_mm256_hadd_epi32(a, b), 0xd8);
  }
};

#else  // any processor

constexpr int most_quad_pixels = 1;
constexpr int most_quad_blocks = 1;

struct Totals {
  int32_t v[quad_lanes];
};

struct QuadWeights {
  const int8_t* v;

  GROUPCONV_INLINE void load(const int8_t* p) { v = p; }
};

template <int Share>
struct Quads {
  const uint8_t* v;

  explicit GROUPCONV_INLINE Quads(const uint8_t* p) : v(p) {}
};

struct QuadSums {
  uint32_t v[quad_lanes];

  static GROUPCONV_INLINE QuadSums starting(const int32_t* p) {
    QuadSums sums;
    for (int64_t i = 0; i < quad_lanes; ++i) sums.v[i] = static_cast<uint32_t>(p[i]);
    return sums;
  }
  template <int Share>
  GROUPCONV_INLINE void add(const QuadWeights& weights, const Quads<Share>& quads) {
    for (int64_t lane = 0; lane < quad_lanes; ++lane) {
      int32_t sum = 0;
      for (int64_t i = 0; i < quad; ++i) {
        sum += int32_t{weights.v[lane * quad + i]} * int32_t{quads.v[lane % Share * quad + i]};
      }
      v[lane] += static_cast<uint32_t>(sum);
    }
  }
  GROUPCONV_INLINE Totals totals() const {
    Totals totals;
    for (int64_t i = 0; i < quad_lanes; ++i) totals.v[i] = static_cast<int32_t>(v[i]);
    return totals;
  }
};

#endif

}  // namespace
}  // namespace groupconv::cpu
