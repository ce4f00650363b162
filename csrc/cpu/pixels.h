// The channels_last counterpart of rows: whole pixels, as the kernels with lanes over channels read them.
//
// An image can be read as it lies where no tap leaves it and it is stored in the type that is computed in.
// Otherwise a tile's pixels are copied, padding included, with their channels in the order in which the
// groups read them.
#pragma once

#include "core/partition.h"
#include "cpu/staging.h"
#include "cpu/vec.h"

namespace groupconv::cpu {
namespace {

// A tap's source coordinate, relative to the lattice pixel's.
struct Shift {
  int64_t row, col;
};
GROUPCONV_INLINE Shift shift_of(const Sweep& sweep, const Tap& tap) {
  const Phase& phase = sweep.phases[static_cast<size_t>(tap.plane)];
  return {(sweep.first_row + tap.row) * sweep.source_step_h + phase.row,
          (sweep.first_col + tap.col) * sweep.source_step_w + phase.col};
}

// The first and the last source pixel that some tap reads, relative to the lattice pixel's own.
struct Reach {
  int64_t top = 0, bottom = 0, left = 0, right = 0;

  explicit Reach(const Sweep& sweep) {
    for (size_t t = 0; t < sweep.taps.size(); ++t) {
      const Shift shift = shift_of(sweep, sweep.taps[t]);
      top = t ? smaller(top, shift.row) : shift.row;
      bottom = t ? larger(bottom, shift.row) : shift.row;
      left = t ? smaller(left, shift.col) : shift.col;
      right = t ? larger(right, shift.col) : shift.col;
    }
  }
  int64_t rows() const { return bottom - top + 1; }
  int64_t cols() const { return right - left + 1; }

  bool inside(const Sweep& sweep, int64_t height, int64_t width) const {
    return top >= 0 && left >= 0 && (sweep.rows - 1) * sweep.source_step_h + bottom < height &&
           (sweep.cols - 1) * sweep.source_step_w + right < width;
  }
};

constexpr int most_vectors = 2;  // of channels, in a tile of registers

// A group's channels in blocks that a tile of registers takes: body(first, how many, lanes they take).
template <class T, class Body>
GROUPCONV_INLINE void for_each_lane_block(int64_t channels, const Body& body) {
  constexpr int64_t lanes = Vec<T>::lanes;
  for (int64_t first = 0; first < channels; first += most_vectors * lanes) {
    const int64_t count = smaller(most_vectors * lanes, channels - first);
    body(first, count, divide_up(count, lanes) * lanes);
  }
}

// The groups take the channels one after the other: 0, 1, 2, …
GROUPCONV_INLINE bool in_order(const ChannelLists& lists, int64_t groups) {
  for (int64_t i = 0; i < lists.offsets[groups]; ++i) {
    if (lists.channels[i] != i) return false;
  }
  return true;
}

// Lanes over the channels of a group are used to three quarters at least.
template <class T>
bool fills_lanes(const ChannelLists& lists, int64_t groups) {
  int64_t channels = 0, taken = 0;
  for (int64_t g = 0; g < groups; ++g) {
    channels += lists.count(g);
    taken += divide_up(lists.count(g), Vec<T>::lanes) * Vec<T>::lanes;
  }
  return 4 * channels >= 3 * taken;
}

// Neighbouring lattice pixels, and where their results go.
template <class T>
struct PixelRun {
  const T* source;
  int64_t pixel_stride, pixels;
  T* dest;
  int64_t dest_stride;
  const T* residual;  // at dest's strides, or null
  bool clamped;
  T low, high;
};

template <class Stored>
class PixelSource {
  using T = compute_t<Stored>;
  using V_ = Vec<T>;
  static constexpr bool computes_as_stored = __is_same(Stored, T);

 public:
  // `order`: has room for every read, and for a vector more. Where a kernel wants the channels of a group
  // side by side, only an image that has them so can be used as it lies.
  PixelSource(const Image<const Stored>& image, const Sweep& sweep)
      : image_(image), sweep_(sweep), reach_(sweep) {}

