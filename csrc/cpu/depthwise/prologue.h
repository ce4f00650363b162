// Depthwise kernels read an image where it lies, each pixel several times. Behind a prologue they read it from
// scratch, where each row comes once, shortly before it is first needed:
//   PreparedPlane  NCHW: rows of one channel, as many as stay in L1 with what is made of them
//   PreparedRows   channels_last: a ring of as many rows as the window reaches over
#pragma once

#include "cpu/depthwise/depthwise.h"
#include "cpu/staging/prologue.h"

namespace groupconv::cpu {
namespace {

// Some lattice rows, and the channel that they are made from: in the image or in scratch.
template <class Stored>
struct Band {
  const Stored* plane;  // the channel's first pixel
  int64_t stride_h;
  int64_t first_row, end_row;
};

template <class Stored>
class PreparedPlane {
  using T = compute_t<Stored>;

 public:
  PreparedPlane(const Image<const Stored>& image, const Prologue<T>& prologue, const Sweep& sweep,
                const TapGrid& grid)
      : image_(image), prologue_(prologue), sweep_(sweep), grid_(grid) {
    constexpr int64_t l1_share = 24 << 10;
    constexpr int64_t unit = 4;  // no tile of the kernels has more rows
    pitch_ = row_distance<Stored>(image.width);
    reach_ = grid.rows > 0 ? grid.row(grid.rows - 1) - grid.row(0) + 1 : 0;
    const int64_t fit = l1_share / static_cast<int64_t>(sizeof(Stored)) / pitch_ - reach_;
    // Not so few that mostly the rows between two bands were made, twice.
    const int64_t least = divide_up(larger(fit, 3 * reach_), sweep.source_step_h);
    band_ = prologue ? smaller(divide_up(larger(least, unit), unit) * unit, sweep.rows) : sweep.rows;
  }

  int64_t size() const { return prologue_ ? ((band_ - 1) * sweep_.source_step_h + reach_) * pitch_ : 0; }

  // The band of an image's channel that begins with lattice row `row`.
  GROUPCONV_INLINE Band<Stored> band(int64_t n, int64_t channel, int64_t row, Stored* scratch) const {
    if (!prologue_) return {image_.at(n, channel, 0, 0), image_.stride_h, 0, sweep_.rows};
    return prepare(n, channel, row, scratch);
  }

 private:
  // Not inline: the loops around it need the registers.
  __attribute__((noinline)) Band<Stored> prepare(int64_t n, int64_t channel, int64_t row,
                                                 Stored* scratch) const {
    const Affine<T> affine = affine_of(prologue_, channel);
    const int64_t end_row = smaller(row + band_, sweep_.rows);
    const int64_t top = row * sweep_.source_step_h + grid_.row(0);
    const int64_t end = smaller(top + (end_row - row - 1) * sweep_.source_step_h + reach_, image_.height);
    for (int64_t y = larger(top, int64_t{0}); y < end; ++y) {
      prepare_row(affine, image_.at(n, channel, y, 0), scratch + (y - top) * pitch_, image_.width);
    }
    return {scratch - top * pitch_, pitch_, row, end_row};
  }

  const Image<const Stored>& image_;
  const Prologue<T>& prologue_;
  const Sweep& sweep_;
  const TapGrid& grid_;
  int64_t pitch_, reach_, band_;
};

// Row y of all channels, or of some of them, is found at row(y) once it was asked for. In bfloat16 what the
// prologue gives is rounded.
template <class Stored>
class PreparedRows {
  using T = compute_t<Stored>;

 public:
  PreparedRows(const Image<const Stored>& image, const Prologue<T>& prologue, int64_t first_channel,
               int64_t channels, int64_t reach)
      : image_(image),
        first_(first_channel),
        channels_(channels),
        reach_(reach),
        pixel_(prologue ? row_distance<Stored>(channels) : image.stride_w) {
    if (prologue) prologue_ = from_channel(prologue, first_channel);
  }

  int64_t size() const { return prologue_ ? reach_ * image_.width * pixel_ : 0; }
  void open(Stored* scratch) { scratch_ = scratch; }

  // Rows up to `end` of image n; those `reach` rows before it stay. Within an image `begin` and `end` ascend.
  void advance(int64_t n, int64_t begin, int64_t end) {
    if (!prologue_) return;
    if (n != image_in_ || begin > next_) next_ = larger(begin, int64_t{0});
    image_in_ = n;
    for (end = smaller(end, image_.height); next_ < end; ++next_) {
      const Stored* from = image_.at(n, first_, next_, 0);
      Stored* to = scratch_ + next_ % reach_ * image_.width * pixel_;
      for (int64_t x = 0; x < image_.width; ++x, from += image_.stride_w, to += pixel_) prepare(from, to);
    }
  }

  // The first pixel of a row that exists.
  const Stored* row(int64_t n, int64_t y) const {
    if (!prologue_) return image_.at(n, first_, y, 0);
    return scratch_ + y % reach_ * image_.width * pixel_;
  }
  int64_t pixel_stride() const { return pixel_; }

 private:
  GROUPCONV_INLINE void prepare(const Stored* from, Stored* to) const {
    if constexpr (in_vectors<Stored>) {
      prepare_pixel(prologue_, from, to, channels_);
    } else {
      const T low = lowest(prologue_);
      for (int64_t c = 0; c < channels_; ++c) {
        const T x = widen(from[c]) * prologue_.scale[c] + prologue_.shift[c];
        narrow(x < low ? low : x, to[c]);  // false for NaN, which passes through
      }
    }
  }

  const Image<const Stored>& image_;
  Prologue<T> prologue_;  // of the channels from the first on
  int64_t first_, channels_, reach_, pixel_;
  Stored* scratch_ = nullptr;
  int64_t image_in_ = -1, next_ = 0;
};

}  // namespace
}  // namespace groupconv::cpu
