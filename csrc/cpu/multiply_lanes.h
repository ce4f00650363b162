// multiply_lanes: sums[q][r] = bias[r] + Σ_j weight[j][r] · source[j][q], lanes over destination channels r, the
// sources rows of pixels.
//
// multiply_rows (multiply.h) has lanes over pixels: of a padded map of 7² a quarter of them is no pixel, of 14² an
// eighth, and the last vectors make narrow tiles. Here every lane is a channel. Tile: S rows of W pixels of a small
// map, 28 sums or 24, and one vector of weights; the source's values are the multiply-adds' own operands. 29
// instructions for 28 multiply-adds, and as many loads, which is what limits it.
#pragma once

#include "cpu/vec.h"

namespace groupconv::cpu {
namespace {

template <class T>
struct LanesJob {
  const T* const* sources;  // [depth] rows, at lattice pixel (0, 0)
  int64_t depth;
  int64_t offset, pitch;  // of the tile's first row, and from row to row
  const T* weight;        // [depth][lanes]
  const T* bias;          // [lanes]
  T* sums;                // [S · W][lanes]
};

// How many rows of so many pixels make a tile; 0: there is none.
constexpr int64_t most_rows(int64_t width) {
  return width == 7 || width == 8 || width == 14 ? 28 / width : 0;
}

template <class T, int W, int S>
void multiply_lanes_tile(const LanesJob<T>& job) {
  using V_ = Vec<T>;
  V_ sums[S][W];
  const V_ start = V_::load(job.bias);
#pragma GCC unroll 4
  for (int s = 0; s < S; ++s) {
#pragma GCC unroll 14
    for (int p = 0; p < W; ++p) sums[s][p] = start;
  }
  const T* weight = job.weight;
  const T* const* const sources = job.sources;
  const int64_t offset = job.offset, pitch = job.pitch;
  for (int64_t j = 0, depth = job.depth; j < depth; ++j, weight += V_::lanes) {
    const V_ w = V_::load(weight);
    const T* source = sources[j] + offset;
#pragma GCC unroll 4
    for (int s = 0; s < S; ++s, source += pitch) {
      asm("" : "+r"(source));  // else the compiler keeps a distance for each pixel
#pragma GCC unroll 14
      for (int p = 0; p < W; ++p) sums[s][p] = multiply_add(w, V_::broadcast(source[p]), sums[s][p]);
    }
  }
  T* to = job.sums;
#pragma GCC unroll 4
  for (int s = 0; s < S; ++s) {
#pragma GCC unroll 14
    for (int p = 0; p < W; ++p) sums[s][p].store(to + (s * W + p) * V_::lanes);
  }
}

template <class T, int W, int S = most_rows(W)>
void multiply_lanes_up_to(const LanesJob<T>& job, int64_t rows) {
  if constexpr (S > 1) {
    if (rows < S) return multiply_lanes_up_to<T, W, S - 1>(job, rows);
  }
  multiply_lanes_tile<T, W, S>(job);
}

template <class T>
void multiply_lanes(const LanesJob<T>& job, int64_t width, int64_t rows) {
  if (width == 14) return multiply_lanes_up_to<T, 14>(job, rows);
  if (width == 8) return multiply_lanes_up_to<T, 8>(job, rows);
  multiply_lanes_up_to<T, 7>(job, rows);
}

}  // namespace
}  // namespace groupconv::cpu
