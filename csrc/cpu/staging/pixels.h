// The channels_last counterpart of rows: whole pixels, as the kernels with lanes over channels read them.
//
// An image can be read as it lies where no tap leaves it, it is stored as the operands that are read (single
// channels, or pairs of neighbours) and nothing comes before the convolution. Otherwise a tile's pixels are
// copied, padding included and through the prologue, with their channels in the order in which the groups read
// them; or as they lie, which spares a prologue a gather, where a kernel takes them from anywhere.
//
// A window reads a pixel once for each tap. Where kernels take all pixels of a tile for one group before they go on
// to the next, the copy is a plane for each group: what a tile of registers reads lies side by side, and stays in L1
// with the group's weights.
#pragma once

#include "core/partition.h"
#include "cpu/staging/channel_order.h"
#include "cpu/staging/reach.h"
#include "cpu/staging/reorder.h"
#include "cpu/staging/stage.h"
#include "cpu/staging/workspace.h"
#include "cpu/vector/fetched_lines.h"
#include "cpu/vector/pixel_run.h"
#include "cpu/vector/vec.h"

namespace groupconv::cpu {
namespace {

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

// How many operands the groups read of a pixel; a group with an odd number of channels fills its last pair up.
template <class Operand>
int64_t count_reads(const ChannelLists& lists, int64_t groups) {
  int64_t reads = 0;
  for (int64_t g = 0; g < groups; ++g) reads += operands_for<Operand>(lists.count(g));
  return reads;
}

// Where a kernel finds the reads of a group in a tile.
struct PixelPlane {
  int64_t start;       // of its first pixel
  int64_t first_read;  // that the plane holds; 0 where all groups share one
  int64_t reads;       // of a pixel
  int64_t pixel, row;  // from one lattice pixel, or row of them, to the next
};

template <class Stored, class Operand = compute_t<Stored>>
class PixelSource {
  static constexpr int64_t per_read = channels_in<Operand>;
  using Sum = sum_t<Operand>;
  static constexpr bool reads_stored = __is_same(Stored, Operand) || per_read == 2;

 public:
  // Where a kernel wants the channels of a group side by side, or they make pairs, only an image that has them
  // so can be used as it lies. `lists` may hold no_channel where a zero is wanted.
  PixelSource(const Image<const Stored>& image, const Sweep& sweep, const ChannelLists& lists, int64_t groups,
              bool side_by_side, const Prologue<Sum>& prologue = {})
      : image_(image),
        sweep_(sweep),
        lists_(lists),
        groups_(groups),
        prologue_(prologue),
        reach_(sweep),
        reads_(count_reads<Operand>(lists, groups)),
        in_order_(in_order(lists, groups) && per_read * reads_ == lists.offsets[groups]),
        direct_(reads_stored && !prologue && reach_.inside(sweep, image.height, image.width) &&
                image.stride_h % per_read == 0 && image.stride_w % per_read == 0 &&
                (in_order_ || (per_read == 1 && !side_by_side))),
        // Unless most of it would be for nobody.
        as_it_lies_(per_read == 1 &&
                    (direct_ || (prologue && !side_by_side && image.channels <= 2 * reads_))),
        staged_(as_it_lies_ ? image.channels : reads_),
        pixel_(direct_ ? image.stride_w / per_read : row_distance<Operand>(staged_)) {}

  // `split`: groups will have planes of their own.
  void plan(Workspace& shared, bool split = false) const {
    shared.plan<int32_t>(per_read * reads_);
    shared.plan<Sum>(prologue_ ? reads_ : 0);
    shared.plan<Sum>(prologue_ ? reads_ : 0);
    if constexpr (per_read == 2) {
      Reorder<Stored>::plan(shared, per_read * reads_, image_.channels);
    } else if constexpr (reads_stored) {
      if (!gathers()) return;
      shared.plan<ChannelOrder<Operand>>(split ? groups_ : 1);
      for_each_list(split, [&](int64_t, int64_t reads) {
        ChannelOrder<Operand>::plan(shared, reads, image_.channels);
      });
    }
  }
  void open(Workspace& shared, bool split = false) {
    order_ = shared.take<int32_t>(per_read * reads_);
    Sum* scale = shared.take<Sum>(prologue_ ? reads_ : 0);
    Sum* shift = shared.take<Sum>(prologue_ ? reads_ : 0);
    int32_t* place = order_;
    for (int64_t g = 0; g < groups_; ++g) {
      for (int64_t i = 0; i < per_read * operands_for<Operand>(lists_.count(g)); ++i) {
        *place++ = i < lists_.count(g) ? lists_.of(g)[i] : no_channel;
      }
    }
    if constexpr (per_read == 2) {
      reorder_.open(shared, order_, per_read * reads_, image_.channels);
    } else if constexpr (reads_stored) {
      if (gathers()) {
        ChannelOrder<Operand>* order = orders_ = shared.take<ChannelOrder<Operand>>(split ? groups_ : 1);
        for_each_list(split, [&](int64_t first, int64_t reads) {
          *order = {};
          order->open(shared, order_ + first, reads, image_.channels);
          turns_ = order++->wants_turned() || turns_;
        });
      }
    }
    if (!prologue_ || as_it_lies_) return;
    for (int64_t i = 0; i < reads_; ++i) {
      const bool exists = order_[i] != no_channel;
      scale[i] = exists ? prologue_.scale[order_[i]] : Sum(0);
      shift[i] = exists ? prologue_.shift[order_[i]] : Sum(0);
    }
    prologue_ = {scale, shift, prologue_.relu};
  }

