// Between images and rows. Kernels work on rows: one channel's pixels, next to each other, in the type
// that is computed in. An NCHW image of that type already is rows and is used where it lies; everything
// else passes through a scratch tile that stays in cache:
//   stage    image → rows: prologue, pads, splits a strided source into its phases, widens, transposes
//            channels_last
//   unstage  rows → image: residual and activation, narrows, transposes back
// Channels are addressed one by one on the row side, so a permutation is free in both directions.
#pragma once

#include "core/problem.h"
#include "core/sweep.h"
#include "cpu/staging/prologue.h"
#include "cpu/vector/activation.h"
#include "cpu/vector/convert.h"
#include "cpu/vector/pair.h"
#include "cpu/vector/row_gaps.h"
#include "cpu/vector/transpose.h"
#include "cpu/vector/vec.h"

namespace groupconv::cpu {
namespace {

// A rectangle of a sweep's lattice.
struct Tile {
  int64_t row, col, rows, cols;
};

// Rows of scratch are an odd number of cache lines apart: with a round distance all rows would compete
// for a few sets of the L1, and walking across channels would miss on every one.
template <class T>
GROUPCONV_INLINE int64_t row_distance(int64_t length) {
  constexpr int64_t line = 64 / sizeof(T);
  return (divide_up(length, line) | 1) * line;
}

// How far ahead of itself what gathers pixels asks memory for more: numbers.
constexpr int64_t fetched_ahead = 1024;

// Shape of the scratch that one tile's source needs: one plane per phase per channel.
struct PlaneShape {
  int64_t rows, pitch, size;

  PlaneShape(const Sweep& sweep, const Tile& tile)
      : rows(tile.rows + sweep.halo_rows), pitch(tile.cols + sweep.halo_cols), size(rows * pitch) {}
};

// Which pixels of an image become which plane: plane p holds the source pixels
// (first_row + row) · step + phases[p], for the tile's rows and columns.
struct Planes {
  int64_t first_row, first_col, step_h, step_w;
  const Phase* phases;
  int64_t count;
  Phase least{0, 0}, most{0, 0};  // of all phases

  explicit Planes(const Sweep& sweep)
      : first_row(sweep.first_row),
        first_col(sweep.first_col),
        step_h(sweep.source_step_h),
        step_w(sweep.source_step_w),
        phases(sweep.phases.data()),
        count(static_cast<int64_t>(sweep.phases.size())) {
    if (count > 0) least = most = phases[0];
    for (int64_t p = 1; p < count; ++p) {
      least = {smaller(least.row, phases[p].row), smaller(least.col, phases[p].col)};
      most = {larger(most.row, phases[p].row), larger(most.col, phases[p].col)};
    }
  }
  // The lattice itself, one plane.
  explicit Planes(const Phase& origin)
      : first_row(0), first_col(0), step_h(1), step_w(1), phases(&origin), count(1) {}
  Planes(Sweep&&) = delete;  // the phases stay where they are
  Planes(Phase&&) = delete;

