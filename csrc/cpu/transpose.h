// A block of as many rows as a vector has lanes, as columns.
#pragma once

#include "cpu/vec.h"

namespace groupconv::cpu {
namespace {

// v[i] lane k ↔ v[k] lane i.
template <class T>
GROUPCONV_INLINE void transpose(Vec<T> (&v)[Vec<T>::lanes]) {
  constexpr int lanes = Vec<T>::lanes;
  T rows[lanes * lanes], column[lanes];
  for (int i = 0; i < lanes; ++i) v[i].store(rows + i * lanes);
  for (int i = 0; i < lanes; ++i) {
    for (int k = 0; k < lanes; ++k) column[k] = rows[k * lanes + i];
    v[i] = Vec<T>::load(column);
  }
}

#if defined(__AVX512F__)
// Two rounds inside 128-bit parts, two that exchange the parts.
GROUPCONV_INLINE void transpose(Vec<float> (&v)[16]) {
  __m512 quads[16];
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    const __m512d low01 = _mm512_castps_pd(_mm512_unpacklo_ps(v[i].v, v[i + 1].v));
    const __m512d high01 = _mm512_castps_pd(_mm512_unpackhi_ps(v[i].v, v[i + 1].v));
    const __m512d low23 = _mm512_castps_pd(_mm512_unpacklo_ps(v[i + 2].v, v[i + 3].v));
    const __m512d high23 = _mm512_castps_pd(_mm512_unpackhi_ps(v[i + 2].v, v[i + 3].v));
    quads[i] = _mm512_castpd_ps(_mm512_unpacklo_pd(low01, low23));
    quads[i + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(low01, low23));
    quads[i + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(high01, high23));
    quads[i + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(high01, high23));
  }
  // Part p of quads[4 · i + k]: column 4 · p + k of the rows 4 · i … 4 · i + 3.
#pragma GCC unroll 4
  for (int k = 0; k < 4; ++k) {
    const __m512 even01 = _mm512_shuffle_f32x4(quads[k], quads[4 + k], 0x88);
    const __m512 odd01 = _mm512_shuffle_f32x4(quads[k], quads[4 + k], 0xdd);
    const __m512 even23 = _mm512_shuffle_f32x4(quads[8 + k], quads[12 + k], 0x88);
    const __m512 odd23 = _mm512_shuffle_f32x4(quads[8 + k], quads[12 + k], 0xdd);
    v[k].v = _mm512_shuffle_f32x4(even01, even23, 0x88);
    v[4 + k].v = _mm512_shuffle_f32x4(odd01, odd23, 0x88);
    v[8 + k].v = _mm512_shuffle_f32x4(even01, even23, 0xdd);
    v[12 + k].v = _mm512_shuffle_f32x4(odd01, odd23, 0xdd);
  }
}
#elif defined(__AVX2__)
GROUPCONV_INLINE void transpose(Vec<float> (&v)[8]) {
  __m256 quads[8];
#pragma GCC unroll 2
  for (int i = 0; i < 8; i += 4) {
    const __m256d low01 = _mm256_castps_pd(_mm256_unpacklo_ps(v[i].v, v[i + 1].v));
    const __m256d high01 = _mm256_castps_pd(_mm256_unpackhi_ps(v[i].v, v[i + 1].v));
    const __m256d low23 = _mm256_castps_pd(_mm256_unpacklo_ps(v[i + 2].v, v[i + 3].v));
    const __m256d high23 = _mm256_castps_pd(_mm256_unpackhi_ps(v[i + 2].v, v[i + 3].v));
    quads[i] = _mm256_castpd_ps(_mm256_unpacklo_pd(low01, low23));
    quads[i + 1] = _mm256_castpd_ps(_mm256_unpackhi_pd(low01, low23));
    quads[i + 2] = _mm256_castpd_ps(_mm256_unpacklo_pd(high01, high23));
    quads[i + 3] = _mm256_castpd_ps(_mm256_unpackhi_pd(high01, high23));
  }
#pragma GCC unroll 4
  for (int k = 0; k < 4; ++k) {
    v[k].v = _mm256_permute2f128_ps(quads[k], quads[4 + k], 0x20);
    v[4 + k].v = _mm256_permute2f128_ps(quads[k], quads[4 + k], 0x31);
  }
}
#endif

}  // namespace
}  // namespace groupconv::cpu
