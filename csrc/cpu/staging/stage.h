// From images to rows. Kernels work on rows: one channel's pixels, next to each other, in the type that is computed
// in. An NCHW image of that type already is rows and is used where it lies; everything else passes through a scratch
// tile that stays in cache. On the way there: prologue, padding, a strided source split into its phases, widening,
// channels_last transposed. Channels are addressed one by one on the row side, so a permutation is free.
#pragma once

#include "core/problem.h"
#include "cpu/staging/planes.h"
#include "cpu/staging/prologue.h"
#include "cpu/staging/workspace.h"
#include "cpu/vector/convert.h"
#include "cpu/vector/fetched_lines.h"
#include "cpu/vector/pair.h"
#include "cpu/vector/row_gaps.h"
#include "cpu/vector/transpose.h"
#include "cpu/vector/vec.h"

namespace groupconv::cpu {
namespace {

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

template <class Stored>
constexpr bool expands_rows = has_compress && in_vectors<Stored>;

// A flat image of whose rows the planes hold all columns, read one pixel after another: one plane, and not
// channels_last.
template <class Stored, class T>
GROUPCONV_INLINE bool stages_vectors(const Image<const Stored>& image, const Planes& planes, int64_t pitch) {
  if (!expands_rows<Stored> || !(channels_in<T> == 2 || __is_same(T, compute_t<Stored>))) return false;
  if (planes.count != 1 || planes.step_h != 1 || planes.step_w != 1) return false;
  const int64_t left = planes.first_col + planes.phases[0].col;
  return !image.channels_last() && image.stride_w == 1 && image.flat() && left <= 0 &&
         left + pitch >= image.width;
}

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
        __builtin_prefetch(fetched + gap->before, 0, into_l2);
        const uint32_t lanes = gap->lanes & Vec<T>::bits(stored);
        const Vec<T> x = load(gap->before, Vec<T>::first(__builtin_popcount(lanes)));
        expand(x, lanes).store(to + at, stored);
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

}  // namespace
}  // namespace groupconv::cpu
