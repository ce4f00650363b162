// From totals to outputs: clamp(total · multiplier, low, high) as float32, or rounded and moved to the zero point
// as uint8, in registers. The same for numbers that come as float32 (quantize.h).
//
// Every instruction set makes the same roundings: int32 to float32, one multiplication, float32 to a whole number
// with ties to even. Where a number is NaN the lower bound comes out; the ops let no such multiplier in.
//
// AVX-512 narrows four vectors at once, 27 instructions for 64 outputs. A number below the range of int32 becomes
// its least one and is brought to the lower bound by the saturation of what follows; only the upper bound has to
// come before the rounding.
#pragma once

#include "cpu/quantized.h"
#include "cpu/vector/quads.h"

namespace groupconv::cpu {
namespace {

#if defined(__AVX512F__)

GROUPCONV_INLINE __m512 scaled(Totals totals, const float* multiplier) {
  return _mm512_mul_ps(_mm512_cvtepi32_ps(totals.v), _mm512_loadu_ps(multiplier));
}

class BytesOut {
 public:
  explicit GROUPCONV_INLINE BytesOut(const Rescaling& to)
      : high_(_mm512_set1_ps(to.high)),
        zero_(_mm512_set1_epi16(static_cast<int16_t>(to.zero_point))),
        low_(_mm512_set1_epi8(static_cast<char>(static_cast<int>(to.low) + to.zero_point))) {}

  // Part i of the result is vector i.
  GROUPCONV_INLINE __m512i pack(__m512 a, __m512 b, __m512 c, __m512 d) const {
    const __m512i first = _mm512_packs_epi32(whole(a), whole(b));
    const __m512i second = _mm512_packs_epi32(whole(c), whole(d));
    const __m512i bytes =
        _mm512_packus_epi16(_mm512_adds_epi16(first, zero_), _mm512_adds_epi16(second, zero_));
    const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    return _mm512_permutexvar_epi32(order, _mm512_max_epu8(bytes, low_));
  }

 private:
  // NaN becomes the least number.
  GROUPCONV_INLINE __m512i whole(__m512 value) const {
    return _mm512_cvtps_epi32(_mm512_min_ps(high_, value));
  }

  __m512 high_;
  __m512i zero_, low_;
};

template <int P, int V>
GROUPCONV_INLINE void store(const QuadSums (&sums)[P][V], const float* multiplier, const Rescaling& to,
                            uint8_t* dest, int64_t stride, int64_t last_lanes) {
  const BytesOut out(to);
  const auto last_mask = Vec<float>::first(last_lanes);
#pragma GCC unroll 8
  for (int first = 0; first < P * V; first += 4) {
    __m512 values[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const int at = smaller(first + i, P * V - 1);
      values[i] = scaled(sums[at / V][at % V].totals(), multiplier + at % V * quad_lanes);
    }
    const __m512i bytes = out.pack(values[0], values[1], values[2], values[3]);
    if constexpr (V == 4) {  // a pixel's
      _mm512_mask_storeu_epi8(dest + first / V * stride, ~uint64_t{0} >> (quad_lanes - last_lanes), bytes);
      continue;
    }
    const __m128i parts[] = {_mm512_castsi512_si128(bytes), _mm512_extracti32x4_epi32(bytes, 1),
                             _mm512_extracti32x4_epi32(bytes, 2), _mm512_extracti32x4_epi32(bytes, 3)};
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const int p = (first + i) / V, v = (first + i) % V;
      uint8_t* const at = dest + p * stride + v * quad_lanes;
      if (p == P) {
        break;
      } else if (v < V - 1 || last_lanes == quad_lanes) {
        _mm_storeu_si128(reinterpret_cast<__m128i*>(at), parts[i]);
      } else {
        _mm_mask_storeu_epi8(at, last_mask, parts[i]);
      }
    }
  }
}

template <int P, int V>
GROUPCONV_INLINE void store(const QuadSums (&sums)[P][V], const float* multiplier, const Rescaling& to,
                            float* dest, int64_t stride, int64_t last_lanes) {
  const __m512 low = _mm512_set1_ps(to.low), high = _mm512_set1_ps(to.high);
  const auto last_mask = Vec<float>::first(last_lanes);
#pragma GCC unroll 16
  for (int p = 0; p < P; ++p) {
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      const __m512 value = scaled(sums[p][v].totals(), multiplier + v * quad_lanes);
      const __m512 bounded = _mm512_min_ps(_mm512_max_ps(value, low), high);
      float* const at = dest + p * stride + v * quad_lanes;
      if (v < V - 1) {
        _mm512_storeu_ps(at, bounded);
      } else {
        _mm512_mask_storeu_ps(at, last_mask, bounded);
      }
    }
  }
}

GROUPCONV_INLINE void quantize_vectors(const float* from, float factor, const Rescaling& to, uint8_t* dest) {
  __m512 values[4];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i)
    values[i] = _mm512_mul_ps(_mm512_loadu_ps(from + 16 * i), _mm512_set1_ps(factor));
  _mm512_storeu_si512(dest, BytesOut(to).pack(values[0], values[1], values[2], values[3]));
}