  void open(const ChannelLists& lists, int64_t groups, bool side_by_side, int32_t* order) {
    order_ = order;
    reads_ = lists.offsets[groups];
    in_order_ = in_order(lists, groups);
    for (int64_t i = 0; i < reads_; ++i) order_[i] = lists.channels[i];
    direct_ = computes_as_stored && reach_.inside(sweep_, image_.height, image_.width) &&
              (in_order_ || !side_by_side);
    pixel_ = direct_ ? image_.stride_w : row_distance<T>(reads_);
  }

  bool direct() const { return direct_; }
  // What a lattice pixel keeps in scratch, for the size of tiles.
  int64_t staged_per_pixel() const {
    return direct_ ? 0 : pixel_ * sweep_.source_step_h * sweep_.source_step_w;
  }

  void set_widest(int64_t tile_cols) {
    cols_ = (tile_cols - 1) * sweep_.source_step_w + reach_.cols();
    row_ = direct_ ? image_.stride_h : cols_ * pixel_;
  }
  int64_t staged_size(const Tile& tile) const {
    return direct_ ? 0 : ((tile.rows - 1) * sweep_.source_step_h + reach_.rows()) * row_;
  }

  // From one lattice pixel, or row of them, to the next.
  int64_t pixel_stride() const { return pixel_ * sweep_.source_step_w; }
  int64_t row_stride() const { return row_ * sweep_.source_step_h; }
  // Of a tap's pixel from the lattice pixel's, and of a read's channel in it.
  int64_t tap_offset(const Tap& tap) const {
    const Shift shift = shift_of(sweep_, tap);
    if (direct_) return shift.row * row_ + shift.col * pixel_;
    return (shift.row - reach_.top) * row_ + (shift.col - reach_.left) * pixel_;
  }
  int64_t channel(int64_t read) const { return direct_ ? order_[read] : read; }

  // The tile's first lattice pixel: in the image, or in `scratch`, which is filled.
  const T* open_tile(int64_t n, const Tile& tile, T* scratch) const {
    if constexpr (computes_as_stored) {
      if (direct_) return image_.at(n, 0, tile.row * sweep_.source_step_h, tile.col * sweep_.source_step_w);
    }
    const int64_t rows = (tile.rows - 1) * sweep_.source_step_h + reach_.rows();
    const int64_t cols = (tile.cols - 1) * sweep_.source_step_w + reach_.cols();
    const int64_t top = tile.row * sweep_.source_step_h + reach_.top;
    const int64_t left = tile.col * sweep_.source_step_w + reach_.left;
    for (int64_t row = 0; row < rows; ++row) {
      for (int64_t col = 0; col < cols; ++col)
        stage_pixel(n, top + row, left + col, scratch + row * row_ + col * pixel_);
    }
    return scratch;
  }

 private:
  void stage_pixel(int64_t n, int64_t y, int64_t x, T* to) const {
    if (y < 0 || y >= image_.height || x < 0 || x >= image_.width) return fill_zero(to, reads_);
    const Stored* from = image_.at(n, 0, y, x);
    if (in_order_) return widen_row(from, 1, to, reads_);
    if constexpr (computes_as_stored) {
      for_each_vector<T>(reads_, [&](int64_t i, auto mask) GROUPCONV_INLINE_LAMBDA {
        V_::gather(from, order_ + i, mask).store(to + i, mask);
      });
    } else {
      for (int64_t i = 0; i < reads_; ++i) to[i] = widen(from[order_[i]]);
    }
  }

  const Image<const Stored>& image_;
  const Sweep& sweep_;
  Reach reach_;
  int32_t* order_ = nullptr;
  int64_t reads_ = 0;
  bool in_order_ = true, direct_ = false;
  int64_t cols_ = 0, row_ = 0, pixel_ = 0;  // pixels in a staged row; from row to row and pixel to pixel
};

}  // namespace
}  // namespace groupconv::cpu
