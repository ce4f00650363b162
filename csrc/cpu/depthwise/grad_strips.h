// Weight gradient of a depthwise 3×3 with stride 1 in NCHW, down strips: a strip is one vector of neighbouring pixels of the
// gradient, from the top of the map to its bottom. Each meets three rows of the source, which stay in registers, as
// each column of the window sees them, until they have met three rows of the gradient.
//   registers  9 sums, 9 sources, 1 gradient
//   loads      1 gradient and 3 sources for 9 multiply-adds
// A row that one vector holds is loaded once, and what the other columns see of it is a permutation each; of rows that
// half a vector holds there are two, of two channels.
//   loads      2 for 9 multiply-adds, 4 where a vector is two channels
//
// Lanes beyond the gradient have no product. A source beyond the image is zero: whoever asks for this gradient looks
// whether such a zero has met an Inf.
#pragma once

#include "cpu/depthwise/depthwise.h"
#include "cpu/depthwise/prologue.h"
#include "cpu/depthwise/strips.h"
#include "cpu/staging/slices.h"

namespace groupconv::cpu {
namespace {

#if defined(__AVX512F__)

// The lanes of one strip.
struct GradStripLanes {
  uint32_t grad;
  uint32_t inside[3];  // of the window's columns: those that meet a pixel of the source
};

// The rows of the strips of one map.
struct GradStripRows {
  int64_t first, end;   // of the gradient
  int64_t top, height;  // its row r meets source rows r + top and two more, of `height` that there are
  int64_t source_stride, grad_stride;
};

// The same pixel, one column on: for each lane the one before it, the one after it.
alignas(64) constexpr int32_t lane_before[16] = {15, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14};
alignas(64) constexpr int32_t lane_after[16] = {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 0};

// `source`: of each channel of a vector row 0, at the window's middle column; `grad`: row 0.
template <class Lanes, bool Turns, class T, class Stored>
GROUPCONV_INLINE void add_strip(const GradStripRows& rows, const GradStripLanes& all,
                                const Stored* const (&source)[2], const Stored* const (&grad)[2],
                                Vec<T> (&sums)[9]) {
  using V_ = Vec<T>;
  constexpr int window = 3;
  typename Lanes::Mask inside[window];
#pragma GCC unroll 3
  for (int j = 0; j < window; ++j) inside[j] = Lanes::mask(all.inside[j]);
  const auto lanes = Lanes::mask(all.grad);
  const auto before = V_::load_index(lane_before), after = V_::load_index(lane_after);
  const auto first = Lanes::every(inside[0]), last = Lanes::every(inside[2]);
  const int64_t height = rows.height, end = rows.end;
  int64_t row = rows.first, y = row + rows.top;
  int64_t from = y * rows.source_stride, to = row * rows.grad_stride;

  const auto load_row = [&](V_(&x)[window]) GROUPCONV_INLINE_LAMBDA {
    if (__builtin_expect(y < 0 || y >= height, 0)) {
#pragma GCC unroll 3
      for (int j = 0; j < window; ++j) x[j] = zero<T>();
    } else if constexpr (Turns) {
      x[1] = Lanes::load(source[0] + from, source[1] + from, inside[1]);
      x[0] = permute(x[1], before, first);
      x[2] = permute(x[1], after, last);
    } else {
#pragma GCC unroll 3
      for (int j = 0; j < window; ++j) {
        x[j] = Lanes::load(source[0] + from + j - 1, source[1] + from + j - 1, inside[j]);
      }
    }
    ++y;
    from += rows.source_stride;
  };
  using Row = V_[window];  // as each column of the window sees it
  const auto add_row = [&](const Row& upper, const Row& middle, Row& lower) GROUPCONV_INLINE_LAMBDA {
    load_row(lower);
    V_ g = Lanes::load(grad[0] + to, grad[1] + to, lanes);
    pin(g);
#pragma GCC unroll 3
    for (int j = 0; j < window; ++j) {
      sums[j] = multiply_add(g, upper[j], sums[j]);
      sums[3 + j] = multiply_add(g, middle[j], sums[3 + j]);
      sums[6 + j] = multiply_add(g, lower[j], sums[6 + j]);
    }
    to += rows.grad_stride;
    return ++row < end;
  };
  V_ x[window][window];
  load_row(x[0]);
  load_row(x[1]);
  while (add_row(x[0], x[1], x[2]) && add_row(x[1], x[2], x[0]) && add_row(x[2], x[0], x[1])) {
  }
}

template <class Stored>
class DepthwiseGradStrips {
  using T = compute_t<Stored>;
  using V_ = Vec<T>;
  static constexpr int lanes = V_::lanes;
  static constexpr int taps = 9;

 public:
  explicit DepthwiseGradStrips(const WeightGradProblem<Stored>& problem)
      : p_(problem),
        sweep_(*problem.sweep),
        grid_(sweep_),
        prepared_(p_.input, p_.prologue, sweep_, grid_),
        // What the middle column sees of a row is then all of it.
        turns_(sweep_.cols <= lanes && grid_.col(1) == 0 && p_.input.width <= sweep_.cols),
        halves_(turns_ && sweep_.cols <= half_lanes<T>) {
    for (int t = 0; t < taps; ++t) places_[t] = grid_.weight(t / 3, t % 3);
  }

