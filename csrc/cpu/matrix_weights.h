// The packed weight of one call as left operands of matrix registers, once for all tiles and threads.
//
// Of a group: for 16 destinations, a tap and 32 sources a register; zero where a destination or a source is none.
#pragma once

#include "cpu/convert.h"
#include "cpu/matrix_registers.h"
#include "cpu/sides.h"
#include "cpu/staging.h"
#include "cpu/transpose.h"
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

  // In a forward pass the windows of a destination's sources follow each other, in an input gradient those of a
  // source's destinations: either way columns of a block that is transposed.
  BFloat16* pack(int64_t group, int64_t row, BFloat16* to) const {
    constexpr int64_t most_columns = 256;
    const int64_t rows = smaller(block_rows, sides_.dests.count(group) - row),
                  sources = sides_.sources.count(group);
    const int64_t area = sides_.problem.window_area, step = sides_.source_step(group);
    const int64_t dest_step = sides_.dest_step(group);
    const int64_t at_once = dest_step == area ? smaller(rows, larger(most_columns / area, int64_t{1})) : 1;
    const int64_t blocks = divide_up(sources, block_depth);
    if (rows < block_rows || sources % block_depth != 0) fill_zero(to, row_block(group));
    for (int64_t k = 0; k < sources; k += block_depth) {
      const int64_t count = smaller(sources - k, block_depth);
      const auto low = Vec<float>::first(smaller(count, block_cols));
      const auto high = Vec<float>::first(larger(count - block_cols, int64_t{0}));
      for (int64_t r = 0; r < rows; r += at_once) {
        const int64_t columns = smaller(at_once, rows - r) * area;
        const float* from = sides_.weight(group) + (row + r) * dest_step + k * step;
        float transposed[most_columns][block_depth];
        const bool transposes = step > 1 && columns <= most_columns;
        if (transposes) transpose_in(from, step, count, columns, transposed[0], block_depth);
        for (int64_t c = 0; c < columns; c += area) {
          BFloat16* words = to + k / block_depth * register_numbers + (r + c / area) * block_depth;
          for (const Tap& tap : sides_.problem.sweep->taps) {
            const float* numbers = transposes ? transposed[c + tap.weight] : from + c + tap.weight;
            const int64_t distance = transposes ? 1 : step;
            if (distance == 1) {
              Vec<float>::load(numbers, low).store(words, low);
              Vec<float>::load(numbers + block_cols, high).store(words + block_cols, high);
            } else {
              for (int64_t i = 0; i < count; ++i) narrow(numbers[i * distance], words[i]);
            }
            words += blocks * register_numbers;
          }
        }
      }
    }
    return to + row_block(group);
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
