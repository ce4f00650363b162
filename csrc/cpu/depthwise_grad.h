// Weight gradient of a depthwise convolution: one sum per channel and tap.
//
// NCHW: a channel's padded plane is staged, the output gradient is read where it lies; lanes are pixels
// and up to nine taps are summed at once, so a loaded gradient serves nine multiply-adds.
// channels_last: lanes are channels and nothing is staged; needs every channel to stay where it is.
#pragma once

#include "cpu/depthwise.h"

namespace groupconv::cpu {
namespace {

constexpr int taps_at_once = 9;

template <class T>
class DepthwiseGrad {
  using V_ = Vec<T>;
  static constexpr int lanes = V_::lanes;

 public:
  explicit DepthwiseGrad(const WeightGradProblem<T>& problem)
      : p_(problem),
        sweep_(*problem.sweep),
        planes_(sweep_),
        taps_(static_cast<int64_t>(sweep_.taps.size())),
        by_channel_(p_.input.channels_last()) {}

  static bool suits(const WeightGradProblem<T>& p) {
    if (!is_depthwise(*p.partition)) return false;
    if (p.input.channels_last() && p.grad.channels_last()) return keeps_channels(*p.partition);
    return !p.input.channels_last() && !p.grad.channels_last() && p.grad.stride_w == 1;
  }

  void run() const {
    const int64_t width = by_channel_ ? lanes : channels_per_item;
    const int64_t chunks = divide_up(p_.partition->groups, width);
    for_each_item(p_.threads, p_.slices * chunks, [&](int64_t item) {
      const int64_t slice = item / chunks, first = item % chunks * width;
      const int64_t begin = p_.input.batch * slice / p_.slices,
                    end = p_.input.batch * (slice + 1) / p_.slices;
      for (int64_t t = 0; t < taps_; t += taps_at_once) {
        if (by_channel_) {
          sum_channels(slice, begin, end, first, t);
        } else {
          for (int64_t g = first; g < smaller(first + width, p_.partition->groups); ++g) {
            sum_rows(slice, begin, end, g, t);
          }
        }
      }
    });
  }

 private:
  T* weight_grad(int64_t slice, int64_t group) const {
    const PartitionView& partition = *p_.partition;
    return p_.weight_grad + (slice * partition.entries() + partition.weight_offsets[group]) * p_.window_area;
  }

  void sum_rows(int64_t slice, int64_t begin, int64_t end, int64_t group, int64_t first_tap) const {
    const Tiling tiling(sweep_, planes_.count, 0, sizeof(T), 1);
    const int64_t count = smaller<int64_t>(taps_at_once, taps_ - first_tap);
    V_ sums[taps_at_once];
#pragma GCC unroll 9
    for (int t = 0; t < taps_at_once; ++t) sums[t] = zero<T>();
    for (int64_t n = begin; n < end; ++n) {
      for (int64_t i = 0; i < tiling.count; ++i) {
        const Tile tile = tiling.tile(sweep_, i);
        const PlaneShape shape(sweep_, tile);
        Workspace space;
        space.plan<T>(planes_.count * shape.size + lanes);
        space.open();
        T* pixels = space.take<T>(planes_.count * shape.size + lanes);
        stage(p_.input, n, {p_.partition->inputs.of(group), 1}, planes_, tile, shape, pixels, int64_t{0},
              shape.size);
        const T* taps[taps_at_once];
        for (int64_t t = 0; t < taps_at_once; ++t) {
          const Tap& tap = sweep_.taps[static_cast<size_t>(first_tap + smaller(t, count - 1))];
          taps[t] = pixels + tap.plane * shape.size + tap.row * shape.pitch + tap.col;
        }
        for (int64_t row = 0; row < tile.rows; ++row) {
          const T* grads = p_.grad.at(n, p_.partition->outputs.of(group)[0], tile.row + row, tile.col);
          for (int64_t col = 0; col < tile.cols; col += lanes) {
            const auto mask = V_::first(smaller<int64_t>(lanes, tile.cols - col));
            const V_ g = V_::load(grads + col, mask);
#pragma GCC unroll 9
            for (int t = 0; t < taps_at_once; ++t) {
              sums[t] = multiply_add(g, V_::load(taps[t] + row * shape.pitch + col, mask), sums[t]);
            }
          }
        }
      }
    }
    T totals[taps_at_once];
    sum_each<taps_at_once>(sums, totals);
    T* out = weight_grad(slice, group);
    for (int64_t t = 0; t < count; ++t) {
      out[sweep_.taps[static_cast<size_t>(first_tap + t)].weight] += totals[t];
    }
  }

  void sum_channels(int64_t slice, int64_t begin, int64_t end, int64_t channel, int64_t first_tap) const {
    const int64_t count = smaller<int64_t>(taps_at_once, taps_ - first_tap);
    const int64_t width = smaller<int64_t>(lanes, p_.partition->groups - channel);
    const auto mask = V_::first(width);
    Shift shifts[taps_at_once];
    V_ sums[taps_at_once];
#pragma GCC unroll 9
    for (int t = 0; t < taps_at_once; ++t) {
      shifts[t] =
          shift_of(sweep_, sweep_.taps[static_cast<size_t>(first_tap + smaller<int64_t>(t, count - 1))]);
      sums[t] = zero<T>();
    }
    for (int64_t n = begin; n < end; ++n) {
      for (int64_t row = 0; row < sweep_.rows; ++row) {
        for (int64_t col = 0; col < sweep_.cols; ++col) {
          const V_ g = V_::load(p_.grad.at(n, channel, row, col), mask);
#pragma GCC unroll 9
          for (int t = 0; t < taps_at_once; ++t) {
            const int64_t y = row * sweep_.source_step_h + shifts[t].row;
            const int64_t x = col * sweep_.source_step_w + shifts[t].col;
            if (y < 0 || y >= p_.input.height || x < 0 || x >= p_.input.width) continue;
            sums[t] = multiply_add(g, V_::load(p_.input.at(n, channel, y, x), mask), sums[t]);
          }
        }
      }
    }
    T lanes_of[taps_at_once][lanes];
#pragma GCC unroll 9
    for (int t = 0; t < taps_at_once; ++t) sums[t].store(lanes_of[t]);
    for (int64_t g = 0; g < p_.partition->groups; ++g) {
      const int64_t lane = p_.partition->outputs.of(g)[0] - channel;
      if (lane < 0 || lane >= width) continue;
      T* out = weight_grad(slice, g);
      for (int64_t t = 0; t < count; ++t) {
        out[sweep_.taps[static_cast<size_t>(first_tap + t)].weight] += lanes_of[t][lane];
      }
    }
  }

  const WeightGradProblem<T>& p_;
  const Sweep& sweep_;
  Planes planes_;
  int64_t taps_;
  bool by_channel_;
};

}  // namespace
}  // namespace groupconv::cpu
