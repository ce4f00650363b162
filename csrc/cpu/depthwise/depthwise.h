// Depthwise convolution: every group has one input, and nothing is shared between channels, so the reuse
// is along the window. What its kernels have in common: which partitions they take, and the window.
//
//   depthwise/rows.h      NCHW: lanes are pixels of a row
//   depthwise/channels.h  channels_last: lanes are channels
//   depthwise/grad_rows.h, depthwise/grad_channels.h  their weight gradients
//   depthwise/strips.h, depthwise/grad_strips.h  NCHW, 3×3 with stride 1
#pragma once

#include "cpu/staging/pixels.h"
#include "cpu/staging/workspace.h"

namespace groupconv::cpu {
namespace {

struct Depthwise {
  int64_t most_outputs;  // of one group: the channel multiplier
  bool straight = true;  // every channel stays where it is
  bool suits = true;     // one input in every group, none read twice

  explicit Depthwise(const PartitionView& partition) : most_outputs(partition.most_outputs) {
    const int64_t groups = partition.groups;
    suits = partition.most_inputs == 1 && partition.inputs.offsets[groups] == groups &&
            !partition.inputs_overlap && partition.out_channels > 0;
    straight = suits && most_outputs == 1 && groups == partition.in_channels &&
               groups == partition.out_channels &&
               __builtin_memcmp(partition.inputs.channels, partition.outputs.channels,
                                static_cast<size_t>(groups) * sizeof(int32_t)) == 0;
  }
};

// A sweep's taps as rows × columns in ascending order of the source pixels they read, without its planes:
// lattice pixel (r, c) reads source pixel (r · source_step_h + row(i), c · source_step_w + col(j)).
class TapGrid {
 public:
  int64_t rows = 0, cols = 0;
  int64_t row_step = 1, col_step = 1;

  explicit TapGrid(const Sweep& sweep) : taps_(sweep.taps.data()) {
    const int64_t count = static_cast<int64_t>(sweep.taps.size());
    if (count == 0) return;
    const Shift first = shift(sweep, 0);
    while (cols < count && shift(sweep, cols).row == first.row) ++cols;
    rows = count / cols;
    if (cols > 1) col_step = shift(sweep, 1).col - first.col;
    if (rows > 1) row_step = shift(sweep, cols).row - first.row;
    flipped_rows_ = row_step < 0;
    flipped_cols_ = col_step < 0;
    first_row_ = first.row + (flipped_rows_ ? (rows - 1) * row_step : 0);
    first_col_ = first.col + (flipped_cols_ ? (cols - 1) * col_step : 0);
    row_step = flipped_rows_ ? -row_step : row_step;
    col_step = flipped_cols_ ? -col_step : col_step;
  }

  int64_t row(int64_t i) const { return first_row_ + i * row_step; }
  int64_t col(int64_t j) const { return first_col_ + j * col_step; }
  // Position in the kernel window.
  int64_t weight(int64_t i, int64_t j) const {
    return taps_[(flipped_rows_ ? rows - 1 - i : i) * cols + (flipped_cols_ ? cols - 1 - j : j)].weight;
  }

 private:
  static Shift shift(const Sweep& sweep, int64_t index) {
    return shift_of(sweep, sweep.taps[static_cast<size_t>(index)]);
  }

  const Tap* taps_;
  int64_t first_row_ = 0, first_col_ = 0;
  bool flipped_rows_ = false, flipped_cols_ = false;
};

// NCHW, with neighbouring pixels of a row next to each other.
template <class Element>
GROUPCONV_INLINE bool is_rows(const Image<Element>& image) {
  return !image.channels_last() && (image.stride_w == 1 || image.width == 1);
}

// A vector of bfloat16 is gathered in twos.
template <class Stored>
GROUPCONV_INLINE bool can_gather(int64_t channels) {
  return channels > 1 || __is_same(Stored, compute_t<Stored>);
}

// Of `count` pixels `apart` from each other, the first at x, those inside an image: a bit for each.
GROUPCONV_INLINE uint32_t pixels_inside(int64_t x, int64_t count, int64_t apart, int64_t width) {
  const auto steps = [&](int64_t distance) { return apart == 1 ? distance : divide_up(distance, apart); };
  const int64_t begin = smaller(count, x < 0 ? steps(-x) : int64_t{0});
  const int64_t end = smaller(count, x < width ? steps(width - x) : int64_t{0});
  return end <= begin ? 0 : static_cast<uint32_t>((uint64_t{1} << end) - (uint64_t{1} << begin));
}

// The pixels at from[0], from[Step], …, one for each lane. Only those are read whose bit is set; there is a
// bit for each pixel in between as well.
template <class T, int Step, class Stored>
GROUPCONV_INLINE Vec<T> load_stepped(const Stored* from, uint32_t exists) {
  constexpr int lanes = Vec<T>::lanes;
  if constexpr (Step == 2 && !__is_same(Stored, T)) {
    return Vec<T>::load_even(from, exists);
  } else {
    const Vec<T> low = Vec<T>::load(from, Vec<T>::from_bits(exists & ((1u << lanes) - 1)));
    if constexpr (Step == 1) {
      return low;
    } else {
      return even(low, Vec<T>::load(from + lanes, Vec<T>::from_bits(exists >> lanes)));
    }
  }
}

}  // namespace
}  // namespace groupconv::cpu