  // Before anything else: a copy is wanted even where the image could be read as it lies.
  void copy() {
    direct_ = as_it_lies_ = false;
    staged_ = reads_;
    pixel_ = row_distance<Operand>(staged_);
  }
  bool direct() const { return direct_; }
  // Groups can have planes of their own: pixels are copied anyway, in the groups' order.
  bool can_split() const { return !direct_ && !as_it_lies_; }
  // What a lattice pixel keeps in scratch, for the size of tiles.
  int64_t staged_per_pixel() const {
    return direct_ ? 0 : pixel_ * sweep_.source_step_h * sweep_.source_step_w;
  }

  void set_widest(int64_t tile_cols) {
    cols_ = (tile_cols - 1) * sweep_.source_step_w + reach_.cols();
    row_ = direct_ ? image_.stride_h / per_read : cols_ * pixel_;
    shared_ = {0, 0, staged_, pixel_stride(), row_stride()};
  }
  // A plane for each group. No tile is higher than `tile_rows`.
  void split(PixelPlane* planes, int64_t tile_rows) {
    planes_ = planes;
    const int64_t pixels = ((tile_rows - 1) * sweep_.source_step_h + reach_.rows()) * cols_;
    int64_t first_read = 0;
    for (int64_t g = 0; g < groups_; ++g) {
      const int64_t reads = operands_for<Operand>(lists_.count(g));
      planes[g] = {size_, first_read, reads, reads * sweep_.source_step_w,
                   reads * cols_ * sweep_.source_step_h};
      first_read += reads;
      size_ += row_distance<Operand>(reads * pixels);
    }
    if constexpr (per_read == 2) {
      line_ = size_;
      size_ += row_distance<Operand>(reads_);
    }
  }
  const PixelPlane& plane(int64_t group) const { return planes_ ? planes_[group] : shared_; }
  int64_t staged_size(const Tile& tile) const {
    if (planes_) return size_;
    return direct_ ? 0 : rows(tile) * row_;
  }

  // From one lattice pixel, or row of them, to the next.
  int64_t pixel_stride() const { return pixel_ * sweep_.source_step_w; }
  int64_t row_stride() const { return row_ * sweep_.source_step_h; }
  // Of a tap's pixel from the lattice pixel's, and of a read in it.
  int64_t tap_offset(const Tap& tap) const {
    const Shift shift = shift_of(sweep_, tap);
    if (direct_) return shift.row * row_ + shift.col * pixel_;
    return (shift.row - reach_.top) * row_ + (shift.col - reach_.left) * pixel_;
  }
  int64_t place(int64_t read) const { return as_it_lies_ ? order_[read] : read; }
  // The same in a group's plane.
  int64_t tap_offset(const Tap& tap, const PixelPlane& plane) const {
    if (!planes_) return tap_offset(tap);
    const Shift shift = shift_of(sweep_, tap);
    return ((shift.row - reach_.top) * cols_ + shift.col - reach_.left) * plane.reads;
  }