  static bool suits(const WeightGradProblem<Stored>& p) {
    return is_rows(p.grad) && is_rows(p.input) && goes_down_strips(*p.sweep);
  }

  void run() const {
    constexpr int64_t groups_per_item = 16;
    const int64_t groups = p_.partition->groups;
    const int64_t chunks = divide_up(groups, groups_per_item);
    add_slices(p_.threads, p_.slices, chunks, p_.weight_grad, p_.partition->entries() * p_.window_area,
               [&](int64_t slice, int64_t chunk, T* weight_grad) {
                 const int64_t first = chunk * groups_per_item;
                 run_groups(slice, first, smaller(first + groups_per_item, groups), weight_grad);
               });
  }

 private:
  struct Channel {
    int64_t input, output;
    T* weight_grad;  // [window]
  };

  struct Images {
    int64_t begin, end;
  };

  void run_groups(int64_t slice, int64_t first, int64_t end, T* weight_grad) const {
    const PartitionView& partition = *p_.partition;
    const int64_t strips = divide_up(sweep_.cols, lanes);
    Workspace space;
    space.plan<GradStripLanes>(strips);
    space.plan<Stored>(2 * prepared_.size());
    space.open();
    GradStripLanes* all = space.take<GradStripLanes>(strips);
    Stored* prepared = space.take<Stored>(2 * prepared_.size());
    for (int64_t s = 0; s < strips; ++s) {
      const int64_t col = s * lanes;
      all[s].grad = (1u << smaller<int64_t>(lanes, sweep_.cols - col)) - 1;
      for (int64_t j = 0; j < 3; ++j) {
        all[s].inside[j] = all[s].grad & pixels_inside(col + grid_.col(j), lanes, 1, p_.input.width);
      }
    }
    const Images images{p_.input.batch * slice / p_.slices, p_.input.batch * (slice + 1) / p_.slices};
    Channel waiting[2];
    int count = 0;
    const auto run = [&] {
      if (halves_) {
        if (count == 1) waiting[1] = waiting[0];
        run_channels<HalfLanes, true>(images, waiting, count, all, prepared);
      } else if (turns_) {
        run_channels<WholeLanes<T>, true>(images, waiting, 1, all, prepared);
      } else {
        run_channels<WholeLanes<T>, false>(images, waiting, 1, all, prepared);
      }
      count = 0;
    };
    for (int64_t g = first; g < end; ++g) {
      for (int64_t j = 0; j < partition.outputs.count(g); ++j) {
        waiting[count++] = {partition.inputs.of(g)[0], partition.outputs.of(g)[j],
                            weight_grad + (partition.weight_offsets[g] + j) * p_.window_area};
        if (count == (halves_ ? 2 : 1)) run();
      }
    }
    if (count > 0) run();
  }

  // `count`: of the channels in a vector, those whose sums are wanted.
  template <class Lanes, bool Turns>
  void run_channels(const Images& images, const Channel* channels, int count, const GradStripLanes* all,
                    Stored* prepared) const {
    V_ sums[taps];
#pragma GCC unroll 9
    for (int t = 0; t < taps; ++t) sums[t] = zero<T>();
    for (int64_t n = images.begin; n < images.end; ++n) {
      for (int64_t row = 0; row < sweep_.rows;) {
        const Stored *source[2], *grad[2];
        Band<Stored> band{};
#pragma GCC unroll 2
        for (int c = 0; c < Lanes::channels; ++c) {
          band = prepared_.band(n, channels[c].input, row, prepared + c * prepared_.size());
          source[c] = band.plane + grid_.col(1);
          grad[c] = p_.grad.at(n, channels[c].output, 0, 0);
        }
        if constexpr (Lanes::channels == 1) source[1] = source[0], grad[1] = grad[0];
        const GradStripRows rows{band.first_row,  band.end_row,  grid_.row(0),
                                 p_.input.height, band.stride_h, p_.grad.stride_h};
        add_strip<Lanes, Turns>(rows, all[0], source, grad, sums);
        if constexpr (!Turns) {
          for (int64_t s = 1; s * lanes < sweep_.cols; ++s) {
            source[0] += lanes, grad[0] += lanes;
            add_strip<Lanes, Turns>(rows, all[s], source, grad, sums);
          }
        }
        row = band.end_row;
      }
    }
    T totals[2][taps];
    Lanes::template sum_each<taps>(sums, totals[0], totals[1]);
    for (int c = 0; c < count; ++c) {
      for (int t = 0; t < taps; ++t) channels[c].weight_grad[places_[t]] += totals[c][t];
    }
  }

  const WeightGradProblem<Stored>& p_;
  const Sweep& sweep_;
  TapGrid grid_;
  PreparedPlane<Stored> prepared_;
  int64_t places_[taps];  // in the window
  bool turns_;            // rows that a vector holds
  bool halves_;           // rows that half a vector holds
};

#endif

}  // namespace
}  // namespace groupconv::cpu
