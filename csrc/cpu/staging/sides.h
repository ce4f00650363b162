// A partitioned convolution seen from the side that a pass computes: forward from inputs to outputs, input
// gradient from outputs to inputs, with the packed weight read accordingly.
#pragma once

#include "cpu/kernels.h"

namespace groupconv::cpu {
namespace {

template <class Stored>
struct Sides {
  using T = compute_t<Stored>;

  const ConvolveProblem<Stored>& problem;
  ChannelLists sources, dests;
  int64_t most_sources;  // of one group
  int64_t groups, taps;

  explicit Sides(const ConvolveProblem<Stored>& p)
      : problem(p),
        sources(p.transposed ? p.partition->outputs : p.partition->inputs),
        dests(p.transposed ? p.partition->inputs : p.partition->outputs),
        most_sources(p.transposed ? p.partition->most_outputs : p.partition->most_inputs),
        groups(p.partition->groups),
        taps(static_cast<int64_t>(p.sweep->taps.size())) {}

  // A group's weights, and the distance from one destination or source channel to the next.
  int64_t first_weight(int64_t group) const {
    return problem.partition->weight_offsets[static_cast<size_t>(group)] * problem.window_area;
  }
  const T* weight(int64_t group) const { return problem.weight + first_weight(group); }
  int64_t dest_step(int64_t group) const {
    return problem.window_area * (problem.transposed ? 1 : problem.partition->inputs.count(group));
  }
  int64_t source_step(int64_t group) const {
    return problem.window_area * (problem.transposed ? problem.partition->inputs.count(group) : 1);
  }
  T bias(int64_t dest) const { return problem.bias ? problem.bias[dest] : T(0); }
};

// Whether images, rows of so many pixels, follow each other like pixels of one; those that are there.
template <class... Images>
bool images_follow(int64_t pixels, const Images&... images) {
  return ((!images.data || images.stride_n == pixels * images.stride_w) && ...);
}

// The destination channels of every group are neighbours, in ascending order.
template <class Stored>
bool writes_neighbours(const Sides<Stored>& sides) {
  for (int64_t g = 0; g < sides.groups; ++g) {
    for (int64_t r = 1; r < sides.dests.count(g); ++r) {
      if (sides.dests.of(g)[r] != sides.dests.of(g)[r - 1] + 1) return false;
    }
  }
  return true;
}

}  // namespace
}  // namespace groupconv::cpu
