// What every driver needs besides kernels: scratch that is taken piece by piece, and the size of the tiles
// that fit in cache.
#pragma once

#include <cstring>

#include "cpu/for_each_item.h"
#include "cpu/kernels.h"
#include "cpu/scratch.h"
#include "cpu/staging/planes.h"
#include "cpu/vector/vec.h"

namespace groupconv::cpu {
namespace {

// Adds up what will be taken, so that the buffer is asked for once; then hands the pieces out.
class Workspace {
 public:
  template <class T>
  void plan(int64_t count) {
    bytes_ += rounded<T>(count);
  }
  void open() { cursor_ = static_cast<char*>(thread_scratch(static_cast<size_t>(bytes_))); }
  void open(const SharedScratch& shared) { cursor_ = static_cast<char*>(shared.memory()); }
  size_t bytes() const { return static_cast<size_t>(bytes_); }
  template <class T>
  T* take(int64_t count) {
    T* piece = reinterpret_cast<T*>(cursor_);
    cursor_ += rounded<T>(count);
    return piece;
  }

 private:
  // Up to 64 bytes may be read past the last element, and no two pieces share a cache line. A kernel that
  // reads further asks for more.
  template <class T>
  static int64_t rounded(int64_t count) {
    return (count * static_cast<int64_t>(sizeof(T)) + 64 + 63) / 64 * 64;
  }

  int64_t bytes_ = 0;
  char* cursor_ = nullptr;
};

template <class T>
GROUPCONV_INLINE void fill_zero(T* p, int64_t count) {
  std::memset(p, 0, static_cast<size_t>(count) * sizeof(T));
}

// What a tile may take where tile_bytes would leave its vectors half empty.
constexpr int64_t most_tile_bytes = 960 << 10;

// The sweep's lattice cut into tiles: whole lattice rows where one fits, parts of a row otherwise.
struct Tiling {
  static constexpr int64_t narrowest = 48;
  int64_t tile_rows, tile_cols, across, count;

  // A tile stages `source_planes` planes and keeps `dest_rows` rows of sums, of `element` bytes each.
  // More tiles than cache asks for are made when `wanted` are.
  // A single row is cut into multiples of `unit_of_row`, what a kernel takes at once.
  Tiling(const Sweep& sweep, int64_t source_planes, int64_t dest_rows, int64_t element, int64_t wanted,
         int64_t unit_of_row = narrowest) {
    const int64_t budget = tile_bytes / element;
    const int64_t per_row = source_planes + dest_rows;  // planes and sums that one more row adds to
    const int64_t halo = source_planes * sweep.halo_rows;
    tile_rows = sweep.rows;
    tile_cols = sweep.cols;
    if (per_row > 0) {
      tile_rows = smaller(tile_rows, (budget / (sweep.cols + sweep.halo_cols) - halo) / per_row);
      if (tile_rows < 1) {
        tile_rows = 1;
        int64_t fit = budget / (halo + per_row) - sweep.halo_cols;
        // With very many channels, rather all the scratch there is than vectors that are not full.
        if (fit < narrowest) fit = most_tile_bytes / element / (halo + per_row) - sweep.halo_cols;
        const int64_t unit = fit < narrowest ? narrowest / 3 : narrowest;
        if (fit < sweep.cols) tile_cols = smaller(tile_cols, larger(fit / unit, int64_t{1}) * unit);
      }
    }
    if (sweep.rows > 1) {
      // Not so low that reading the halo again, or starting a tile, would cost more than it gains.
      const int64_t lowest = larger(divide_up(int64_t{256}, sweep.cols), 4 * sweep.halo_rows);
      tile_rows = smaller(tile_rows, larger(divide_up(sweep.rows, wanted), lowest));
    } else if (wanted > 1) {
      // To the nearest: a short tile more leaves threads more even than all tiles longer.
      const int64_t units = (divide_up(sweep.cols, wanted) + unit_of_row / 2) / unit_of_row;
      tile_cols = smaller(tile_cols, larger(units, int64_t{1}) * unit_of_row);
    }
    // Equal tiles rather than full ones and a rest.
    tile_rows = divide_up(sweep.rows, divide_up(sweep.rows, tile_rows));
    across = divide_up(sweep.cols, tile_cols);
    count = divide_up(sweep.rows, tile_rows) * across;
  }

  Tile tile(const Sweep& sweep, int64_t index) const {
    const int64_t row = index / across * tile_rows, col = index % across * tile_cols;
    return {row, col, smaller(tile_rows, sweep.rows - row), smaller(tile_cols, sweep.cols - col)};
  }
};

// Every lattice pixel reads the source pixel at its own place, all in one row: the image is rows as it lies.
template <class Element>
GROUPCONV_INLINE bool is_one_row(const Sweep& sweep, const Image<Element>& source) {
  return sweep.pointwise() && sweep.rows == 1 && source.height == 1 && source.width == sweep.cols &&
         source.stride_w == 1 && !source.channels_last();
}

// Rows of one tile of one image, wherever they come from: the image itself or staged planes.
template <class T>
struct SourceRows {
  const T* base;
  int64_t channel_stride, plane_stride, pitch;

  const T* row(int64_t channel, const Tap& tap) const {
    return base + channel * channel_stride + tap.plane * plane_stride + tap.row * pitch + tap.col;
  }
};

}  // namespace
}  // namespace groupconv::cpu
