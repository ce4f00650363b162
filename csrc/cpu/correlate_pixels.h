// correlate_pixels: sums[j][r] += Σ_pixels source[pixel][j] · grad[pixel][r], the heart of the
// channels_last weight gradient.
//
// Lanes are output channels, and a sum stays in its register while the pixels pass: nothing is added up
// across lanes. Tile: J neighbouring channels of the source × V vectors of the gradient. Each pixel loads V
// vectors and broadcasts J values for J · V multiply-adds; 14 × 2 or 28 × 1 with 32 registers, 6 × 2 or 12 × 1 with
// 16. A tile's sums begin at zero and are added to what is there, so that rounding grows with the number of tiles
// and with the pixels of one, not with all pixels.
#pragma once

#include "cpu/multiply_pixels.h"
#include "cpu/vec.h"

namespace groupconv::cpu {
namespace {

template <class T>
struct CorrelatePixelsJob {
  const T* source;  // first channel of the tile at the first pixel
  const T* grad;
  int64_t rows, cols;
  int64_t source_row, source_pixel, grad_row, grad_pixel;  // distances
  int64_t channels;                                        // of the gradient, of V · lanes
  T* sums;                                                 // [J][V · lanes]
};

// The most source channels that a tile of V vectors takes.
constexpr int most_channels(int vectors) {
  return vector_registers == 32 && vectors == 1 ? 28 : most_pixels(vectors);
}

template <class T, int V, int J>
void correlate_pixels(const CorrelatePixelsJob<T>& job) {
  using V_ = Vec<T>;
  constexpr int lanes = V_::lanes;
  constexpr int width = V * lanes;
  V_ sums[J][V];
#pragma GCC unroll 28
  for (int j = 0; j < J; ++j) {
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) sums[j][v] = zero<T>();
  }
  const auto mask = V_::first(job.channels - (V - 1) * lanes);
  for (int64_t row = 0; row < job.rows; ++row) {
    const T* x = job.source + row * job.source_row;
    const T* grad = job.grad + row * job.grad_row;
    for (int64_t col = 0; col < job.cols; ++col, x += job.source_pixel, grad += job.grad_pixel) {
      V_ g[V];
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v)
        g[v] = v == V - 1 ? V_::load(grad + v * lanes, mask) : V_::load(grad + v * lanes);
#pragma GCC unroll 28
      for (int j = 0; j < J; ++j) {
        const V_ value = V_::broadcast(x[j]);
#pragma GCC unroll 2
        for (int v = 0; v < V; ++v) sums[j][v] = multiply_add(g[v], value, sums[j][v]);
      }
    }
  }
#pragma GCC unroll 28
  for (int j = 0; j < J; ++j) {
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) {
      T* sum = job.sums + j * width + v * lanes;
      (V_::load(sum) + sums[j][v]).store(sum);
    }
  }
}

template <class T, int V, int J = most_channels(V)>
void correlate_channels(const CorrelatePixelsJob<T>& job, int64_t count) {
  if constexpr (J > 1) {
    if (count < J) return correlate_channels<T, V, J - 1>(job, count);
  }
  correlate_pixels<T, V, J>(job);
}

}  // namespace
}  // namespace groupconv::cpu
