// correlate_pixels: sums[j][r] += Σ_pixels singles[pixel][j] · vectors[pixel][r], the heart of the
// channels_last weight gradient. One operand is the input, the other the output's gradient.
//
// Lanes are channels, and a sum stays in its register while the pixels pass: nothing is added up across
// lanes. Tile: J neighbouring channels of one operand × V vectors of the other. Each pixel loads V vectors and
// broadcasts J values for J · V multiply-adds; 14 × 2 or 28 × 1 with 32 registers, 6 × 2 or 12 × 1 with 16. A
// tile's sums begin at zero and are added to what is there, so that rounding grows with the number of tiles and
// with the pixels of one, not with all pixels.
#pragma once

#include "cpu/products/multiply_pixels.h"
#include "cpu/vector/vec.h"

namespace groupconv::cpu {
namespace {

template <class T>
struct PixelOperand {
  const T* data;       // first channel of the tile at the first pixel
  int64_t row, pixel;  // distances
};

template <class T>
struct CorrelatePixelsJob {
  PixelOperand<T> singles, vectors;
  int64_t rows, cols;  // pixels
  int64_t channels;    // of the vectors, of V · lanes
  T* sums;             // [J][V · lanes]
};

// The most channels that a tile of V vectors takes one by one.
constexpr int most_channels(int vectors) {
  return vector_registers == 32 && vectors == 1 ? 28 : most_pixels(vectors, 1);
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
    const T* x = job.singles.data + row * job.singles.row;
    const T* y = job.vectors.data + row * job.vectors.row;
    for (int64_t col = 0; col < job.cols; ++col, x += job.singles.pixel, y += job.vectors.pixel) {
      V_ vectors[V];
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v)
        vectors[v] = v == V - 1 ? V_::load(y + v * lanes, mask) : V_::load(y + v * lanes);
#pragma GCC unroll 28
      for (int j = 0; j < J; ++j) {
        const V_ value = V_::broadcast(x[j]);
#pragma GCC unroll 2
        for (int v = 0; v < V; ++v) sums[j][v] = multiply_add(vectors[v], value, sums[j][v]);
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
