// Between rows, as NCHW has them, and pixels with their channels side by side, as multiply_quads reads and writes
// them. Rows are addressed one by one, so a permutation is free.
//
// Bytes: sixteen channels of sixteen pixels are a register each, transposed in four rounds that interleave register i
// with i + 8; a vector has as many such squares side by side as it has 128-bit parts, 64 pixels with AVX-512.
#pragma once

#include "cpu/staging.h"
#include "cpu/vec.h"

namespace groupconv::cpu {
namespace {

#if defined(__AVX2__)

constexpr int64_t square = 16;

#if defined(__AVX512F__)
using ByteVector = __m512i;
constexpr int64_t squares = 4;
GROUPCONV_INLINE ByteVector interleave_low(ByteVector a, ByteVector b) { return _mm512_unpacklo_epi8(a, b); }
GROUPCONV_INLINE ByteVector interleave_high(ByteVector a, ByteVector b) { return _mm512_unpackhi_epi8(a, b); }
GROUPCONV_INLINE ByteVector joined(const __m128i (&parts)[squares]) {
  const __m256i low = _mm256_inserti128_si256(_mm256_castsi128_si256(parts[0]), parts[1], 1);
  const __m256i high = _mm256_inserti128_si256(_mm256_castsi128_si256(parts[2]), parts[3], 1);
  return _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
}
GROUPCONV_INLINE void split(ByteVector v, __m128i (&parts)[squares]) {
  parts[0] = _mm512_castsi512_si128(v);
  parts[1] = _mm512_extracti32x4_epi32(v, 1);
  parts[2] = _mm512_extracti32x4_epi32(v, 2);
  parts[3] = _mm512_extracti32x4_epi32(v, 3);
}
#else
using ByteVector = __m256i;
constexpr int64_t squares = 2;
GROUPCONV_INLINE ByteVector interleave_low(ByteVector a, ByteVector b) { return _mm256_unpacklo_epi8(a, b); }
GROUPCONV_INLINE ByteVector interleave_high(ByteVector a, ByteVector b) { return _mm256_unpackhi_epi8(a, b); }
GROUPCONV_INLINE ByteVector joined(const __m128i (&parts)[squares]) {
  return _mm256_inserti128_si256(_mm256_castsi128_si256(parts[0]), parts[1], 1);
}
GROUPCONV_INLINE void split(ByteVector v, __m128i (&parts)[squares]) {
  parts[0] = _mm256_castsi256_si128(v);
  parts[1] = _mm256_extracti128_si256(v, 1);
}
#endif
constexpr int64_t most_transposed = square * squares;  // pixels

GROUPCONV_INLINE void transpose(ByteVector (&m)[square]) {
#pragma GCC unroll 4
  for (int round = 0; round < 4; ++round) {
    ByteVector next[square];
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {
      next[2 * i] = interleave_low(m[i], m[i + 8]);
      next[2 * i + 1] = interleave_high(m[i], m[i + 8]);
    }
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) m[i] = next[i];
  }
}

// The first `count` bytes of a row; the others are anything.
GROUPCONV_INLINE ByteVector load_row(const uint8_t* p, int64_t count) {
  ByteVector v{};
  if (count >= most_transposed) {
    __builtin_memcpy(&v, p, sizeof v);
  } else {
#if defined(__AVX512F__)
    v = _mm512_maskz_loadu_epi8((uint64_t{1} << count) - 1, p);
#else
    __builtin_memcpy(&v, p, static_cast<size_t>(count));
#endif
  }
  return v;
}
GROUPCONV_INLINE void store_row(ByteVector v, uint8_t* p, int64_t count) {
  if (count >= most_transposed) {
    __builtin_memcpy(p, &v, sizeof v);
  } else {
#if defined(__AVX512F__)
    _mm512_mask_storeu_epi8(p, (uint64_t{1} << count) - 1, v);
#else
    __builtin_memcpy(p, &v, static_cast<size_t>(count));
#endif
  }
}

// Register j of a square's row j has pixel 16 s + j in its part s.
GROUPCONV_INLINE ByteVector load_parts(const uint8_t* first, int64_t distance, int64_t last) {
  __m128i parts[squares];
#pragma GCC unroll 4
  for (int64_t s = 0; s < squares; ++s) {
    parts[s] =
        _mm_loadu_si128(reinterpret_cast<const __m128i*>(first + smaller(square * s, last) * distance));
  }
  return joined(parts);
}
GROUPCONV_INLINE void store_parts(ByteVector v, uint8_t* first, int64_t distance, int64_t count) {
  __m128i parts[squares];
  split(v, parts);
#pragma GCC unroll 4
  for (int64_t s = 0; s < squares; ++s) {
    if (square * s < count)
      _mm_storeu_si128(reinterpret_cast<__m128i*>(first + square * s * distance), parts[s]);
  }
}

// `row(i)`: row of channel i. Whole squares of channels are written to a pixel, those beyond `channels` as
// copies of the last.
template <class Row>
void rows_to_pixels(const Row& row, int64_t channels, int64_t pixels, uint8_t* to, int64_t distance) {
  for (int64_t p = 0; p < pixels; p += most_transposed) {
    const int64_t count = smaller(most_transposed, pixels - p);
    for (int64_t c = 0; c < channels; c += square) {
      ByteVector m[square];
#pragma GCC unroll 16
      for (int64_t i = 0; i < square; ++i) m[i] = load_row(row(smaller(c + i, channels - 1)) + p, count);
      transpose(m);
#pragma GCC unroll 16
      for (int64_t j = 0; j < square; ++j)
        store_parts(m[j], to + (p + j) * distance + c, distance, count - j);
    }
  }
}

// The other way; `row(i)` is null where channel i is not wanted. Whole squares of channels are read.
template <class Row>
void pixels_to_rows(const uint8_t* from, int64_t distance, int64_t channels, int64_t pixels, const Row& row) {
  for (int64_t p = 0; p < pixels; p += most_transposed) {
    const int64_t count = smaller(most_transposed, pixels - p);
    for (int64_t c = 0; c < channels; c += square) {
      ByteVector m[square];
#pragma GCC unroll 16
      for (int64_t j = 0; j < square; ++j) {
        const int64_t first = smaller(p + j, pixels - 1);
        m[j] = load_parts(from + first * distance + c, distance, pixels - 1 - first);
      }
      transpose(m);
      for (int64_t i = 0; i < smaller(square, channels - c); ++i) {
        if (uint8_t* to = row(c + i)) store_row(m[i], to + p, count);
      }
    }
  }
}

template <class Row>
void pixels_to_rows(const float* from, int64_t distance, int64_t channels, int64_t pixels, const Row& row) {
  for (int64_t p = 0; p < pixels; p += block) {
    const int64_t count = smaller<int64_t>(block, pixels - p);
    for (int64_t c = 0; c < channels; c += block) {
      __m256 m[block];
      load_transposed([&](int64_t i) { return from + (p + smaller(i, count - 1)) * distance + c; }, m);
      for (int64_t i = 0; i < smaller<int64_t>(block, channels - c); ++i) {
        if (float* to = row(c + i)) _mm256_maskstore_ps(to + p, block_mask(count), m[i]);
      }
    }
  }
}

#else

template <class Row>
void rows_to_pixels(const Row& row, int64_t channels, int64_t pixels, uint8_t* to, int64_t distance) {
  for (int64_t c = 0; c < channels; ++c) {
    for (int64_t p = 0; p < pixels; ++p) to[p * distance + c] = row(c)[p];
  }
}
template <class Out, class Row>
void pixels_to_rows(const Out* from, int64_t distance, int64_t channels, int64_t pixels, const Row& row) {
  for (int64_t c = 0; c < channels; ++c) {
    if (Out* to = row(c)) {
      for (int64_t p = 0; p < pixels; ++p) to[p] = from[p * distance + c];
    }
  }
}

#endif

}  // namespace
}  // namespace groupconv::cpu