#elif defined(__AVX2__)

GROUPCONV_INLINE __m256 bounded(__m256 value, const Rescaling& to) {
  return _mm256_min_ps(_mm256_max_ps(value, _mm256_set1_ps(to.low)), _mm256_set1_ps(to.high));
}

GROUPCONV_INLINE __m256 scaled(__m256i totals, const float* multiplier, const Rescaling& to) {
  return bounded(_mm256_mul_ps(_mm256_cvtepi32_ps(totals), _mm256_loadu_ps(multiplier)), to);
}

// Sixteen numbers within their bounds.
GROUPCONV_INLINE __m128i to_bytes(__m256 first, __m256 second, const Rescaling& to) {
  const __m256i words = _mm256_packs_epi32(_mm256_cvtps_epi32(first), _mm256_cvtps_epi32(second));
  const __m256i moved = _mm256_add_epi16(words, _mm256_set1_epi16(static_cast<int16_t>(to.zero_point)));
  const __m256i ordered = _mm256_permute4x64_epi64(moved, 0xd8);
  return _mm_packus_epi16(_mm256_castsi256_si128(ordered), _mm256_extracti128_si256(ordered, 1));
}

template <int P, int V>
GROUPCONV_INLINE void store(const QuadSums (&sums)[P][V], const float* multiplier, const Rescaling& to,
                            uint8_t* dest, int64_t stride, int64_t last_lanes) {
  static_assert(V == 1);
#pragma GCC unroll 2
  for (int p = 0; p < P; ++p) {
    const Totals totals = sums[p][0].totals();
    const __m128i bytes =
        to_bytes(scaled(totals.v[0], multiplier, to), scaled(totals.v[1], multiplier + 8, to), to);
    if (last_lanes == quad_lanes) {
      _mm_storeu_si128(reinterpret_cast<__m128i*>(dest + p * stride), bytes);
    } else {
      __builtin_memcpy(dest + p * stride, &bytes, static_cast<size_t>(last_lanes));
    }
  }
}

template <int P, int V>
GROUPCONV_INLINE void store(const QuadSums (&sums)[P][V], const float* multiplier, const Rescaling& to,
                            float* dest, int64_t stride, int64_t last_lanes) {
  static_assert(V == 1);
  const auto low_mask = Vec<float>::first(smaller<int64_t>(last_lanes, 8));
  const auto high_mask = Vec<float>::first(larger<int64_t>(last_lanes - 8, 0));
#pragma GCC unroll 2
  for (int p = 0; p < P; ++p) {
    const Totals totals = sums[p][0].totals();
    Vec<float>{scaled(totals.v[0], multiplier, to)}.store(dest + p * stride, low_mask);
    Vec<float>{scaled(totals.v[1], multiplier + 8, to)}.store(dest + p * stride + 8, high_mask);
  }
}

GROUPCONV_INLINE void quantize_vectors(const float* from, float factor, const Rescaling& to, uint8_t* dest) {
  const auto value = [&](int i) GROUPCONV_INLINE_LAMBDA {
    return bounded(_mm256_mul_ps(_mm256_loadu_ps(from + 8 * i), _mm256_set1_ps(factor)), to);
  };
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(dest + 16 * i), to_bytes(value(2 * i), value(2 * i + 1), to));
  }
}

#else  // any processor

GROUPCONV_INLINE float bounded(float value, const Rescaling& to) {
  const float above = value > to.low ? value : to.low;
  return above < to.high ? above : to.high;
}

// Between −2^22 and 2^22 adding 1.5 · 2^23 rounds to whole numbers, ties to even.
GROUPCONV_INLINE uint8_t to_byte(float value, const Rescaling& to) {
  constexpr float magic = 12582912.0f;
  return static_cast<uint8_t>(static_cast<int32_t>((value + magic) - magic) + to.zero_point);
}

GROUPCONV_INLINE void put(float value, const Rescaling& to, uint8_t* dest) { *dest = to_byte(value, to); }
GROUPCONV_INLINE void put(float value, const Rescaling&, float* dest) { *dest = value; }

template <class Out, int P, int V>
GROUPCONV_INLINE void store(const QuadSums (&sums)[P][V], const float* multiplier, const Rescaling& to,
                            Out* dest, int64_t stride, int64_t last_lanes) {
  static_assert(V == 1);
  for (int p = 0; p < P; ++p) {
    const Totals totals = sums[p][0].totals();
    for (int64_t i = 0; i < last_lanes; ++i) {
      put(bounded(static_cast<float>(totals.v[i]) * multiplier[i], to), to, dest + p * stride + i);
    }
  }
}

GROUPCONV_INLINE void quantize_vectors(const float* from, float factor, const Rescaling& to, uint8_t* dest) {
  for (int i = 0; i < 64; ++i) dest[i] = to_byte(bounded(from[i] * factor, to), to);
}

#endif

}  // namespace
}  // namespace groupconv::cpu
