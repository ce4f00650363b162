// add_outer_products: dest[r][c] += Σ_q grad[r][q] · rows[q][c], the heart of a dense 1×1 weight gradient.
//
// Tile: R rows × V vectors of channels in registers, as in multiply_rows: 8 × 3 with 32 registers, 4 × 3 with 16.
// What differs: rows of channels are staged, so that they lie a constant apart, and the gradient is read where it
// lies, R rows of neighbouring pixels. Eight pixels are unrolled: all addresses are constants from a register for
// each row, and a step is V + R loads and R · V multiply-adds and nothing else.
//
// Whoever calls says what is read next: between the pixels, where multiply-adds hide it, a line of it is fetched
// at a time, as many as leave half of the line buffers to the loads.
#pragma once

#include "cpu/products/multiply.h"

namespace groupconv::cpu {
namespace {

// Rows of `pixels` elements that a tile fetches for later, half of them in each half of its own pixels.
constexpr int least_rows_ahead = 4, most_rows_ahead = 16;

// Elements from a pixel to the next of the staged rows: whole tiles, whatever the lanes.
constexpr int64_t panel_columns = 48;

template <class T>
struct OuterProducts {
  const T* rows;                  // [pixels][panel_columns]
  const T* grads[max_tile_rows];  // of neighbouring pixels; Adjacent: only the first, [pixels][max_tile_rows]
  int64_t pixels;
  T* dest;
  int64_t dest_row;
  const char* ahead[most_rows_ahead];
  int rows_ahead;
};

template <class T, int V, bool Adjacent>
void add_outer_products(const OuterProducts<T>& job) {
  using V_ = Vec<T>;
  constexpr int R = max_tile_rows, lanes = V_::lanes, unrolled = 8;
  constexpr int64_t line = 64;
  // A gradient in blocks is that of all channels, and what is read next soon needed: into L1. Small groups fetch far
  // ahead, and it would push out what they multiply.
  constexpr int nearness = Adjacent ? 3 : 2;
  V_ sums[R][V];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 3
    for (int v = 0; v < V; ++v) sums[r][v] = zero<T>();
  }

  const T* x = job.rows;
  const T* grads[R];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) grads[r] = Adjacent ? job.grads[0] + r : job.grads[r];
  int64_t at = 0;
  const auto step = [&](int pixel) GROUPCONV_INLINE_LAMBDA {
    V_ row[V];
#pragma GCC unroll 3
    for (int v = 0; v < V; ++v) row[v] = V_::load(x + pixel * panel_columns + v * lanes);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const V_ factor = V_::broadcast(grads[r][at + pixel * (Adjacent ? R : 1)]);
#pragma GCC unroll 3
      for (int v = 0; v < V; ++v) sums[r][v] = multiply_add(factor, row[v], sums[r][v]);
    }
  };
  const auto go_on = [&](int pixels) GROUPCONV_INLINE_LAMBDA {
    x += pixels * panel_columns;
    at += pixels * (Adjacent ? R : 1);
  };

  // Sums wait for what they are added to at the end, from L2 or beyond.
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 3
    for (int v = 0; v < V; ++v) __builtin_prefetch(job.dest + r * job.dest_row + v * lanes, 1);
  }
  const int64_t rounds = job.pixels / unrolled;
  for (int half = 0; half < 2; ++half) {
    const int fetched = job.rows_ahead / 2;
    const char* const* ahead = job.ahead + half * fetched;
    int64_t offset = 0;
    for (int64_t i = half ? rounds / 2 : 0; i < (half ? rounds : rounds / 2); ++i) {
      for (int row = 0; row < fetched; ++row) __builtin_prefetch(ahead[row] + offset, 0, nearness);
      offset += line;
#pragma GCC unroll 8
      for (int pixel = 0; pixel < unrolled; ++pixel) step(pixel);
      go_on(unrolled);
    }
  }
  for (int64_t left = job.pixels % unrolled; left > 0; --left) {
    step(0);
    go_on(1);
  }

#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
    T* dest = job.dest + r * job.dest_row;
#pragma GCC unroll 3
    for (int v = 0; v < V; ++v) (V_::load(dest + v * lanes) + sums[r][v]).store(dest + v * lanes);
  }
}

}  // namespace
}  // namespace groupconv::cpu
