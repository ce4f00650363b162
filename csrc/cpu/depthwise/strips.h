// Depthwise 3×3 with stride 1 in NCHW, down strips: a strip is one vector of neighbouring pixels, from the top of the
// map to its bottom. All weights stay in registers, a source row meets the three rows of sums that it belongs to, and
// what there is to set up comes once a strip.
//
// A row's sum is nine multiply-adds one after the other, more than a core finds work besides in one strip. So two
// strips go down side by side, of two channels; and where rows fill no more than half a vector, each strip has a
// channel in either half.
//   registers  2 · (9 weights, 3 sums, 1 start), 1 source
//   loads      3 for 9 multiply-adds, 6 where a vector is two channels
#pragma once

#include "cpu/depthwise/depthwise.h"
#include "cpu/vector/vec.h"

namespace groupconv::cpu {
namespace {

GROUPCONV_INLINE bool goes_down_strips(const Sweep& sweep) {
  const TapGrid grid(sweep);
  return grid.rows == 3 && grid.cols == 3 && grid.row_step == 1 && grid.col_step == 1 &&
         sweep.source_step_h == 1 && sweep.source_step_w == 1 && sweep.dest_step_w == 1;
}

// What the strips of one tile have in common. Rows are counted in the source: sums begin with the two rows before
// `first_row + 2`, so `end_row - first_row - 2` destination rows are made.
template <class T>
struct StripJob {
  int64_t first_row, end_row, height;
  int64_t source_stride, dest_stride;  // from row to row
  const uint32_t* inside;              // [3] of the window's columns: which pixels of a load exist
  int64_t stored;                      // pixels
  const int64_t* taps;                 // [9] of the window, by rows: where in a channel's weights
  bool clamped;
  ClampRange<T> range;
};

template <class Stored>
struct StripChannel {
  using T = compute_t<Stored>;
  const Stored* source;  // first_row, at the window's first column; may be no pixel of the image
  const T* weight;
  T start;
  Stored* dest;
  const Stored* residual;  // at dest's strides; null for all channels or for none
};

constexpr bool has_halves = vector_registers == 32;
constexpr int strips_at_once = vector_registers == 32 ? 2 : 1;
// Pixels of a row that half a vector holds.
template <class T>
constexpr int64_t half_lanes = has_halves ? Vec<T>::lanes / 2 : 0;

// A vector of one channel's pixels.
template <class T>
class WholeLanes {
  using V_ = Vec<T>;

 public:
  static constexpr int channels = 1;
  using Mask = typename V_::Mask;

  static Mask mask(uint32_t bits) { return V_::from_bits(bits); }
  static GROUPCONV_INLINE Mask every(Mask m) { return m; }  // of all channels' lanes
  static GROUPCONV_INLINE V_ broadcast(const T* a, const T*) { return V_::broadcast(*a); }
  template <class Stored>
  static GROUPCONV_INLINE V_ load(const Stored* a, const Stored*, Mask m) {
    return V_::load(a, m);
  }
  template <class Stored>
  static GROUPCONV_INLINE void store(V_ x, Stored* a, Stored*, Mask m) {
    x.store(a, m);
  }
  template <int Count>
  static GROUPCONV_INLINE void sum_each(const V_* sums, T* a, T*) {
    cpu::sum_each<Count>(sums, a);
  }
};

#if defined(__AVX512F__)
// Two channels' pixels, the second one's in the upper half.
class HalfLanes {
  using V_ = Vec<float>;

 public:
  static constexpr int channels = 2;
  using Mask = __mmask8;  // of either half

