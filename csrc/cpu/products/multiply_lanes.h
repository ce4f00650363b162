// multiply_lanes: sums[q][r] = bias[r] + Σ_j weight[j][r] · source[j][q], lanes over destination channels r, the
// sources rows of pixels.
//
// multiply_rows (multiply.h) has lanes over pixels: of a padded map of 7² a quarter of them is no pixel, and the last
// vectors make narrow tiles. Here every lane is a channel. Tile: S rows of P neighbouring pixels, and one vector of sums
// for each; W neighbouring taps of a window's row at a time, so that a value that is broadcast is the source of W pixels'
// sums. Rows of taps that meet padding only are left out.
//   W = 3  14 to 24 sums, 3 weights, 1 value; at 14 pixels 16 broadcasts and 3 loads for 42 multiply-adds
//   W = 1  24 or 28 sums, 1 weight; values are the multiply-adds' own operands, and as many loads limit it
#pragma once

#include "cpu/vector/vec.h"

namespace groupconv::cpu {
namespace {

template <class T>
struct LanesJob {
  const T* const* sources;  // [channels][runs] rows at lattice pixel (0, 0), of W taps the leftmost
  int64_t channels, runs;   // of W taps, of a window
  int64_t begin, end;       // of the runs that are taken, of every channel
  int64_t offset, pitch;    // of the tile's first row, and from row to row
  const T* weight;          // [channels][runs][W][lanes]
  int64_t first_tap,
      step;       // where among W · lanes weights those of the leftmost tap are, and from each to the next
  const T* bias;  // [lanes]
  T* sums;        // [S · P][lanes]
};

// Neighbouring pixels of a row that a tile takes; 0: there is no tile for rows of that width.
constexpr int64_t lane_pixels(int64_t width, int taps) {
  if (width == 7 || width == 8 || width == 14) return width;
  if (taps == 1) return 0;
  return width % 14 == 0 ? 14 : width % 16 == 0 ? 16 : 0;
}
constexpr int64_t lane_rows(int64_t pixels, int taps) { return (taps == 1 ? 28 : 24) / pixels; }

template <class T, int W, int P, int S>
void multiply_lanes_tile(const LanesJob<T>& job) {
  using V_ = Vec<T>;
  constexpr int lanes = V_::lanes;
  V_ sums[S][P];
  const V_ start = V_::load(job.bias);
#pragma GCC unroll 4
  for (int s = 0; s < S; ++s) {
#pragma GCC unroll 16
    for (int p = 0; p < P; ++p) sums[s][p] = start;
  }
  const T* weights = job.weight + job.first_tap;
  const T* const* sources = job.sources;
  const int64_t offset = job.offset, pitch = job.pitch, step = job.step;
  for (int64_t i = 0; i < job.channels; ++i, sources += job.runs, weights += job.runs * W * lanes) {
    const T* weight = weights + job.begin * W * lanes;
    for (int64_t run = job.begin; run < job.end; ++run, weight += W * lanes) {
      V_ w[W];
#pragma GCC unroll 3
      for (int t = 0; t < W; ++t) w[t] = V_::load(weight + t * step);
      const T* source = sources[run] + offset;
#pragma GCC unroll 4
      for (int s = 0; s < S; ++s, source += pitch) {
        asm("" : "+r"(source));  // else the compiler keeps a distance for each pixel
#pragma GCC unroll 18
        for (int q = 0; q < P + W - 1; ++q) {
          const V_ x = V_::broadcast(source[q]);
#pragma GCC unroll 3
          for (int t = 0; t < W; ++t) {
            if (q - t >= 0 && q - t < P) sums[s][q - t] = multiply_add(w[t], x, sums[s][q - t]);
          }
        }
      }
    }
  }
  T* to = job.sums;
#pragma GCC unroll 4
  for (int s = 0; s < S; ++s) {
#pragma GCC unroll 16
    for (int p = 0; p < P; ++p) sums[s][p].store(to + (s * P + p) * lanes);
  }
}

template <class T, int W, int P, int S = lane_rows(P, W)>
void multiply_lanes_up_to(const LanesJob<T>& job, int64_t rows) {
  if constexpr (S > 1) {
    if (rows < S) return multiply_lanes_up_to<T, W, P, S - 1>(job, rows);
  }
  multiply_lanes_tile<T, W, P, S>(job);
}

template <class T, int W>
void multiply_lanes(const LanesJob<T>& job, int64_t pixels, int64_t rows) {
  if constexpr (W > 1) {
    if (pixels == 16) return multiply_lanes_up_to<T, W, 16>(job, rows);
  }
  if (pixels == 14) return multiply_lanes_up_to<T, W, 14>(job, rows);
  if (pixels == 8) return multiply_lanes_up_to<T, W, 8>(job, rows);
  multiply_lanes_up_to<T, W, 7>(job, rows);
}

}  // namespace
}  // namespace groupconv::cpu
