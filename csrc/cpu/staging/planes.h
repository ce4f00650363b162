// Where a tile's pixels lie: in the image, and in the planes of scratch that a kernel reads instead.
#pragma once

#include "core/problem.h"
#include "core/sweep.h"
#include "cpu/vector/vec.h"

namespace groupconv::cpu {
namespace {

// A rectangle of a sweep's lattice.
struct Tile {
  int64_t row, col, rows, cols;
};

// Rows of scratch are an odd number of cache lines apart: with a round distance all rows would compete
// for a few sets of the L1, and walking across channels would miss on every one.
template <class T>
GROUPCONV_INLINE int64_t row_distance(int64_t length) {
  constexpr int64_t line = 64 / sizeof(T);
  return (divide_up(length, line) | 1) * line;
}

// Shape of the scratch that one tile's source needs: one plane per phase per channel. The padding behind a row is also
// that before the next one, where a tile has whole rows.
struct PlaneShape {
  int64_t rows, pitch, size;

  PlaneShape(const Sweep& sweep, const Tile& tile) : rows(tile.rows + sweep.halo_rows) {
    const int64_t shared = tile.cols == sweep.cols ? sweep.shared_cols : 0;
    pitch = tile.cols + sweep.halo_cols - shared;
    size = rows * pitch + shared;
  }
};

// Which pixels of an image become which plane: plane p holds the source pixels
// (first_row + row) · step + phases[p], for the tile's rows and columns.
struct Planes {
  int64_t first_row, first_col, step_h, step_w;
  const Phase* phases;
  int64_t count;
  Phase least{0, 0}, most{0, 0};  // of all phases

  explicit Planes(const Sweep& sweep)
      : first_row(sweep.first_row),
        first_col(sweep.first_col),
        step_h(sweep.source_step_h),
        step_w(sweep.source_step_w),
        phases(sweep.phases.data()),
        count(static_cast<int64_t>(sweep.phases.size())) {
    if (count > 0) least = most = phases[0];
    for (int64_t p = 1; p < count; ++p) {
      least = {smaller(least.row, phases[p].row), smaller(least.col, phases[p].col)};
      most = {larger(most.row, phases[p].row), larger(most.col, phases[p].col)};
    }
  }
  // The lattice itself, one plane.
  explicit Planes(const Phase& origin)
      : first_row(0), first_col(0), step_h(1), step_w(1), phases(&origin), count(1) {}
  Planes(Sweep&&) = delete;  // the phases stay where they are
  Planes(Phase&&) = delete;

  // A tile's planes reach beyond the image.
  bool padded(const Tile& tile, const PlaneShape& shape, int64_t height, int64_t width) const {
    const int64_t row = first_row + tile.row, col = first_col + tile.col;
    return row * step_h + least.row < 0 || col * step_w + least.col < 0 ||
           (row + shape.rows - 1) * step_h + most.row >= height ||
           (col + shape.pitch - 1) * step_w + most.col >= width;
  }
};

// Lattice positions of a tile, counted in its flattened rows; the gap between two rows is included.
GROUPCONV_INLINE int64_t tile_length(const Tile& tile, int64_t pitch) {
  return (tile.rows - 1) * pitch + tile.cols;
}

// The part of `count` plane columns, from plane coordinate `first` on, that lies inside the image.
struct Inside {
  int64_t begin, end;

  Inside(int64_t first, int64_t count, int64_t step, int64_t phase, int64_t size) {
    const int64_t from = first * step + phase;
    begin = smaller(count, from < 0 ? steps(-from, step) : 0);
    end = larger(begin, smaller(count, from < size ? steps(size - from, step) : 0));
  }
  static int64_t steps(int64_t distance, int64_t step) {
    return step == 1 ? distance : divide_up(distance, step);
  }
};

// Which channels to stage: all of them in order, or a list.
struct ChannelSet {
  const int32_t* list;  // null: 0, 1, 2, …
  int64_t count;

  int64_t operator[](int64_t i) const { return list ? list[i] : i; }
};

}  // namespace
}  // namespace groupconv::cpu
