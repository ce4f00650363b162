// The packed weight of one call as the operands that a kernel multiplies by: as it is, or interleaved in pairs
// of source channels, once for all tiles and threads. A pointwise weight of even groups that is given as it is stored is
// pairs where it lies.
//
// The weight of destination r, operand i and tap t of a group is of(group)[r · dest_step + i · source_step + t].
#pragma once

#include "cpu/staging/packed_memory.h"
#include "cpu/staging/sides.h"
#include "cpu/staging/stage.h"
#include "cpu/staging/workspace.h"
#include "cpu/vector/transpose.h"

namespace groupconv::cpu {
namespace {

template <class Stored, class Operand = compute_t<Stored>>
class Weights {
 public:
  explicit Weights(const Sides<Stored>& sides, bool = false) : sides_(sides) {}

  const Operand* of(int64_t group) const { return sides_.weight(group); }
  int64_t dest_step(int64_t group) const { return sides_.dest_step(group); }
  int64_t source_step(int64_t group) const { return sides_.source_step(group); }

 private:
  const Sides<Stored>& sides_;
};

template <class Stored>
class Weights<Stored, Pair<Stored>> {
  using Operand = Pair<Stored>;

 public:
  // `may_keep`: they are what the caller multiplies by, not packed once more.
  explicit Weights(const Sides<Stored>& sides, bool may_keep = false)
      : sides_(sides), as_stored_(lie_in_pairs()), memory_(plan(may_keep)) {
    if (as_stored_) return;
    space_.open(memory_);
    first_ = packed_.take(space_);
    starts_ = space_.take<int64_t>(sides_.groups);
    Operand* to = first_;
    for (int64_t g = 0; g < sides_.groups; ++g) {
      starts_[g] = to - first_;
      if (!packed_.filled()) interleave(g, to);
      to += size_of(g);
    }
    packed_.keep();
  }

  const Operand* of(int64_t group) const {
    if (!as_stored_) return first_ + starts_[group];
    return reinterpret_cast<const Operand*>(sides_.problem.stored_weight + sides_.first_weight(group));
  }
  int64_t dest_step(int64_t group) const {
    return sides_.problem.transposed
               ? sides_.dest_step(group)
               : sides_.source_step(group) * operands_for<Operand>(sides_.sources.count(group));
  }
  int64_t source_step(int64_t group) const { return sides_.source_step(group); }

 private:
  // A pointwise weight, as it is stored, whose groups read an even number of channels.
  bool lie_in_pairs() const {
    bool all = !sides_.problem.weight && !sides_.problem.transposed && sides_.problem.window_area == 1;
    for (int64_t g = 0; g < sides_.groups; ++g) all = all && sides_.sources.count(g) % 2 == 0;
    return all;
  }

  size_t plan(bool may_keep) {
    if (as_stored_) return 0;
    int64_t size = 0;
    for (int64_t g = 0; g < sides_.groups; ++g) size += size_of(g);
    packed_.open(sides_, may_keep ? &packer<Weights> : nullptr, size);
    packed_.plan(space_);
    space_.plan<int64_t>(sides_.groups);
    return space_.bytes();
  }

  int64_t size_of(int64_t group) const {
    return operands_for<Operand>(sides_.sources.count(group)) * sides_.dests.count(group) *
           sides_.problem.window_area;
  }

