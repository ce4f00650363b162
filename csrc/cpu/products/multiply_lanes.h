// multiply_lanes: sums[q][r] = bias[r] + Σ_j weight[j][r] · source[j][q], lanes over destination channels r, the
// sources rows of pixels.
//
// multiply_rows (multiply.h) has lanes over pixels: of a padded map of 7² a quarter of them is no pixel, and the last
// vectors make narrow tiles. Here every lane is a channel. Tile: S rows of P neighbouring pixels, and one vector of sums
// for each; W neighbouring taps of a window's row at a time, so that a value that is broadcast is the source of W pixels'
// sums. Rows of taps that meet padding only are left out.
//   W = 3  32 registers: 14 to 24 sums, 3 weights, 1 value; at 14 pixels 16 broadcasts and 3 loads for 42 multiply-adds
//          16 registers: 7 to 10 sums; at 10 pixels 12 broadcasts and 3 loads for 30. The compiler spills the 12 that fit
//   W = 1  32 registers only: 24 or 28 sums, 1 weight; values are the multiply-adds' own operands, as many loads limit it
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

// Tiles that a row of pixels is cut into, as equal as can be; 0: there are none for rows of that width.
constexpr int64_t lane_tiles(int64_t width, int taps) {
  if (vector_registers < 32) {
    if (taps == 1) return 0;
    if (width == 14) return 3;  // of two rows: 10 sums hide the latency of a multiply-add, 7 do not
    const int64_t tiles = divide_up(width, int64_t{10});
    return width / larger(tiles, int64_t{1}) < 7 ? 0 : tiles;
  }
  if (width == 7 || width == 8 || width == 14) return 1;
  if (taps == 1) return 0;
  return width % 14 == 0 ? width / 14 : width % 16 == 0 ? width / 16 : 0;
}
constexpr int most_lane_sums(int taps) { return vector_registers < 32 ? 10 : taps == 1 ? 28 : 24; }
// Rows of a tile so many pixels wide.
constexpr int64_t lane_rows(int64_t pixels, int taps) { return most_lane_sums(taps) / pixels; }

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

template <class T, int W, int... Pixels>
void multiply_lanes_of(const LanesJob<T>& job, int64_t pixels, int64_t rows) {
  ((pixels == Pixels && (multiply_lanes_up_to<T, W, Pixels>(job, rows), true)) || ...);
}

template <class T, int W>
void multiply_lanes(const LanesJob<T>& job, int64_t pixels, int64_t rows) {
  if constexpr (vector_registers < 32) {
    if constexpr (W > 1) multiply_lanes_of<T, W, 10, 9, 8, 7, 5, 4>(job, pixels, rows);
  } else if constexpr (W == 1) {
    multiply_lanes_of<T, W, 14, 8, 7>(job, pixels, rows);
  } else {
    multiply_lanes_of<T, W, 16, 14, 8, 7>(job, pixels, rows);
  }
}

}  // namespace
}  // namespace groupconv::cpu