  static Mask mask(uint32_t bits) { return static_cast<Mask>(bits); }
  static GROUPCONV_INLINE V_::Mask every(Mask m) { return static_cast<V_::Mask>(m | m << 8); }
  static GROUPCONV_INLINE V_ broadcast(const float* a, const float* b) {
    constexpr auto upper = static_cast<__mmask16>(0xff00);
    return {_mm512_mask_broadcastss_ps(_mm512_set1_ps(*a), upper, _mm_load_ss(b))};
  }
  // Two short loads: a long one takes two cache lines nearly always, masked or not.
  static GROUPCONV_INLINE V_ load(const float* a, const float* b, Mask m) {
    return {_mm512_insertf32x8(_mm512_castps256_ps512(_mm256_maskz_loadu_ps(m, a)),
                               _mm256_maskz_loadu_ps(m, b), 1)};
  }
  static GROUPCONV_INLINE void store(V_ x, float* a, float* b, Mask m) {
    _mm256_mask_storeu_ps(a, m, _mm512_castps512_ps256(x.v));
    _mm256_mask_storeu_ps(b, m, _mm512_extractf32x8_ps(x.v, 1));
  }
  static GROUPCONV_INLINE V_ load(const BFloat16* a, const BFloat16* b, Mask m) {
    return V_::widened(_mm256_inserti128_si256(_mm256_castsi128_si256(_mm_maskz_loadu_epi16(m, a)),
                                               _mm_maskz_loadu_epi16(m, b), 1));
  }
  static GROUPCONV_INLINE void store(V_ x, BFloat16* a, BFloat16* b, Mask m) {
    const __m256i words = x.rounded();
    _mm_mask_storeu_epi16(a, m, _mm256_castsi256_si128(words));
    _mm_mask_storeu_epi16(b, m, _mm256_extracti128_si256(words, 1));
  }
  template <int Count>
  static GROUPCONV_INLINE void sum_each(const V_* sums, float* a, float* b) {
    sum_each_half<Count>(sums, a, b);
  }
};
#endif

template <class Lanes, int Strips, bool Plain, class T, class Stored>
void run_strips(const StripJob<T>& job, const StripChannel<Stored>* channel) {
  using V_ = Vec<T>;
  constexpr int window = 3;
  constexpr int second = Lanes::channels - 1;  // channel in a vector
  V_ w[Strips][window][window], start[Strips];
  const Stored* source[Strips][2];
  Stored* dest[Strips][2];
  const Stored* residual[Strips][2];
#pragma GCC unroll 2
  for (int s = 0; s < Strips; ++s) {
    const StripChannel<Stored>& a = channel[s * Lanes::channels];
    const StripChannel<Stored>& b = channel[s * Lanes::channels + second];
    start[s] = Lanes::broadcast(&a.start, &b.start);
    source[s][0] = a.source, source[s][1] = b.source;
    dest[s][0] = a.dest, dest[s][1] = b.dest;
    residual[s][0] = a.residual, residual[s][1] = b.residual;
#pragma GCC unroll 9
    for (int t = 0; t < window * window; ++t) {
      w[s][t / window][t % window] = Lanes::broadcast(a.weight + job.taps[t], b.weight + job.taps[t]);
    }
  }
  typename Lanes::Mask inside[window];
#pragma GCC unroll 3
  for (int j = 0; j < window; ++j) inside[j] = Lanes::mask(job.inside[j]);
  const auto stored = Lanes::mask((1u << job.stored) - 1);
  const V_ low = V_::broadcast(job.range.low), high = V_::broadcast(job.range.high);
  const int64_t height = job.height, source_stride = job.source_stride, dest_stride = job.dest_stride;
  const int64_t end = job.end_row;
  int64_t y = job.first_row, from = 0, to = 0;

  V_ sums[window][Strips];
  // Source row y is the last of the sums stored, and the first of `newest`.
  const auto add_row = [&](V_(&newest)[Strips], V_(&middle)[Strips], V_(&oldest)[Strips],
                           bool completes) GROUPCONV_INLINE_LAMBDA {
#pragma GCC unroll 2
    for (int s = 0; s < Strips; ++s) newest[s] = start[s];
    if (__builtin_expect(y >= 0 && y < height, 1)) {
#pragma GCC unroll 3
      for (int j = 0; j < window; ++j) {
#pragma GCC unroll 2
        for (int s = 0; s < Strips; ++s) {
          V_ x = Lanes::load(source[s][0] + from + j, source[s][1] + from + j, inside[j]);
          pin(x);
          oldest[s] = multiply_add(w[s][2][j], x, oldest[s]);
          middle[s] = multiply_add(w[s][1][j], x, middle[s]);
          newest[s] = multiply_add(w[s][0][j], x, newest[s]);
        }
      }
    }
    if (completes) {
#pragma GCC unroll 2
      for (int s = 0; s < Strips; ++s) {
        V_ sum = oldest[s];
        if constexpr (!Plain) {
          if (residual[0][0]) sum = sum + Lanes::load(residual[s][0] + to, residual[s][1] + to, stored);
          if (job.clamped) sum = clamp(low, high, sum);
        }
        Lanes::store(sum, dest[s][0] + to, dest[s][1] + to, stored);
      }
      to += dest_stride;
    }
    ++y;
    from += source_stride;
    return y < end;
  };
#pragma GCC unroll 2
  for (int s = 0; s < Strips; ++s) sums[1][s] = sums[2][s] = start[s];
  add_row(sums[0], sums[2], sums[1], false);
  add_row(sums[1], sums[0], sums[2], false);
  while (add_row(sums[2], sums[1], sums[0], true) && add_row(sums[0], sums[2], sums[1], true) &&
         add_row(sums[1], sums[0], sums[2], true)) {
  }
}

template <class Lanes, int Strips, class T, class Stored>
void run_strips(const StripJob<T>& job, const StripChannel<Stored>* channel) {
  if (channel->residual || job.clamped) return run_strips<Lanes, Strips, false>(job, channel);
  run_strips<Lanes, Strips, true>(job, channel);
}

// `count` channels: up to one for each strip, or two where they share vectors, which no row may overflow then. There
// is place for one more.
template <class T, class Stored>
void run_strips(const StripJob<T>& job, StripChannel<Stored>* channels, int64_t count,
                [[maybe_unused]] bool halves) {
#if defined(__AVX512F__)
  if constexpr (__is_same(T, float)) {
    if (halves) {
      // One without a partner is computed twice.
      if (count % 2 == 1) channels[count] = channels[count - 1];
      return count > 2 ? run_strips<HalfLanes, 2>(job, channels) : run_strips<HalfLanes, 1>(job, channels);
    }
  }
#endif
  if constexpr (strips_at_once == 2) {
    if (count == 2) return run_strips<WholeLanes<T>, 2>(job, channels);
  }
  run_strips<WholeLanes<T>, 1>(job, channels);
}

}  // namespace
}  // namespace groupconv::cpu
