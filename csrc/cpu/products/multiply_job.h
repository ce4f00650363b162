// What multiply_rows is asked for.
#pragma once

#include "cpu/vector/pair.h"
#include "cpu/vector/row_gaps.h"
#include "cpu/vector/stores.h"
#include "cpu/vector/vec.h"

namespace groupconv::cpu {
namespace {

// dest[r][q] = bias[r] + Σ_j weight[r][j] · source[j][q], stored as `Out`: rounded once where that is narrower.
template <class T, class Out = sum_t<T>>
struct MultiplyJob {
  const T* const* sources;  // [depth] rows, at the tile's first pixel
  const T* const* next;     // the rows that are read after these, as many, or null: nobody knows
  bool from_afar;           // sources lie beyond a core's own caches
  const int64_t* steps;     // [depth] distance of source j's weight from a row's first weight
  int64_t depth;
  const T* weight;
  int64_t weight_row_stride;
  T* columns;                   // [most_columns][depth] scratch
  T* tile;                      // [depth][tile_width] scratch to copy source rows to, or null
  const T** tile_rows;          // [depth] scratch, where there is a tile
  Out* const* dests;            // [rows]
  const sum_t<T>* bias;         // [rows], or null
  const Out* const* residuals;  // [rows], or null
  int64_t rows;
  int64_t length;        // pixels, and gaps
  bool fetches_weights;  // those of the rows below a tile's, which follow them
  bool accumulate;       // add to what dests hold
  bool clamped;
  sum_t<T> low, high;
  Stores stores;          // streamed: dests begin lines
  const GapVector* gaps;  // null, or of all vectors: dests and residuals have no gaps, and do not accumulate
  int64_t pixels;         // of a row without gaps, where there are gaps
};

}  // namespace
}  // namespace groupconv::cpu
