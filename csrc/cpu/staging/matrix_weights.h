// The packed weight of one call as left operands of matrix registers, once for all tiles and threads.
//
// Of a set of groups: for 16 destinations, a tap and 32 sources a register; zero where a destination does not read a
// source, or either is none.
#pragma once

#include "cpu/staging/group_sets.h"
#include "cpu/staging/packed_memory.h"
#include "cpu/staging/workspace.h"
#include "cpu/vector/convert.h"
#include "cpu/vector/transpose.h"

namespace groupconv::cpu {
namespace {

class MatrixWeights {
 public:
  // Or `turned`, as right operands: pairs of sources are rows, and 16 destinations columns.
  explicit MatrixWeights(const Sides<BFloat16>& sides, bool turned = false)
      : sides_(sides), memory_(plan(turned)) {
    space_.open(memory_);
    first_ = packed_.take(space_);
    starts_ = space_.take<int64_t>(sides_.groups);
    int64_t start = 0;
    for_each_set(sides_, [&](const GroupSet& set) {
      starts_[set.first] = start;
      if (!packed_.filled()) pack(set, first_ + start);
      start += size_of(set);
    });
    if (turned && !packed_.filled()) turn();
    packed_.keep();
  }

  // Registers of 16 destinations from `row` on, a multiple of 16: [tap][block of sources].
  const BFloat16* of(const GroupSet& set, int64_t row) const {
    return first_ + starts_[set.first] + row / block_rows * row_block(set);
  }

  // From one to the same of the next 16 destinations.
  int64_t row_block(const GroupSet& set) const {
    return sides_.taps * divide_up(set.of(sides_.sources).count, block_depth) * register_numbers;
  }

 private:
  int64_t size_of(const GroupSet& set) const {
    return divide_up(set.of(sides_.dests).count, block_rows) * row_block(set);
  }
  size_t plan(bool turned) {
    for_each_set(sides_, [&](const GroupSet& set) { size_ += size_of(set); });
    packed_.open(sides_, &packer<MatrixWeights>, size_, turned);
    packed_.plan(space_);
    space_.plan<int64_t>(sides_.groups);
    return space_.bytes();
  }

  void turn() {
    constexpr int64_t pairs = block_depth / 2;
    for (int64_t i = 0; i < size_; i += register_numbers) {
      Pair<BFloat16> rows[block_rows * pairs];
      std::memcpy(rows, first_ + i, sizeof rows);
      transpose_in(rows, pairs, block_rows, pairs, reinterpret_cast<Pair<BFloat16>*>(first_ + i), block_cols);
    }
  }

  void pack(const GroupSet& set, BFloat16* to) const {
    const int64_t sources = set.of(sides_.sources).count, rows = set.of(sides_.dests).count;
    if (set.joins() || rows % block_rows != 0 || sources % block_depth != 0) fill_zero(to, size_of(set));
    for (int64_t g = set.first; g < set.end; ++g) {
      pack_group(set, g, sides_.dests.offsets[g] - sides_.dests.offsets[set.first],
                 sides_.sources.offsets[g] - sides_.sources.offsets[set.first], to);
    }
  }

  void pack_group(const GroupSet& set, int64_t group, int64_t dest, int64_t source, BFloat16* to) const {
    if (sides_.problem.weight) return pack_numbers(sides_.problem.weight, set, group, dest, source, to);
    pack_numbers(sides_.problem.stored_weight, set, group, dest, source, to);
  }

  // The group's first destination and source are these of the set; the source is 0 where there are more than 32. In a
  // forward pass the windows of a destination's sources follow each other, in an input gradient those of a source's
  // destinations: either way columns of a block that is transposed.
  template <class Number>
  void pack_numbers(const Number* weight, const GroupSet& set, int64_t group, int64_t dest, int64_t source,
                    BFloat16* to) const {
    constexpr int64_t most_columns = 256;
    const int64_t rows = sides_.dests.count(group), sources = sides_.sources.count(group);
    const int64_t area = sides_.problem.window_area, step = sides_.source_step(group);
    const int64_t dest_step = sides_.dest_step(group);
    const int64_t at_once =
        dest_step == area ? smaller(block_rows, larger(most_columns / area, int64_t{1})) : int64_t{1};
    const int64_t next_rows = row_block(set), next_tap = next_rows / larger(sides_.taps, int64_t{1});
    for (int64_t r = 0; r < rows; r += at_once) {
      const int64_t columns = smaller(at_once, rows - r) * area;
      for (int64_t k = 0; k < sources; k += block_depth) {
        const int64_t count = smaller(sources - k, block_depth);
        const auto low = Vec<float>::first(smaller(count, block_cols));
        const auto high = Vec<float>::first(larger(count - block_cols, int64_t{0}));
        const Number* from = weight + sides_.first_weight(group) + r * dest_step + k * step;
        float transposed[most_columns][block_depth];
        const bool transposes = step > 1 && columns <= most_columns;
        if (transposes) transpose_in(from, step, count, columns, transposed[0], block_depth);
        for (int64_t c = 0; c < columns; c += area) {
          const int64_t row = dest + r + c / area;
          BFloat16* words = to + row / block_rows * next_rows + k / block_depth * register_numbers +
                            row % block_rows * block_depth + source;
          for (const Tap& tap : sides_.problem.sweep->taps) {
            const auto copy = [&](const auto* numbers) GROUPCONV_INLINE_LAMBDA {
              Vec<float>::load(numbers, low).store(words, low);
              Vec<float>::load(numbers + block_cols, high).store(words + block_cols, high);
            };
            const Number* numbers = from + c + tap.weight;
            if (transposes) {
              copy(transposed[c + tap.weight]);
            } else if (step == 1) {
              copy(numbers);
            } else {
              for (int64_t i = 0; i < count; ++i) narrow(widen(numbers[i * step]), words[i]);
            }
            words += next_tap;
          }
        }
      }
    }
  }

  const Sides<BFloat16>& sides_;
  int64_t size_ = 0;
  PackedMemory<BFloat16> packed_;
  Workspace space_;
  SharedScratch memory_;
  BFloat16* first_;
  int64_t* starts_;
};

}  // namespace
}  // namespace groupconv::cpu
