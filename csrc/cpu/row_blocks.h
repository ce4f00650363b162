// Weights in blocks of the rows that multiply_rows takes at a time, next to each other for each source: of each
// group [rows / max_tile_rows][depth][max_tile_rows]. An input gradient's without a window lie so already. It is
// one pass over the weights, once a call for all tiles and threads, and pays where enough pixels are multiplied
// by them and they stay in cache.
#pragma once

#include "cpu/multiply.h"
#include "cpu/sides.h"
#include "cpu/staging.h"
#include "cpu/workspace.h"

namespace groupconv::cpu {
namespace {

// What a group takes in blocks.
GROUPCONV_INLINE int64_t size_in_blocks(int64_t rows, int64_t depth) {
  return divide_up(rows, max_tile_rows) * max_tile_rows * depth;
}
GROUPCONV_INLINE bool worth_blocks(int64_t pixels, int64_t bytes) {
  constexpr int64_t enough_pixels = 128, most_bytes = 1 << 20;
  return pixels >= enough_pixels && bytes <= most_bytes;
}

// Rows of `depth` neighbours, `distance` apart, in blocks of those that multiply_rows takes at a time. Returns the end.
template <class Stored, class T>
T* bring_into_blocks(const Stored* rows, int64_t distance, int64_t count, int64_t depth, T* to) {
  for (int64_t row = 0; row < count; row += max_tile_rows, to += depth * max_tile_rows) {
    transpose_in(rows + row * distance, distance, smaller<int64_t>(max_tile_rows, count - row), depth, to,
                 max_tile_rows);
  }
  return to;
}

template <class Stored, class Operand>
class RowBlocks {
 public:
  // `shared`: a group has a row more than destinations, that of the channel which all of them read.
  RowBlocks(const Sides<Stored>& sides, bool shared) : sides_(sides), shared_(shared), memory_(plan()) {
    if (size_ == 0) return;
    space_.open(memory_);
    Operand* to = space_.take<Operand>(size_);
    starts_ = space_.take<const Operand*>(sides_.groups);
    steps_ = space_.take<int64_t>(depth_);
    for (int64_t j = 0; j < depth_; ++j) steps_[j] = j * max_tile_rows;
    if constexpr (channels_in<Operand> == 1) {
      for (int64_t g = 0; g < sides_.groups; ++g) {
        starts_[g] = to;
        to = pack(g, to);
      }
    }
  }

  // A group's, or null: its rows are read as they lie.
  const Operand* of(int64_t group) const { return starts_ ? starts_[group] : nullptr; }
  // From the first source's weights to those of each other, of the group that has most of them.
  const int64_t* steps() const { return steps_; }

 private:
  size_t plan() {
    const auto& p = sides_.problem;
    const int64_t pixels = p.dest.batch * p.sweep->rows * p.sweep->cols;
    // An input gradient's weights lie so already where they have no window.
    const bool as_they_lie = p.transposed && p.window_area == 1;
    if (channels_in<Operand> > 1 || as_they_lie) return 0;
    int64_t size = 0;
    for (int64_t g = 0; g < sides_.groups; ++g) {
      depth_ = larger(depth_, depth(g));
      size += size_in_blocks(rows(g), depth(g));
    }
    if (!worth_blocks(pixels, size * static_cast<int64_t>(sizeof(Operand)))) return 0;
    size_ = size;
    space_.plan<Operand>(size_);
    space_.plan<const Operand*>(sides_.groups);
    space_.plan<int64_t>(depth_);
    return space_.bytes();
  }
  int64_t rows(int64_t group) const { return sides_.dests.count(group) + (shared_ ? 1 : 0); }
  int64_t depth(int64_t group) const { return sides_.sources.count(group) * sides_.taps; }

  // Returns the end of the group.
  Operand* pack(int64_t group, Operand* to) const {
    const auto& p = sides_.problem;
    const int64_t count = rows(group), step = sides_.dest_step(group);
    const Operand* from =
        sides_.weight(group) + (shared_ ? sides_.sources.offsets[group] * p.window_area : 0);
    const bool every = sides_.every_tap();
    if (every && !p.transposed) return bring_into_blocks(from, step, count, step, to);
    for (int64_t row = 0; row < count; row += max_tile_rows, from += max_tile_rows * step) {
      const int64_t present = smaller<int64_t>(max_tile_rows, count - row);
      for (int64_t i = 0; i < sides_.sources.count(group); ++i) {
        const Operand* windows = from + i * sides_.source_step(group);
        if (every) {
          to = bring_into_blocks(windows, step, present, p.window_area, to);
          continue;
        }
        for (const Tap& tap : p.sweep->taps) {
          const Operand* column = windows + tap.weight;
          for (int64_t r = 0; r < present; ++r) to[r] = column[r * step];
          to += max_tile_rows;
        }
      }
    }
    return to;
  }

  const Sides<Stored>& sides_;
  bool shared_;
  int64_t size_ = 0, depth_ = 0;
  Workspace space_;
  SharedScratch memory_;
  const Operand** starts_ = nullptr;
  int64_t* steps_ = nullptr;
};

}  // namespace
}  // namespace groupconv::cpu
