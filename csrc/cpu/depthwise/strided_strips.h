// Depthwise 3×3 with stride 2 in NCHW, down strips as in depthwise/strips.h: a vector of destination pixels from the
// top of the map to its bottom, all weights in registers. Two loads of a source row are cut into the pixels that the
// window's middle column reads and those of its last; the first column's are the last one's, a pixel further on.
// Where rows fill no more than half a vector, two channels share it.
//   registers  9 weights, 2 sums, 1 start, 2 loaded, 3 columns, 3 orders of lanes
//   loads      2 and a pixel for 3 multiply-adds in the window's middle row, for 6 in the row that two windows share
#pragma once

#include "cpu/depthwise/strips.h"

#if defined(__AVX512F__)

namespace groupconv::cpu {
namespace {

GROUPCONV_INLINE bool goes_down_strided_strips(const Sweep& sweep) {
  const TapGrid grid(sweep);
  return grid.rows == 3 && grid.cols == 3 && grid.row_step == 1 && grid.col_step == 1 &&
         sweep.source_step_h == 2 && sweep.source_step_w == 2 && sweep.dest_step_w == 1;
}

// Pixels 0, 2, 4, … of those loaded, and the others.
struct PixelPairs {
  Vec<float> evens, odds;

  GROUPCONV_INLINE PixelPairs(__m512 low, __m512 high)
      : evens(even(Vec<float>{low}, Vec<float>{high})),
        odds{_mm512_permutex2var_ps(
            low, _mm512_setr_epi32(1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31), high)} {}
  // Of bfloat16, in order.
  explicit GROUPCONV_INLINE PixelPairs(__m512i words)
      : evens{_mm512_castsi512_ps(_mm512_slli_epi32(words, 16))},
        odds{_mm512_castsi512_ps(_mm512_and_si512(words, _mm512_set1_epi32(static_cast<int>(0xffff0000u))))} {
  }
};

// `exists`: a bit for each pixel of a channel that is loaded.
struct WholePairs : WholeLanes<float> {
  static GROUPCONV_INLINE PixelPairs load_pairs(const float* a, const float*, uint32_t exists) {
    return {_mm512_maskz_loadu_ps(static_cast<__mmask16>(exists), a),
            _mm512_maskz_loadu_ps(static_cast<__mmask16>(exists >> 16), a + 16)};
  }
  static GROUPCONV_INLINE PixelPairs load_pairs(const BFloat16* a, const BFloat16*, uint32_t exists) {
    return PixelPairs(_mm512_maskz_loadu_epi16(exists, a));
  }
  static GROUPCONV_INLINE __m512i one_further_on() {
    return _mm512_setr_epi32(16, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14);
  }
};

struct HalfPairs : HalfLanes {
  static GROUPCONV_INLINE PixelPairs load_pairs(const float* a, const float* b, uint32_t exists) {
    return {_mm512_maskz_loadu_ps(static_cast<__mmask16>(exists), a),
            _mm512_maskz_loadu_ps(static_cast<__mmask16>(exists), b)};
  }
  static GROUPCONV_INLINE PixelPairs load_pairs(const BFloat16* a, const BFloat16* b, uint32_t exists) {
    const auto m = static_cast<__mmask16>(exists);
    return PixelPairs(_mm512_inserti64x4(_mm512_castsi256_si512(_mm256_maskz_loadu_epi16(m, a)),
                                         _mm256_maskz_loadu_epi16(m, b), 1));
  }
  static GROUPCONV_INLINE __m512i one_further_on() {
    return _mm512_setr_epi32(16, 0, 1, 2, 3, 4, 5, 6, 24, 8, 9, 10, 11, 12, 13, 14);
  }
};

template <class Lanes, bool Plain, class Stored>
void run_strided_strip(const StripJob<float>& job, const StripChannel<Stored>* channel) {
  using V_ = Vec<float>;
  constexpr int window = 3;
  const StripChannel<Stored>& a = channel[0];
  const StripChannel<Stored>& b = channel[Lanes::channels - 1];
  V_ w[window][window];
#pragma GCC unroll 9
  for (int t = 0; t < window * window; ++t) {
    w[t / window][t % window] = Lanes::broadcast(a.weight + job.taps[t], b.weight + job.taps[t]);
  }
  const V_ start = Lanes::broadcast(&a.start, &b.start);
  const V_ low = V_::broadcast(job.range.low), high = V_::broadcast(job.range.high);
  const auto stored = Lanes::mask((1u << job.stored) - 1);
  const __m512i one_further_on = Lanes::one_further_on();
  const int64_t height = job.height, source_stride = job.source_stride, dest_stride = job.dest_stride;
  const uint32_t exists = job.inside[1];
  // The pixel before those that are loaded: in the image, or always the same zero.
  const Stored outside{};
  const bool has_before = job.inside[0] & 1;
  const Stored* before[] = {has_before ? a.source : &outside, has_before ? b.source : &outside};
  const int64_t before_stride = has_before ? source_stride : 0;
  const Stored *from_a = a.source + 1, *from_b = b.source + 1;
  int64_t y = job.first_row, from = 0, from_before = 0, to = 0;

  // `add` with source row y as the window's columns see it, if there is such a row.
  const auto with_row = [&](const auto& add) GROUPCONV_INLINE_LAMBDA {
    if (__builtin_expect(y >= 0 && y < height, 1)) {
      PixelPairs x = Lanes::load_pairs(from_a + from, from_b + from, exists);
      const float first[] = {widen(before[0][from_before]), widen(before[1][from_before])};
      V_ shifted{_mm512_permutex2var_ps(x.odds.v, one_further_on, Lanes::broadcast(first, first + 1).v)};
      pin(x.evens), pin(x.odds), pin(shifted);
      const V_ columns[window] = {shifted, x.evens, x.odds};
#pragma GCC unroll 3
      for (int j = 0; j < window; ++j) add(columns[j], j);
    }
    ++y;
    from += source_stride;
    from_before += before_stride;
  };
  V_ next = start;
  with_row([&](V_ x, int j) GROUPCONV_INLINE_LAMBDA { next = multiply_add(w[0][j], x, next); });
  while (y < job.end_row) {
    V_ sum = next;
    next = start;
    with_row([&](V_ x, int j) GROUPCONV_INLINE_LAMBDA { sum = multiply_add(w[1][j], x, sum); });
    with_row([&](V_ x, int j) GROUPCONV_INLINE_LAMBDA {
      sum = multiply_add(w[2][j], x, sum);
      next = multiply_add(w[0][j], x, next);
    });
    if constexpr (!Plain) {
      if (a.residual) sum = sum + Lanes::load(a.residual + to, b.residual + to, stored);
      if (job.clamped) sum = clamp(low, high, sum);
    }
    Lanes::store(sum, a.dest + to, b.dest + to, stored);
    to += dest_stride;
  }
}

template <class Lanes, class Stored>
void run_strided_strip(const StripJob<float>& job, const StripChannel<Stored>* channel) {
  if (channel->residual || job.clamped) return run_strided_strip<Lanes, false>(job, channel);
  run_strided_strip<Lanes, true>(job, channel);
}

// A channel, or two where they share vectors, which no row may overflow then. There is place for one more.
template <class Stored>
void run_strided_strip(const StripJob<float>& job, StripChannel<Stored>* channels, int64_t count,
                       bool halves) {
  if (!halves) return run_strided_strip<WholePairs>(job, channels);
  if (count == 1) channels[1] = channels[0];  // computed twice
  run_strided_strip<HalfPairs>(job, channels);
}

}  // namespace
}  // namespace groupconv::cpu

#endif
