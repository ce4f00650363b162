// Which source pixels the taps of a window read, seen from the lattice pixel.
#pragma once

#include "core/sweep.h"
#include "cpu/vector/vec.h"

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

constexpr int taps_together = 3;  // neighbours that share a source in registers

// Whether all of a sweep's taps are runs of so many that read neighbouring lattice pixels, to the right or to the left.
enum class TapRuns { none, ascending, descending };
GROUPCONV_INLINE TapRuns runs_of_taps(const Sweep& sweep, size_t length) {
  const size_t count = sweep.taps.size();
  if (count == 0 || count % length != 0) return TapRuns::none;
  const auto all_step = [&](int64_t step) {
    for (size_t t = 0; t < count; ++t) {
      if (t % length == 0) continue;
      const Shift before = shift_of(sweep, sweep.taps[t - 1]), after = shift_of(sweep, sweep.taps[t]);
      if (after.row != before.row || after.col != before.col + step) return false;
    }
    return true;
  };
  if (all_step(sweep.source_step_w)) return TapRuns::ascending;
  return all_step(-sweep.source_step_w) ? TapRuns::descending : TapRuns::none;
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

}  // namespace
}  // namespace groupconv::cpu