  // A tile's planes reach beyond the image.
  bool padded(const Tile& tile, const PlaneShape& shape, int64_t height, int64_t width) const {
    const int64_t row = first_row + tile.row, col = first_col + tile.col;
    return row * step_h + least.row < 0 || col * step_w + least.col < 0 ||
           (row + shape.rows - 1) * step_h + most.row >= height ||
           (col + shape.pitch - 1) * step_w + most.col >= width;
  }
};

// Lattice positions of a tile, counted in its flattened rows; the gap between two rows is included.
GROUPCONV_INLINE int64_t tile_length(const Tile& tile, int64_t pitch) {
  return (tile.rows - 1) * pitch + tile.cols;
}

template <class T>
GROUPCONV_INLINE void fill_zero(T* p, int64_t count) {
  std::memset(p, 0, static_cast<size_t>(count) * sizeof(T));
}

template <class Stored, class T>
GROUPCONV_INLINE void widen_row(const Stored* from, int64_t stride, T* to, int64_t count) {
  if constexpr (__is_same(Stored, T)) {
    if (stride == 1) {
      return for_each_vector<T>(count, [&](int64_t i, auto mask) GROUPCONV_INLINE_LAMBDA {
        Vec<T>::load(from + i, mask).store(to + i, mask);
      });
    }
  }
  if (stride == 1) {
    for (int64_t p = 0; p < count; ++p) to[p] = element_of<T>(from[p]);
  } else if (stride == 2) {
    for (int64_t p = 0; p < count; ++p) to[p] = element_of<T>(from[2 * p]);
  } else {
    for (int64_t p = 0; p < count; ++p) to[p] = element_of<T>(from[p * stride]);
  }
}

// to[p] = a number of the row and one of its partner, or zero where there is none.
template <class Element, class Stored>
GROUPCONV_INLINE void interleave_row(const Element* row, const Element* partner, Pair<Stored>* to,
                                     int64_t count) {
  using V_ = Vec<Pair<Stored>>;
  int64_t done = 0;
  if constexpr (__is_same(Element, Stored)) {
    for (; partner && done + 2 * V_::lanes <= count; done += 2 * V_::lanes) {
      V_ pairs[2];
      V_::interleave_two(row + done, partner + done, pairs);
      pairs[0].store(to + done);
      pairs[1].store(to + done + V_::lanes);
    }
  }
  for_each_vector<Pair<Stored>>(count - done, [&](int64_t i, auto mask) GROUPCONV_INLINE_LAMBDA {
    i += done;
    V_::interleave(row + i, partner ? partner + i : nullptr, mask).store(to + i, mask);
  });
}
template <class Stored>
GROUPCONV_INLINE void interleave_row(const Stored* row, const Stored* partner, int64_t stride,
                                     Pair<Stored>* to, int64_t count) {
  if (stride == 1) return interleave_row(row, partner, to, count);
  for (int64_t p = 0; p < count; ++p) {
    to[p] = {row[p * stride], partner ? partner[p * stride] : Stored{0}};
  }
}

// The same after the prologue.
template <class Stored, class T>
GROUPCONV_INLINE void widen_prepared_row(const Affine<T>& affine, const Stored* from, int64_t stride, T* to,
                                         int64_t count) {
  if constexpr (__is_same(Stored, T)) {
    if (stride == 1) return prepare_row(affine, from, to, count);
  }
  widen_row(from, stride, to, count);
  prepare_row(affine, to, to, count);
}

// The part of `count` plane columns, from plane coordinate `first` on, that lies inside the image.
struct Inside {
  int64_t begin, end;

  Inside(int64_t first, int64_t count, int64_t step, int64_t phase, int64_t size) {
    const int64_t from = first * step + phase;
    begin = smaller(count, from < 0 ? steps(-from, step) : 0);
    end = larger(begin, smaller(count, from < size ? steps(size - from, step) : 0));
  }
  static int64_t steps(int64_t distance, int64_t step) {
    return step == 1 ? distance : divide_up(distance, step);
  }
};

// Which channels to stage: all of them in order, or a list.
struct ChannelSet {
  const int32_t* list;  // null: 0, 1, 2, …
  int64_t count;

  int64_t operator[](int64_t i) const { return list ? list[i] : i; }
};

// What is staged as it is multiplied, not as it is summed, has no prologue.
template <class T>
constexpr bool takes_prologue = __is_same(T, sum_t<T>);

// A row of all channels of a channels_last image to rows, after the prologue where there is one: some
// channels at a time, which are still in L1 when it comes to them.
template <class Stored, class T>
void transpose_row(const Stored* source, int64_t pixel_stride, int64_t pixels, int64_t channels, T* rows,
                   int64_t row_stride, const Prologue<sum_t<T>>& prologue) {
  constexpr int64_t at_once = 32;
  if constexpr (takes_prologue<T>) {
    for (int64_t first = 0; prologue && first < channels; first += at_once) {
      const int64_t count = smaller(at_once, channels - first);
      T* some = rows + first * row_stride;
      transpose_in(source + first, pixel_stride, pixels, count, some, row_stride);
      for (int64_t c = 0; c < count; ++c) {
        T* row = some + c * row_stride;
        prepare_row(affine_of(prologue, first + c), row, row, pixels);
      }
    }
  }
  if (!prologue) transpose_in(source, pixel_stride, pixels, channels, rows, row_stride);
}

// Planes that reach beyond the image are zero there; copying pixels in never touches the padding again.
template <class T>
void clear_planes(const Planes& planes, int64_t plane_distance, int64_t rows, const PlaneShape& shape,
                  T* scratch, int64_t channel_distance) {
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t plane = 0; plane < planes.count; ++plane) {
      fill_zero(scratch + i * channel_distance + plane * plane_distance, shape.size);
    }
  }
}

