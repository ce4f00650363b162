// From rows back to images: residual and activation, narrowing, channels_last transposed, and the gaps between rows
// dropped. Channels are addressed one by one on the row side, so a permutation is free.
#pragma once

#include "core/problem.h"
#include "core/sweep.h"
#include "cpu/staging/planes.h"
#include "cpu/vector/activation.h"
#include "cpu/vector/convert.h"
#include "cpu/vector/transpose.h"
#include "cpu/vector/vec.h"

namespace groupconv::cpu {
namespace {

template <class T>
struct Finish {
  Activation activation;
  ClampRange<T> range;

  explicit Finish(Activation a) : activation(a), range(clamp_range<T>(a)) {}
};

// count elements: to[i] = act(from[i] + residual[i]), each with its own stride.
template <class Stored, class T>
GROUPCONV_INLINE void finish_run(const Finish<T>& finish, const T* from, int64_t from_stride,
                                 const Stored* residual, Stored* to, int64_t to_stride, int64_t count) {
  const auto run = [&](auto value) GROUPCONV_INLINE_LAMBDA {
    for (int64_t i = 0; i < count; ++i) {
      T x = from[i * from_stride];
      if (residual) x += widen(residual[i * to_stride]);
      narrow(value(x), to[i * to_stride]);
    }
  };
  if constexpr (in_vectors<Stored>) {
    const auto low = Vec<T>::broadcast(finish.range.low), high = Vec<T>::broadcast(finish.range.high);
    if (from_stride == 1 && to_stride == 1 && is_clamp(finish.activation)) {
      return for_each_vector<T>(count, [&](int64_t i, auto mask) GROUPCONV_INLINE_LAMBDA {
        auto x = Vec<T>::load(from + i, mask);
        if (residual) x = x + Vec<T>::load(residual + i, mask);
        clamp(low, high, x).store(to + i, mask);
      });
    }
    if constexpr (__is_same(Stored, T)) {
      // One phase of the input gradient of a step of two.
      if (from_stride == 1 && to_stride == 2 && is_clamp(finish.activation) && !residual) {
        constexpr int64_t lanes = Vec<T>::lanes;
        for (int64_t i = 0; i < count; i += lanes) {
          const int64_t some = smaller(lanes, count - i);
          const auto x = Vec<T>::load(from + i, Vec<T>::first(some));
          store_every_second(clamp(low, high, x), to + 2 * i, some);
        }
        return;
      }
    }
  }
  // Activations that are not clamps get a loop of their own: a switch per element would keep the
  // compiler from making vectors.
  switch (finish.activation) {
    case Activation::silu: return run([](T x) GROUPCONV_INLINE_LAMBDA { return silu(x); });
    case Activation::hardswish: return run([](T x) GROUPCONV_INLINE_LAMBDA { return hardswish(x); });
    default:
      return run([&](T x) GROUPCONV_INLINE_LAMBDA { return activate(Activation::none, x, finish.range); });
  }
}

#if defined(__AVX2__)
// Neighbouring pixels of a vector of channels: as many as a register is transposed into at once, whatever is there.
template <bool Whole, class Strip, class Stored>
GROUPCONV_INLINE void unstage_pixels(const Strip& strip, int64_t channels, int64_t pixels,
                                     const Finish<float>& finish, const Stored* residual, Stored* dest,
                                     int64_t pixel_stride) {
  using V_ = Vec<float>;
  const V_ low = V_::broadcast(finish.range.low), high = V_::broadcast(finish.range.high);
  const bool clamps = finish.activation != Activation::none;
  LongRegister column[columns_at_once];
  // May read past the last pixel: into the next row, or into the slack behind the last.
  load_columns(strip.rows(), column);
#pragma GCC unroll 4
  for (int64_t i = 0; i < columns_at_once; ++i) {
    if (!Whole && i == pixels) return;
    V_ x{column[i]};
    const int64_t at = i * pixel_stride;
    if constexpr (Whole && in_vectors<Stored>) {
      if (residual) x = x + V_::load(residual + at);
      if (clamps) x = clamp(low, high, x);
      x.store(dest + at);
    } else {
      if (residual) x = x + load_widened<float>(residual + at, channels);
      store_narrowed(clamp(low, high, x), dest + at, channels);
    }
  }
}
#endif

// One row per channel to pixels × channels of a channels_last image.
template <class Stored, class T>
void transpose_out(const T* rows, int64_t row_stride, int64_t pixels, int64_t channels,
                   const Finish<T>& finish, const Stored* residual, Stored* dest, int64_t pixel_stride) {
#if defined(__AVX2__)
  if constexpr (transposes_vectors<T>) {
    if (is_clamp(finish.activation)) {
      constexpr int lanes = Vec<T>::lanes;
      constexpr int64_t at_once = 256;  // whose lines stay in L1 until all of their pixels have been read
      constexpr int64_t line = 64 / sizeof(T);
      for (int64_t p = 0; p < pixels; p += line) {
        for (int64_t begin = 0; begin < channels; begin += at_once) {
          const int64_t end = smaller(begin + at_once, channels);
          for (int64_t q = p; q < smaller(p + line, pixels); q += columns_at_once) {
            const int64_t count = smaller(columns_at_once, pixels - q);
            const SpacedRows<T> from{rows + q, row_stride};
            Stored* to = dest + q * pixel_stride;
            const Stored* added = residual ? residual + q * pixel_stride : nullptr;
            int64_t c = begin;
            if (count == columns_at_once) {
              SpacedStrip<T> strip = whole_strip<lanes>(from, c);
              for (; c + lanes <= end; c += lanes) {
                unstage_pixels<true>(strip, lanes, count, finish, added ? added + c : nullptr, to + c,
                                     pixel_stride);
                for (int i = 0; i < lanes; i += 8) strip.move_eight_rows();
              }
            }
            for (; c < end; c += lanes) {
              const int64_t present = smaller<int64_t>(lanes, end - c);
              const ListedStrip<T, lanes> strip(from, c, present);
              unstage_pixels<false>(strip, present, count, finish, added ? added + c : nullptr, to + c,
                                    pixel_stride);
            }
          }
        }
      }
      return;
    }
  }
#endif
  for (int64_t p = 0; p < pixels; ++p) {
    finish_run(finish, rows + p, row_stride, residual ? residual + p * pixel_stride : nullptr,
               dest + p * pixel_stride, 1, channels);
  }
}

// The tile's lattice pixels from rows[i · row_stride + row · pitch + col] to the image's channel
// channels[i]; the gaps between lattice rows are dropped here.
template <class Stored, class T>
void unstage(const T* rows, int64_t row_stride, int64_t pitch, ChannelSet channels, const Sweep& sweep,
             const Tile& tile, const Finish<T>& finish, const Image<const Stored>& residual,
             const Image<Stored>& image, int64_t n) {
  const int64_t pixel_stride = sweep.dest_step_w * image.stride_w;
  const int64_t line_stride = sweep.dest_step_h * image.stride_h;
  const int64_t x = tile.col * sweep.dest_step_w + sweep.dest_origin_w;
  const int64_t y = tile.row * sweep.dest_step_h + sweep.dest_origin_h;
  const bool transposed = image.channels_last() && !channels.list;
  for (int64_t i = 0; i < (transposed ? 1 : channels.count); ++i) {
    const int64_t c = channels[i];
    const T* from = rows + i * row_stride;
    const Stored* added = residual.data ? residual.at(n, c, y, x) : nullptr;
    Stored* to = image.at(n, c, y, x);
    for (int64_t row = 0; row < tile.rows; ++row) {
      const Stored* added_row = added ? added + row * line_stride : nullptr;
      if (transposed) {
        transpose_out(from + row * pitch, row_stride, tile.cols, channels.count, finish, added_row,
                      to + row * line_stride, pixel_stride);
      } else if (pixel_stride == 1) {
        finish_run(finish, from + row * pitch, 1, added_row, to + row * line_stride, 1, tile.cols);
      } else {
        finish_run(finish, from + row * pitch, 1, added_row, to + row * line_stride, pixel_stride, tile.cols);
      }
    }
  }
}

}  // namespace
}  // namespace groupconv::cpu
