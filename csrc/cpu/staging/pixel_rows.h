// 16 neighbouring pixels of a channels_last bfloat16 image as rows of a channel each, and back: three shuffles for each
// vector on either way, whatever the order of the rows.
//
// An 8 × 8 block is transposed in each 128-bit part of eight registers. Parts 0 and 1 of a register are 16 channels of
// pixel j, one load; parts 2 and 3 those of pixel 8 + j, an insertion from memory. So parts 0 and 2 of a register of
// rows have channel i and parts 1 and 3 channel 8 + i, and a row's two parts lie 32 bytes apart. Read from 16 bytes
// before it, it comes to the other parts: two loads fetch any two rows.
#pragma once

#include "cpu/staging/reorder.h"
#include "cpu/staging/workspace.h"
#include "cpu/vector/transpose.h"

namespace groupconv::cpu {
namespace {

constexpr int64_t pixels_of_rows = 16;
constexpr int64_t row_part = 16, row_register = 64;  // bytes

// Parts 0 and 2 of what lies at `even`, 1 and 3 of what lies 16 bytes before `odd`.
GROUPCONV_INLINE __m512i load_two_rows(const char* even, const char* odd) {
  constexpr __mmask8 odd_parts = 0xcc;
  return _mm512_mask_loadu_epi64(_mm512_loadu_si512(even), odd_parts, odd - row_part);
}

// In each 128-bit part: word i of register j to word j of register i.
GROUPCONV_INLINE void transpose_parts(__m512i (&v)[8]) {
  __m512i w[8];
#pragma GCC unroll 4
  for (int i = 0; i < 8; i += 2) {
    w[i] = _mm512_unpacklo_epi16(v[i], v[i + 1]);
    w[i + 1] = _mm512_unpackhi_epi16(v[i], v[i + 1]);
  }
#pragma GCC unroll 2
  for (int i = 0; i < 8; i += 4) {
    v[i] = _mm512_unpacklo_epi32(w[i], w[i + 2]);
    v[i + 1] = _mm512_unpackhi_epi32(w[i], w[i + 2]);
    v[i + 2] = _mm512_unpacklo_epi32(w[i + 1], w[i + 3]);
    v[i + 3] = _mm512_unpackhi_epi32(w[i + 1], w[i + 3]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    w[2 * i] = _mm512_unpacklo_epi64(v[i], v[i + 4]);
    w[2 * i + 1] = _mm512_unpackhi_epi64(v[i], v[i + 4]);
  }
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) v[i] = w[i];
}

// body(pixel(i), its first channel) of up to 16 pixels; the last stands for those that are missing, and what is
// written there is the same again.
template <class Body>
GROUPCONV_INLINE void with_pixels(const BFloat16* first, int64_t stride, int64_t pixels, const Body& body) {
  if (pixels >= pixels_of_rows) return body(SpacedStrip<BFloat16>(first, stride).rows());
  body([=](int i) GROUPCONV_INLINE_LAMBDA { return first + smaller<int64_t>(i, pixels - 1) * stride; });
}

// Rows of a pixel's channels, and one of zeros for what is none.
class PixelRows {
 public:
  PixelRows() = default;
  explicit PixelRows(int64_t channels) : channels_(channels) {}

  int64_t bytes() const { return zero_row() + 2 * row_register; }
  // Where the row of a channel, or of no_channel, begins.
  int32_t operator[](int64_t channel) const {
    if (channel == no_channel) return static_cast<int32_t>(zero_row());
    const int64_t in_block = channel % block;
    return static_cast<int32_t>(channel / block * block_bytes + in_block % 8 * row_register +
                                in_block / 8 * row_part);
  }

  void clear_zero_row(char* rows) const {
    std::memset(rows + zero_row() - row_part, 0, static_cast<size_t>(row_register + 2 * row_part));
  }
  void fill(const BFloat16* from, int64_t stride, int64_t pixels, char* rows) const {
    with_pixels(from, stride, pixels,
                [&](const auto& pixel) GROUPCONV_INLINE_LAMBDA { fill_from(pixel, rows); });
  }

 private:
  static constexpr int64_t block = 16;  // of channels
  static constexpr int64_t block_bytes = 8 * row_register;

  int64_t zero_row() const { return divide_up(channels_, block) * block_bytes + row_part; }

  template <class Pixels>
  GROUPCONV_INLINE void fill_from(const Pixels& pixel, char* rows) const {
    const auto transpose = [&](auto load) GROUPCONV_INLINE_LAMBDA {
      __m512i v[8];
#pragma GCC unroll 8
      for (int j = 0; j < 8; ++j) {
        v[j] = _mm512_inserti64x4(_mm512_castsi256_si512(load(pixel(j))), load(pixel(j + 8)), 1);
      }
      transpose_parts(v);
#pragma GCC unroll 8
      for (int i = 0; i < 8; ++i) _mm512_store_si512(rows + i * row_register, v[i]);
      rows += block_bytes;
    };
    int64_t c = 0;
    for (; c + block <= channels_; c += block) {
      transpose([c](const BFloat16* p) GROUPCONV_INLINE_LAMBDA {
        return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + c));
      });
    }
    if (c < channels_) {
      const auto mask = Vec<float>::first(channels_ - c);
      transpose([c, mask](const BFloat16* p)
                    GROUPCONV_INLINE_LAMBDA { return _mm256_maskz_loadu_epi16(mask, p + c); });
    }
  }

  int64_t channels_ = 0;
};

// The row that begins at rows + places[i] becomes channel i of the pixels. `places` has zeros behind its end, up to a
// multiple of 16.
inline void rows_to_pixels(const char* rows, const int32_t* places, int64_t channels, BFloat16* to,
                           int64_t stride, int64_t pixels) {
  with_pixels(to, stride, pixels, [&](const auto& pixel) GROUPCONV_INLINE_LAMBDA {
    const auto transpose = [&](int64_t c, auto store) GROUPCONV_INLINE_LAMBDA {
      const int32_t* at = places + c;
      __m512i v[8];
#pragma GCC unroll 8
      for (int i = 0; i < 8; ++i) v[i] = load_two_rows(rows + at[i], rows + at[i + 8]);
      transpose_parts(v);
#pragma GCC unroll 8
      for (int j = 0; j < 8; ++j) {
        store(const_cast<BFloat16*>(pixel(j)) + c, _mm512_castsi512_si256(v[j]));
        store(const_cast<BFloat16*>(pixel(j + 8)) + c, _mm512_extracti64x4_epi64(v[j], 1));
      }
    };
    int64_t c = 0;
    for (; c + 16 <= channels; c += 16) {
      transpose(c, [](BFloat16* p, __m256i x)
                       GROUPCONV_INLINE_LAMBDA { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), x); });
    }
    if (c < channels) {
      const auto mask = Vec<float>::first(channels - c);
      transpose(c, [mask](BFloat16* p, __m256i x)
                       GROUPCONV_INLINE_LAMBDA { _mm256_mask_storeu_epi16(p, mask, x); });
    }
  });
}

}  // namespace
}  // namespace groupconv::cpu
