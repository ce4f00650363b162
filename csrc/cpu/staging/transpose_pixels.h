// Between rows, as NCHW has them, and pixels with their channels side by side, as multiply_quads reads and writes
// them. Rows are addressed one by one, by their distance from the first, so a permutation is free.
//
// Sixteen channels of sixteen pixels are a square, transposed in rounds that interleave register i with i + 8: four
// for bytes, of which a vector has as many squares side by side as 128-bit parts, 64 pixels with AVX-512.
#pragma once

#include "cpu/vector/transpose.h"
#include "cpu/vector/vec.h"

namespace groupconv::cpu {
namespace {

constexpr int64_t no_row = -1;
constexpr int64_t square = 16;

#if defined(__AVX2__)

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
// The first `count` bytes of a row; the others are anything.
GROUPCONV_INLINE ByteVector load_some(const uint8_t* p, int64_t count) {
  return _mm512_maskz_loadu_epi8((uint64_t{1} << count) - 1, p);
}
GROUPCONV_INLINE void store_some(ByteVector v, uint8_t* p, int64_t count) {
  _mm512_mask_storeu_epi8(p, (uint64_t{1} << count) - 1, v);
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
GROUPCONV_INLINE ByteVector load_some(const uint8_t* p, int64_t count) {
  ByteVector v{};
  std::memcpy(&v, p, static_cast<size_t>(count));
  return v;
}
GROUPCONV_INLINE void store_some(ByteVector v, uint8_t* p, int64_t count) {
  std::memcpy(p, &v, static_cast<size_t>(count));
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
    for (int i = 0; i < square; ++i) m[i] = next[i];
  }
}

// Part s of register j is pixel 16 s + j.
template <bool Whole>
GROUPCONV_INLINE void rows_to_squares(const uint8_t* from, const int64_t* rows, int64_t count, uint8_t* to,
                                      int64_t distance) {
  ByteVector m[square];
#pragma GCC unroll 16
  for (int64_t i = 0; i < square; ++i) {
    if constexpr (Whole) {
      std::memcpy(&m[i], from + rows[i], sizeof m[i]);
    } else {
      m[i] = load_some(from + rows[i], count);
    }
  }
  transpose(m);
#pragma GCC unroll 16
  for (int64_t j = 0; j < square; ++j) {
    __m128i parts[squares];
    split(m[j], parts);
#pragma GCC unroll 4
    for (int64_t s = 0; s < squares; ++s) {
      if (Whole || square * s + j < count) {
        _mm_storeu_si128(reinterpret_cast<__m128i*>(to + (square * s + j) * distance), parts[s]);
      }
    }
  }
}
template <bool Whole>
GROUPCONV_INLINE void squares_to_rows(const uint8_t* from, int64_t distance, int64_t count, uint8_t* to,
                                      const int64_t* rows) {
  ByteVector m[square];
#pragma GCC unroll 16
  for (int64_t j = 0; j < square; ++j) {
    __m128i parts[squares];
#pragma GCC unroll 4
    for (int64_t s = 0; s < squares; ++s) {
      const int64_t pixel = Whole ? square * s + j : smaller(square * s + j, count - 1);
      parts[s] = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + pixel * distance));
    }
    m[j] = joined(parts);
  }
  transpose(m);
#pragma GCC unroll 16
  for (int64_t i = 0; i < square; ++i) {
    if (rows[i] == no_row) continue;
    if constexpr (Whole) {
      std::memcpy(to + rows[i], &m[i], sizeof m[i]);
    } else {
      store_some(m[i], to + rows[i], count);
    }
  }
}

// Whole squares of channels are written to every pixel, and `rows` has as many.
inline void rows_to_pixels(const uint8_t* from, const int64_t* rows, int64_t channels, int64_t pixels,
                           uint8_t* to, int64_t distance) {
  for (int64_t p = 0; p < pixels; p += most_transposed) {
    const int64_t count = pixels - p;
    for (int64_t c = 0; c < channels; c += square) {
      if (count >= most_transposed) {
        rows_to_squares<true>(from + p, rows + c, count, to + p * distance + c, distance);
      } else {
        rows_to_squares<false>(from + p, rows + c, count, to + p * distance + c, distance);
      }
    }
  }
}

// A pixel has `channels` numbers, whole squares, and each that has a row goes there.
inline void pixels_to_rows(const uint8_t* from, int64_t channels, int64_t pixels, uint8_t* to,
                           const int64_t* rows) {
  for (int64_t p = 0; p < pixels; p += most_transposed) {
    const int64_t count = pixels - p;
    for (int64_t c = 0; c < channels; c += square) {
      if (count >= most_transposed) {
        squares_to_rows<true>(from + p * channels + c, channels, count, to + p, rows + c);
      } else {
        squares_to_rows<false>(from + p * channels + c, channels, count, to + p, rows + c);
      }
    }
  }
}
inline void pixels_to_rows(const float* from, int64_t channels, int64_t pixels, float* to,
                           const int64_t* rows) {
  constexpr int lanes = Vec<float>::lanes;
  const SpacedRows<float> all{from, channels};
  // A whole cache line of every row, before other rows push it out.
  for (int64_t p = 0; p < pixels; p += square) {
    for (int64_t c = 0; c < channels; c += columns_at_once) {
      for (int64_t first = p; first < smaller(p + square, pixels); first += lanes) {
        const int64_t count = smaller<int64_t>(lanes, pixels - first);
        const ListedStrip<float, lanes> strip(all, first, count);
        LongRegister column[columns_at_once];
        load_columns([&](int i) GROUPCONV_INLINE_LAMBDA { return strip.rows()(i) + c; }, column);
#pragma GCC unroll 4
        for (int64_t i = 0; i < columns_at_once; ++i) {
          if (rows[c + i] != no_row) store_lanes(to + rows[c + i] + first, column[i], count);
        }
      }
    }
  }
}

#else

inline void rows_to_pixels(const uint8_t* from, const int64_t* rows, int64_t channels, int64_t pixels,
                           uint8_t* to, int64_t distance) {
  for (int64_t c = 0; c < channels; ++c) {
    for (int64_t p = 0; p < pixels; ++p) to[p * distance + c] = from[rows[c] + p];
  }
}
template <class Out>
void pixels_to_rows(const Out* from, int64_t channels, int64_t pixels, Out* to, const int64_t* rows) {
  for (int64_t c = 0; c < channels; ++c) {
    if (rows[c] == no_row) continue;
    for (int64_t p = 0; p < pixels; ++p) to[rows[c] + p] = from[p * channels + c];
  }
}

#endif

}  // namespace
}  // namespace groupconv::cpu
