#include "core/sweep.h"

#include <algorithm>
#include <cstdlib>

namespace groupconv {
namespace {

// How many steps from zero on stay below a limit of any sign.
int64_t steps_below(int64_t limit, int64_t step) { return limit <= 0 ? 0 : (limit + step - 1) / step; }

// The positions whose source pixel through one tap exists.
struct Meeting {
  int64_t begin, end;

  Meeting(const Axis& axis, const AxisTap& tap)
      : begin(steps_below(-tap.offset, axis.source_step)),
        end(std::min(axis.count, steps_below(axis.source_size - tap.offset, axis.source_step))) {}
};

void add_tap(Axis& axis, int64_t offset, int64_t kernel) {
  const int64_t last = offset + (axis.count - 1) * axis.source_step;
  if (axis.count > 0 && last >= 0 && offset < axis.source_size) axis.taps.push_back({offset, kernel});
}

// How far apart in a plane two neighbouring taps of the same plane are; 0 where every plane has one tap.
int64_t gap_between_taps(const Axis& axis) {
  for (size_t i = 1; i < axis.taps.size(); ++i) {
    const int64_t distance = std::abs(axis.taps[i].offset - axis.taps[0].offset);
    if (distance % axis.source_step == 0) return distance / axis.source_step;
  }
  return 0;
}

// Source pixels from the first tap to the last.
int64_t span_of_taps(const Axis& axis) {
  return std::abs(axis.taps.back().offset - axis.taps.front().offset) + 1;
}

// Where each tap of an axis finds its pixels.
struct AxisPlanes {
  struct Place {
    int64_t plane, shift;
  };
  int64_t first = 0, halo = 0;
  std::vector<int64_t> phases;
  std::vector<Place> places;  // one per tap

  AxisPlanes(const Axis& axis, bool plane_per_tap) {
    places.reserve(axis.taps.size());
    if (plane_per_tap) {
      for (const AxisTap& tap : axis.taps) {
        places.push_back({static_cast<int64_t>(phases.size()), 0});
        phases.push_back(tap.offset);
      }
      return;
    }
    const auto phase_of = [&](const AxisTap& tap) {
      return (tap.offset % axis.source_step + axis.source_step) % axis.source_step;
    };
    const auto index_of = [&](const AxisTap& tap) { return (tap.offset - phase_of(tap)) / axis.source_step; };
    for (const AxisTap& tap : axis.taps) phases.push_back(phase_of(tap));
    std::sort(phases.begin(), phases.end());
    phases.erase(std::unique(phases.begin(), phases.end()), phases.end());
    // In equal steps the extremes are the two ends.
    const int64_t one_end = index_of(axis.taps.front()), other_end = index_of(axis.taps.back());
    first = std::min(one_end, other_end);
    halo = std::max(one_end, other_end) - first;
    for (const AxisTap& tap : axis.taps) {
      const auto phase = std::lower_bound(phases.begin(), phases.end(), phase_of(tap));
      places.push_back({phase - phases.begin(), index_of(tap) - first});
    }
  }