  // What is staged of a tile and belongs to the one below it as well comes to where that one begins. Returns how many
  // source rows.
  int64_t keep_rows(const Tile& tile, Operand* scratch) const {
    const int64_t kept = direct_ ? 0 : larger(reach_.rows() - sweep_.source_step_h, int64_t{0});
    const auto keep = [&](Operand* first, int64_t row) {
      std::memmove(first, first + (rows(tile) - kept) * row,
                   static_cast<size_t>(kept * row) * sizeof(Operand));
    };
    if (!planes_) {
      keep(scratch, row_);
    } else {
      for (int64_t g = 0; g < groups_; ++g) keep(scratch + planes_[g].start, cols_ * planes_[g].reads);
    }
    return kept;
  }
  // The tile's first lattice pixel: in the image, or in `scratch`, which is filled but for `kept` rows.
  const Operand* open_tile(int64_t n, const Tile& tile, Operand* scratch, int64_t kept = 0) const {
    if constexpr (reads_stored) {
      if (direct_) {
        return reinterpret_cast<const Operand*>(
            image_.at(n, 0, tile.row * sweep_.source_step_h, tile.col * sweep_.source_step_w));
      }
    }
    stage_rows(n, tile, kept, rows(tile), scratch);
    return scratch;
  }

  // Source rows that a tile reads, and so many of them copied to where the tile is staged.
  int64_t rows(const Tile& tile) const { return (tile.rows - 1) * sweep_.source_step_h + reach_.rows(); }
  void stage_rows(int64_t n, const Tile& tile, int64_t begin, int64_t end, Operand* scratch) const {
    const int64_t cols = (tile.cols - 1) * sweep_.source_step_w + reach_.cols();
    const int64_t top = tile.row * sweep_.source_step_h + reach_.top;
    const int64_t left = tile.col * sweep_.source_step_w + reach_.left;
    for (int64_t row = begin; row < end; ++row) {
      const int64_t y = top + row;
      const bool exists = y >= 0 && y < image_.height;
      const int64_t first = exists ? smaller(cols, larger(-left, int64_t{0})) : cols;
      const int64_t last = exists ? larger(first, smaller(cols, image_.width - left)) : cols;
      const Stored* from = exists ? image_.at(n, 0, y, left + first) : nullptr;
      if (first < last) order_run(from, last - first, row * cols_ + first, scratch);
      for_each_staged(scratch, [&](int64_t, int64_t first_read, int64_t reads, Operand* to, int64_t pixel) {
        to += row * cols_ * pixel;
        clear(to, first * pixel);
        if (!splits_pairs()) {
          stage_run(from, last - first, first_read, reads, to + first * pixel, pixel);
        }
        clear(to + last * pixel, (cols - last) * pixel);
      });
      if constexpr (per_read == 2) {
        if (!splits_pairs()) continue;
        for (int64_t col = first; col < last; ++col, from += image_.stride_w) {
          split_pairs(from, row * cols_ + col, scratch);
        }
      }
    }
  }

 private:
  bool gathers() const { return !in_order_ && !as_it_lies_; }
  // Pairs are put in order for all groups at once.
  bool splits_pairs() const { return per_read == 2 && planes_; }
  void split_pairs(const Stored* from, int64_t pixel, Operand* scratch) const {
    Operand* line = scratch + line_;
    reorder_.run(from, reinterpret_cast<Stored*>(line));
    for (int64_t g = 0; g < groups_; ++g) {
      const PixelPlane& plane = planes_[g];
      Operand* to = scratch + plane.start + pixel * plane.reads;
      for_each_vector<Operand>(plane.reads, [&](int64_t i, auto mask) GROUPCONV_INLINE_LAMBDA {
        Vec<Operand>::load(line + plane.first_read + i, mask).store(to + i, mask);
      });
    }
  }

  // body(index of a list, its first read, how many, where its first pixel is staged, from pixel to pixel)
  template <class Body>
  GROUPCONV_INLINE void for_each_staged(Operand* scratch, const Body& body) const {
    if (!planes_) return body(int64_t{0}, int64_t{0}, staged_, scratch, pixel_);
    for (int64_t g = 0; g < groups_; ++g) {
      const PixelPlane& plane = planes_[g];
      body(g, plane.first_read, plane.reads, scratch + plane.start, plane.reads);
    }
  }

  // body(first, how many) of the reads that are staged together.
  template <class Body>
  void for_each_list(bool split, const Body& body) const {
    if (!split) return body(int64_t{0}, reads_);
    int64_t first = 0;
    for (int64_t g = 0; g < groups_; ++g) {
      const int64_t reads = operands_for<Operand>(lists_.count(g));
      body(first, reads);
      first += reads;
    }
  }