// Fills scratch[i · channel_distance + plane · plane_distance + row · pitch + col] for the i-th channel of
// the set, or the i-th pair of channels, the padding excepted.
template <class Stored, class T>
void copy_planes(const Image<const Stored>& image, int64_t n, ChannelSet channels, const Planes& planes,
                 const Tile& tile, const PlaneShape& shape, T* scratch, int64_t channel_distance,
                 int64_t plane_distance, const Prologue<sum_t<T>>& prologue) {
  const int64_t first_row = planes.first_row + tile.row, first_col = planes.first_col + tile.col;
  const int64_t pixel_stride = planes.step_w * image.stride_w;
  const bool transposed = channels_in<T> == 1 && image.channels_last() && !channels.list;
  for (int64_t plane = 0; plane < planes.count; ++plane) {
    const Phase phase = planes.phases[plane];
    const Inside cols(first_col, shape.pitch, planes.step_w, phase.col, image.width);
    const Inside rows(first_row, shape.rows, planes.step_h, phase.row, image.height);
    const int64_t x = (first_col + cols.begin) * planes.step_w + phase.col;
    const int64_t count = cols.end - cols.begin;
    if (count == 0 || rows.begin == rows.end) continue;
    const int64_t y = (first_row + rows.begin) * planes.step_h + phase.row;
    const int64_t row_stride = planes.step_h * image.stride_h;
    T* first = scratch + plane * plane_distance + rows.begin * shape.pitch + cols.begin;
    if constexpr (channels_in<T> == 1) {
      if (transposed) {
        const Stored* from = image.at(n, 0, y, x);
        for (int64_t row = 0; row < rows.end - rows.begin; ++row) {
          transpose_row(from + row * row_stride, pixel_stride, count, channels.count,
                        first + row * shape.pitch, channel_distance, prologue);
        }
        continue;
      }
    }
    for (int64_t i = 0; i < operands_for<T>(channels.count); ++i) {
      const int64_t first_channel = channels_in<T> * i;
      const Stored* from = image.at(n, channels[first_channel], y, x);
      T* to = first + i * channel_distance;
      if constexpr (channels_in<T> == 2) {
        const bool paired = first_channel + 1 < channels.count;
        const Stored* partner = paired ? image.at(n, channels[first_channel + 1], y, x) : nullptr;
        for (int64_t row = 0; row < rows.end - rows.begin; ++row) {
          const int64_t at = row * row_stride;
          interleave_row(from + at, paired ? partner + at : nullptr, pixel_stride, to + row * shape.pitch,
                         count);
        }
      } else {
        if constexpr (takes_prologue<T>) {
          if (prologue) {
            const Affine<T> affine = affine_of(prologue, channels[i]);
            for (int64_t row = 0; row < rows.end - rows.begin; ++row) {
              widen_prepared_row(affine, from + row * row_stride, pixel_stride, to + row * shape.pitch,
                                 count);
            }
            continue;
          }
        }
        for (int64_t row = 0; row < rows.end - rows.begin; ++row) {
          widen_row(from + row * row_stride, pixel_stride, to + row * shape.pitch, count);
        }
      }
    }
  }
}

