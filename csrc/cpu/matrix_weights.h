// The packed weight of one call as left operands of matrix registers, once for all tiles and threads.
//
// Of a group: for 16 destinations, a tap and 32 sources a register; zero where a destination or a source is none.
#pragma once

#include "cpu/matrix_registers.h"
#include "cpu/sides.h"
#include "cpu/workspace.h"

namespace groupconv::cpu {
namespace {

class MatrixWeights {
 public:
  explicit MatrixWeights(const Sides<BFloat16>& sides) : sides_(sides), memory_(plan()) {
    space_.open(memory_);
    first_ = space_.take<BFloat16>(size_);
    starts_ = space_.take<int64_t>(sides_.groups);
    BFloat16* to = first_;
    for (int64_t g = 0; g < sides_.groups; ++g) {
      starts_[g] = to - first_;
      for (int64_t row = 0; row < sides_.dests.count(g); row += block_rows) to = pack(g, row, to);
    }
  }

  // Registers of 16 destinations from `row` on, a multiple of 16: [tap][block of sources].
  const BFloat16* of(int64_t group, int64_t row) const {
    return first_ + starts_[group] + row / block_rows * row_block(group);
  }

 private:
  int64_t row_block(int64_t group) const {
    return sides_.taps * divide_up(sides_.sources.count(group), block_depth) * register_numbers;
  }
  size_t plan() {
    for (int64_t g = 0; g < sides_.groups; ++g) {
      size_ += divide_up(sides_.dests.count(g), block_rows) * row_block(g);
    }
    space_.plan<BFloat16>(size_);
    space_.plan<int64_t>(sides_.groups);
    return space_.bytes();
  }

  BFloat16* pack(int64_t group, int64_t row, BFloat16* to) const {
    const int64_t rows = smaller(block_rows, sides_.dests.count(group) - row);
    const int64_t sources = sides_.sources.count(group), step = sides_.source_step(group);
    const float* from = sides_.weight(group) + row * sides_.dest_step(group);
    int32_t places[block_depth];
    for (int64_t k = 0; k < block_depth; ++k) places[k] = static_cast<int32_t>(k * step);
    for (const Tap& tap : sides_.problem.sweep->taps) {
      for (int64_t k = 0; k < sources; k += block_depth, to += register_numbers) {
        for (int64_t half = 0; half < 2; ++half) {
          const int64_t first = half * Vec<float>::lanes;
          const auto mask = Vec<float>::first(smaller<int64_t>(larger(sources - k - first, int64_t{0}), 16));
          for (int64_t r = 0; r < block_rows; ++r) {
            const float* numbers = from + r * sides_.dest_step(group) + tap.weight + (k + first) * step;
            Vec<float> x = zero<float>();
            if (r < rows)
              x = step == 1 ? Vec<float>::load(numbers, mask) : Vec<float>::gather(numbers, places, mask);
            x.store(to + r * block_depth + first);
          }
        }
      }
    }
    return to;
  }

  const Sides<BFloat16>& sides_;
  int64_t size_ = 0;
  Workspace space_;
  SharedScratch memory_;
  BFloat16* first_;
  int64_t* starts_;
};

}  // namespace
}  // namespace groupconv::cpu
