// The packed weight of one call as the operands that a kernel multiplies by: as it is, or interleaved in pairs
// of source channels, once for all tiles and threads.
//
// The weight of destination r, operand i and tap t of a group is of(group)[r · dest_step + i · source_step + t].
#pragma once

#include "cpu/sides.h"
#include "cpu/workspace.h"

namespace groupconv::cpu {
namespace {

template <class Stored, class Operand = compute_t<Stored>>
class Weights {
 public:
  explicit Weights(const Sides<Stored>& sides) : sides_(sides) {}

  const Operand* of(int64_t group) const { return sides_.weight(group); }
  int64_t dest_step(int64_t group) const { return sides_.dest_step(group); }
  int64_t source_step(int64_t group) const { return sides_.source_step(group); }

 private:
  const Sides<Stored>& sides_;
};

template <class Stored>
class Weights<Stored, Pair<Stored>> {
  using T = compute_t<Stored>;
  using Operand = Pair<Stored>;

 public:
  explicit Weights(const Sides<Stored>& sides) : sides_(sides), memory_(plan()) {
    space_.open(memory_);
    first_ = space_.take<Operand>(size_);
    starts_ = space_.take<int64_t>(sides_.groups);
    Operand* to = first_;
    for (int64_t g = 0; g < sides_.groups; ++g) {
      starts_[g] = to - first_;
      to = interleave(g, to);
    }
  }

  const Operand* of(int64_t group) const { return first_ + starts_[group]; }
  int64_t dest_step(int64_t group) const {
    return sides_.problem.transposed
               ? sides_.dest_step(group)
               : sides_.source_step(group) * operands_for<Operand>(sides_.sources.count(group));
  }
  int64_t source_step(int64_t group) const { return sides_.source_step(group); }

 private:
  size_t plan() {
    for (int64_t g = 0; g < sides_.groups; ++g) {
      size_ +=
          operands_for<Operand>(sides_.sources.count(g)) * sides_.dests.count(g) * sides_.problem.window_area;
    }
    space_.plan<Operand>(size_);
    space_.plan<int64_t>(sides_.groups);
    return space_.bytes();
  }

  // Returns the end of the group. In an input gradient all weights of a source channel lie in one run; in a
  // forward pass each destination has a run of its own.
  Operand* interleave(int64_t group, Operand* to) const {
    const T* from = sides_.weight(group);
    const int64_t run = sides_.source_step(group), sources = sides_.sources.count(group);
    const int64_t blocks = sides_.problem.transposed ? 1 : sides_.dests.count(group);
    for (int64_t b = 0; b < blocks; ++b) {
      if (run == 1) {  // side by side already
        if (sources % 2) to[sources / 2] = {};
        for_each_vector<T>(sources, [&](int64_t i, auto mask) GROUPCONV_INLINE_LAMBDA {
          Vec<T>::load(from + i, mask).store(reinterpret_cast<Stored*>(to) + i, mask);
        });
        from += sources;
        to += operands_for<Operand>(sources);
        continue;
      }
      for (int64_t i = 0; i < sources; i += 2, to += run) {
        interleave_row(from, i + 1 < sources ? from + run : nullptr, to, run);
        from += i + 1 < sources ? 2 * run : run;
      }
    }
    return to;
  }

  const Sides<Stored>& sides_;
  int64_t size_ = 0;
  Workspace space_;
  SharedScratch memory_;
  Operand* first_;
  int64_t* starts_;
};

}  // namespace
}  // namespace groupconv::cpu