template <class Stored, class T>
void stage(const Image<const Stored>& image, int64_t n, ChannelSet channels, const Planes& planes,
           const Tile& tile, const PlaneShape& shape, T* scratch, int64_t channel_distance,
           int64_t plane_distance, const Prologue<sum_t<T>>& prologue = {}) {
  if (planes.padded(tile, shape, image.height, image.width)) {
    clear_planes(planes, plane_distance, operands_for<T>(channels.count), shape, scratch, channel_distance);
  }
  copy_planes(image, n, channels, planes, tile, shape, scratch, channel_distance, plane_distance, prologue);
}

// A flat image of whose rows the planes hold all columns, read one pixel after another: one plane, and not
// channels_last.
template <class Stored, class T>
GROUPCONV_INLINE bool stages_vectors(const Image<const Stored>& image, const Planes& planes, int64_t pitch) {
  if (!has_compress || !in_vectors<Stored> || !(channels_in<T> == 2 || __is_same(T, compute_t<Stored>)))
    return false;
  if (planes.count != 1 || planes.step_h != 1 || planes.step_w != 1) return false;
  const int64_t left = planes.first_col + planes.phases[0].col;
  return !image.channels_last() && image.stride_w == 1 && image.flat() && left <= 0 &&
         left + pitch >= image.width;
}

#if defined(__AVX512F__)
// As stage() does it, row ends and padding by the vector: `gaps` says which columns of a row of `shape` lie in the
// image.
template <class Stored, class T>
void stage_vectors(const Image<const Stored>& image, int64_t n, ChannelSet channels, const Planes& planes,
                   const Tile& tile, const PlaneShape& shape, const GapVector* gaps, T* scratch,
                   int64_t channel_distance, const Prologue<sum_t<T>>& prologue = {}) {
  const int64_t top = planes.first_row + tile.row + planes.phases[0].row;
  const Inside rows(top, shape.rows, 1, 0, image.height);
  const int64_t begin = rows.begin * shape.pitch, length = rows.end * shape.pitch - begin;
  for (int64_t i = 0; i < operands_for<T>(channels.count); ++i, scratch += channel_distance) {
    const auto row = [&](int64_t channel) { return image.at(n, channels[channel], top + rows.begin, 0); };
    T* to = scratch + begin;
    // Meanwhile memory brings the next channel: a list of channels leads anywhere, so nobody else can guess it.
    const int64_t next = channels_in<T> * (i + 1);
    const Stored* fetched = row(next < channels.count ? next : channels_in<T> * i);
    fill_zero(scratch, begin);
    // load(pixels before, which are there)
    const auto copy = [&](auto load) GROUPCONV_INLINE_LAMBDA {
      const GapVector* gap = gaps;
      for_each_vector<T>(length, [&](int64_t at, auto stored) GROUPCONV_INLINE_LAMBDA {
        __builtin_prefetch(fetched + gap->before, 0, 2);
        const uint32_t lanes = gap->lanes & stored;
        const Vec<T> x = load(gap->before, Vec<T>::first(__builtin_popcount(lanes)));
        expand(x, Vec<T>::from_bits(lanes)).store(to + at, stored);
        ++gap;
      });
    };
    if constexpr (channels_in<T> == 2) {
      const Stored* from = row(2 * i);
      const Stored* partner = 2 * i + 1 < channels.count ? row(2 * i + 1) : nullptr;
      copy([&](int64_t at, auto mask) GROUPCONV_INLINE_LAMBDA {
        return Vec<T>::interleave(from + at, partner ? partner + at : nullptr, mask);
      });
    } else {
      const Stored* from = row(i);
      if (prologue) {
        const Affine<T> affine = affine_of(prologue, channels[i]);
        copy([&](int64_t at, auto mask)
                 GROUPCONV_INLINE_LAMBDA { return affine(Vec<T>::load(from + at, mask)); });
      } else {
        copy([&](int64_t at, auto mask) GROUPCONV_INLINE_LAMBDA { return Vec<T>::load(from + at, mask); });
      }
    }
    fill_zero(to + length, shape.size - begin - length);
  }
}
#endif

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
