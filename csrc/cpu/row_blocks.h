// Weights in blocks of the rows that multiply_rows takes at a time, next to each other for each source: of each
// group [rows / max_tile_rows][depth][max_tile_rows], by one pass over them.
#pragma once

#include "cpu/multiply.h"
#include "cpu/staging.h"

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

}  // namespace
}  // namespace groupconv::cpu