  // Neighbouring pixels as they are ordered, where they are: the staged ones from index `pixel` on. All lists take a few
  // pixels before the next, so that these stay in L1, and memory brings what is read behind them.
  void order_run([[maybe_unused]] const Stored* from, [[maybe_unused]] int64_t pixels,
                 [[maybe_unused]] int64_t pixel, [[maybe_unused]] Operand* scratch) const {
    if constexpr (reads_stored && per_read == 1) {
      if (!gathers()) return;
      using Order = ChannelOrder<Operand>;
      const int64_t ahead = larger(fetched_ahead, Order::pixels_at_once * image_.stride_w);
      Order::for_few(from, image_.stride_w, pixels, image_.channels, turns_,
                     [&](int64_t done, const auto& few) GROUPCONV_INLINE_LAMBDA {
                       for_each_staged(
                           scratch, [&](int64_t list, int64_t first, int64_t, Operand* to, int64_t distance) {
                             to += (pixel + done) * distance;
                             const Stored* next = few.first + ahead + first;
                             orders_[list].fill(few, [&](int64_t p, const auto& places,
                                                         Vec<Operand> x) GROUPCONV_INLINE_LAMBDA {
                               __builtin_prefetch(next + p * few.stride + places.first, 0, into_l2);
                               places.store(x, to + p * distance);
                             });
                           });
                     });
    }
  }

  // Of a row's ends a few numbers: in line.
  static GROUPCONV_INLINE void clear(Operand* to, int64_t count) {
    const auto nothing = Vec<Operand>::broadcast(Operand{});
    for_each_vector<Operand>(
        count, [&](int64_t i, auto mask) GROUPCONV_INLINE_LAMBDA { nothing.store(to + i, mask); });
  }

  // Neighbouring pixels, `distance` apart where they go: `count` reads of them from `first` on, or channels where pixels
  // are staged as they lie.
  void stage_run(const Stored* from, int64_t pixels, int64_t first, int64_t count, Operand* to,
                 int64_t distance) const {
    if constexpr (reads_stored && per_read == 1) {
      if (gathers() && !prologue_) return;  // they are there
    }
    for (int64_t p = 0; p < pixels; ++p, from += image_.stride_w, to += distance) {
      stage_pixel(from, first, count, to);
    }
  }

  GROUPCONV_INLINE void stage_pixel(const Stored* from, int64_t first, int64_t count, Operand* to) const {
    const Prologue<Sum> prologue = prologue_ ? from_channel(prologue_, first) : prologue_;
    if constexpr (per_read == 2) {
      return reorder_.run(from, reinterpret_cast<Stored*>(to));
    } else if constexpr (reads_stored) {
      if (gathers()) return prepare_pixel(prologue, to, to, count);  // they are there
      if (prologue_) return prepare_pixel(prologue, from + first, to, count);
      // Memory brings what is copied later: behind it, or, where each group passes over a row, a share of the next row.
      const int64_t ahead =
          planes_ ? image_.stride_h + first
                  : larger(fetched_ahead, ChannelOrder<Operand>::pixels_at_once * image_.stride_w);
      for_each_vector<Operand>(count, [&](int64_t i, auto mask) GROUPCONV_INLINE_LAMBDA {
        __builtin_prefetch(from + ahead + i, 0, into_l2);
        Vec<Operand>::load(from + first + i, mask).store(to + i, mask);
      });
    } else {
      if (gathers()) {
        for (int64_t i = 0; i < count; ++i) {
          const int32_t channel = order_[first + i];
          to[i] = channel == no_channel ? Operand(0) : widen(from[channel]);
        }
      } else {
        widen_row(from + first, 1, to, count);
      }
      if (prologue_) prepare_pixel(prologue, to, to, count);
    }
  }

  const Image<const Stored>& image_;
  const Sweep& sweep_;
  ChannelLists lists_;
  int64_t groups_;
  Prologue<Sum> prologue_;  // of the channels as they are staged
  Reach reach_;
  int64_t reads_;
  bool in_order_, direct_, as_it_lies_;
  int64_t staged_;                      // operands of a pixel
  int64_t pixel_, row_ = 0, cols_ = 0;  // from pixel to pixel and row to row; pixels in a staged row
  int32_t* order_ = nullptr;
  ChannelOrder<Operand>* orders_ = nullptr;  // of each list
  bool turns_ = false;                       // one of them wants pixels turned
  Reorder<Stored> reorder_;
  PixelPlane shared_{};                 // where all groups share one
  const PixelPlane* planes_ = nullptr;  // or null
  int64_t size_ = 0;                    // of all planes, and of a line behind them
  int64_t line_ = 0;                    // where a pixel's pairs are put in order
};

}  // namespace
}  // namespace groupconv::cpu