  // How much of the halo is padding at either end, in every plane.
  int64_t padding_at_both_ends(const Axis& axis) const {
    int64_t least = halo;
    for (const int64_t phase : phases) {
      const int64_t offset = first * axis.source_step + phase;
      const int64_t before = steps_below(-offset, axis.source_step);
      const int64_t behind = axis.count + halo - steps_below(axis.source_size - offset, axis.source_step);
      least = std::min({least, before, std::max<int64_t>(behind, 0)});
    }
    return least;
  }
};

}  // namespace

Sweep::~Sweep() = default;

bool Axis::padded() const {
  return std::any_of(taps.begin(), taps.end(), [&](const AxisTap& tap) {
    const Meeting meeting(*this, tap);
    return meeting.begin > 0 || meeting.end < count;
  });
}

Axis forward_axis(const AxisWindow& w, int64_t in_size, int64_t out_size) {
  Axis axis{out_size, 1, 0, w.stride, in_size};
  for (int64_t k = 0; k < w.kernel; ++k) add_tap(axis, k * w.dilation - w.pad, k);
  return axis;
}

// Input position stride · m + residue receives output position m + (residue + pad − k · dilation) / stride
// through tap k, where that division is exact.
std::vector<Axis> input_grad_axes(const AxisWindow& w, int64_t in_size, int64_t out_size) {
  std::vector<Axis> axes;
  for (int64_t residue = 0; residue < std::min(w.stride, in_size); ++residue) {
    Axis axis{(in_size - residue + w.stride - 1) / w.stride, w.stride, residue, 1, out_size};
    for (int64_t k = 0; k < w.kernel; ++k) {
      const int64_t reach = residue + w.pad - k * w.dilation;
      if (reach % w.stride == 0) add_tap(axis, reach / w.stride, k);
    }
    if (!axis.taps.empty()) axes.push_back(std::move(axis));
  }
  return axes;
}

std::vector<Axis> without_padding(const std::vector<Axis>& axes) {
  std::vector<Axis> parts;
  for (const Axis& axis : axes) {
    std::vector<int64_t> cuts;
    for (const AxisTap& tap : axis.taps) {
      const Meeting meeting(axis, tap);
      cuts.push_back(meeting.begin);
      cuts.push_back(meeting.end);
    }
    std::sort(cuts.begin(), cuts.end());
    cuts.erase(std::unique(cuts.begin(), cuts.end()), cuts.end());
    for (size_t i = 0; i + 1 < cuts.size(); ++i) {
      const int64_t begin = cuts[i], end = cuts[i + 1];
      Axis part{end - begin, axis.dest_step, axis.dest_origin + begin * axis.dest_step, axis.source_step,
                axis.source_size};
      for (const AxisTap& tap : axis.taps) {
        const Meeting meeting(axis, tap);
        if (meeting.begin <= begin && end <= meeting.end) {
          part.taps.push_back({tap.offset + begin * axis.source_step, tap.kernel});
        }
      }
      if (!part.taps.empty()) parts.push_back(std::move(part));
    }
  }
  return parts;
}

Sweep make_sweep(const Axis& vertical, const Axis& horizontal, int64_t kernel_w, int64_t plane_pixels) {
  Sweep sweep;
  sweep.rows = vertical.count;
  sweep.cols = horizontal.count;
  sweep.dest_step_h = vertical.dest_step;
  sweep.dest_step_w = horizontal.dest_step;
  sweep.dest_origin_h = vertical.dest_origin;
  sweep.dest_origin_w = horizontal.dest_origin;
  sweep.source_step_h = vertical.source_step;
  sweep.source_step_w = horizontal.source_step;
  if (vertical.taps.empty() || horizontal.taps.empty()) return sweep;

  const int64_t taps = static_cast<int64_t>(vertical.taps.size() * horizontal.taps.size());
  int64_t span;
  sweep.far_taps =
      __builtin_mul_overflow(span_of_taps(vertical), span_of_taps(horizontal), &span) || span > 4 * taps;
  // A plane that two taps share holds the pixels between them as well. That pays while a tile is at least
  // as long as the gap: then most of them are read by both.
  const int64_t tile_pixels = plane_pixels / taps;
  const int64_t tile_rows = std::max<int64_t>(tile_pixels / sweep.cols, 1);
  const int64_t tile_cols = std::max<int64_t>(std::min(tile_pixels, sweep.cols), 1);
  const AxisPlanes down(vertical, sweep.far_taps && gap_between_taps(vertical) > tile_rows);
  const AxisPlanes right(horizontal, sweep.far_taps && gap_between_taps(horizontal) > tile_cols);

  sweep.first_row = down.first;
  sweep.first_col = right.first;
  sweep.halo_rows = down.halo;
  sweep.halo_cols = right.halo;
  sweep.shared_cols = right.padding_at_both_ends(horizontal);
  sweep.phases.reserve(down.phases.size() * right.phases.size());
  for (const int64_t row : down.phases) {
    for (const int64_t col : right.phases) sweep.phases.push_back({row, col});
  }
  const int64_t planes_across = static_cast<int64_t>(right.phases.size());
  sweep.taps.reserve(static_cast<size_t>(taps));
  for (size_t v = 0; v < down.places.size(); ++v) {
    for (size_t h = 0; h < right.places.size(); ++h) {
      sweep.taps.push_back({down.places[v].plane * planes_across + right.places[h].plane,
                            down.places[v].shift, right.places[h].shift,
                            vertical.taps[v].kernel * kernel_w + horizontal.taps[h].kernel});
    }
  }
  return sweep;
}

}  // namespace groupconv