  void interleave(int64_t group, Operand* to) const {
    const int64_t first = sides_.first_weight(group);
    sides_.problem.weight ? interleave(group, sides_.problem.weight + first, to)
                          : interleave(group, sides_.problem.stored_weight + first, to);
  }
  // In an input gradient all weights of a source channel lie in one run; in a
  // forward pass each destination has a run of its own.
  template <class Number>
  void interleave(int64_t group, const Number* from, Operand* to) const {
    const int64_t run = sides_.source_step(group), sources = sides_.sources.count(group);
    const int64_t blocks = sides_.problem.transposed ? 1 : sides_.dests.count(group);
    if constexpr (__is_same(Number, Stored)) {
      if (2 * run <= Vec<Stored>::lanes && sources % 2 == 0) {
        return interleave_windows(from, run, blocks * sources / 2, to);
      }
    }
    for (int64_t b = 0; b < blocks; ++b) {
      if (run == 1) {  // side by side already
        if (sources % 2) to[sources / 2] = {};
        copy(from, sources, reinterpret_cast<Stored*>(to));
        from += sources;
        to += operands_for<Operand>(sources);
        continue;
      }
      for (int64_t i = 0; i < sources; i += 2, to += run) {
        interleave_row(from, i + 1 < sources ? from + run : nullptr, to, run);
        from += i + 1 < sources ? 2 * run : run;
      }
    }
  }
  // Two windows of `run` numbers, which follow each other, fit a vector.
  static void interleave_windows(const Stored* from, int64_t run, int64_t pairs, Operand* to) {
    using V_ = Vec<Stored>;
    uint16_t number[V_::lanes] = {};
    for (int64_t i = 0; i < 2 * run; ++i) number[i] = static_cast<uint16_t>(i % 2 * run + i / 2);
    const V_ index = V_::load_index(number);
    const auto both = V_::first(2 * run);
    for (int64_t p = 0; p < pairs; ++p, from += 2 * run, to += run) {
      merge_permuted(V_::nothing(), both, index, V_::load(from, both))
          .store(reinterpret_cast<Stored*>(to), both);
    }
  }
  static void copy(const Stored* from, int64_t count, Stored* to) {
    std::memcpy(to, from, static_cast<size_t>(count) * sizeof(Stored));
  }
  template <class Widened>
  static void copy(const Widened* from, int64_t count, Stored* to) {
    for_each_vector<Widened>(count, [&](int64_t i, auto mask) GROUPCONV_INLINE_LAMBDA {
      Vec<Widened>::load(from + i, mask).store(to + i, mask);
    });
  }

  const Sides<Stored>& sides_;
  bool as_stored_;
  PackedMemory<Operand> packed_;
  Workspace space_;
  SharedScratch memory_;
  Operand* first_ = nullptr;
  int64_t* starts_ = nullptr;
};

// Weights of `channels` destinations next to each other, for lanes: to[(i · taps + t) · width + r], zero behind the last
// channel. The weight of destination r, source i and tap t is from[r · row + i · step + tap_at(t)]; a window has `area`
// of them.
template <class X, class TapAt>
void pack_lanes(const X* from, int64_t row, int64_t step, int64_t sources, int64_t taps, int64_t area,
                const TapAt& tap_at, int64_t channels, int64_t width, X* to) {
  constexpr int64_t most_area = 64;
  if (channels < width) fill_zero(to, sources * taps * width);
  bool in_order = taps == area;
  for (int64_t t = 0; t < taps && in_order; ++t) in_order = tap_at(t) == t;
  if (in_order && step == area) {  // what is summed over lies in one run
    return transpose_in(from, row, channels, sources * area, to, width);
  }
  X* places[most_area];
  const bool whole_windows = taps == area && area <= most_area;
  for (int64_t i = 0; i < sources; ++i, from += step, to += taps * width) {
    if (row == 1 && taps == 1) {  // they are next to each other
      for_each_vector<X>(channels, [&](int64_t r, auto mask) GROUPCONV_INLINE_LAMBDA {
        Vec<X>::load(from + r, mask).store(to + r, mask);
      });
    } else if (whole_windows) {
      for (int64_t t = 0; t < taps; ++t) places[tap_at(t)] = to + t * width;
      transpose_rows(SpacedRows<X>{from, row}, channels, area,
                     [&](int64_t c) GROUPCONV_INLINE_LAMBDA { return places[c]; });
    } else {
      for (int64_t t = 0; t < taps; ++t) {
        for (int64_t r = 0; r < channels; ++r) to[t * width + r] = from[r * row + tap_at(t)];
      }
    }
  }
}

}  // namespace
}  // namespace groupconv::cpu
