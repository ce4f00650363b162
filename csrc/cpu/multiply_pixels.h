// multiply_pixels: dest[p][r] = bias[r] + Σ_j weight[j][r] · source[p · pixel_stride + offset[j]], the
// heart of the channels_last convolution.
//
// Lanes are destination channels, so a destination pixel is stored as it lies and nothing is transposed;
// the source is read one broadcast value at a time, from any offset, so a permutation of the inputs and
// the taps of a window are only the list of offsets. Weights are packed, lanes next to each other.
//
// Tile: P pixels × V vectors of channels. Each step loads V vectors of weights and broadcasts P values for
// P · V multiply-adds. With 32 registers 14 × 2 (28 sums, 2 weights, 1 value): 14 divides the widths that
// networks have (7, 14, 28, 56, 112); with 16 registers 6 × 2.
#pragma once

#include "cpu/pair.h"
#include "cpu/strides.h"
#include "cpu/vec.h"

namespace groupconv::cpu {
namespace {

template <class T>
struct PixelTile {
  const T* source;  // first pixel
  int64_t pixel_stride;
  const int64_t* offsets;  // [depth]
  int64_t depth;
  const T* weight;       // [depth][V · lanes]
  const sum_t<T>* bias;  // [V · lanes]
  sum_t<T>* dest;        // first pixel
  int64_t dest_stride;
  const sum_t<T>* residual;  // at dest's strides, or null
  int64_t channels;          // that exist, of the V · lanes
  bool clamped;
  sum_t<T> low, high;
};

constexpr int most_pixels(int vectors) { return vector_registers == 32 ? 14 : vectors == 2 ? 6 : 12; }

template <class T, int V, int P>
void multiply_pixels(const PixelTile<T>& tile) {
  using V_ = Vec<T>;
  using Sum = Vec<sum_t<T>>;
  constexpr int lanes = V_::lanes;
  constexpr int width = V * lanes;

  Sum sums[P][V];
#pragma GCC unroll 2
  for (int v = 0; v < V; ++v) {
    const Sum start = Sum::load(tile.bias + v * lanes);
#pragma GCC unroll 16
    for (int p = 0; p < P; ++p) sums[p][v] = start;
  }

  const T* weight = tile.weight;
  const T* const source = tile.source;
  const int64_t* const offsets = tile.offsets;
  const Strides strides(tile.pixel_stride * static_cast<int64_t>(sizeof(T)));
  for (int64_t j = 0; j < tile.depth; ++j, weight += width) {
    const T* from = source + offsets[j];
    const T* beyond = strides.at(from, 8);
    asm("" : "+r"(from), "+r"(beyond));  // two pointers; else the compiler keeps a distance for each pixel
    V_ w[V];
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) w[v] = V_::load(weight + v * lanes);
#pragma GCC unroll 16
    for (int p = 0; p < P; ++p) {
      const V_ x = V_::broadcast(*(p < 8 ? strides.at(from, p) : strides.at(beyond, p - 8)));
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) sums[p][v] = multiply_add(w[v], x, sums[p][v]);
    }
  }

  const auto mask = V_::first(tile.channels - (V - 1) * lanes);
  if (tile.residual) {
#pragma GCC unroll 16
    for (int p = 0; p < P; ++p) {
      const sum_t<T>* added = tile.residual + p * tile.dest_stride;
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) {
        sums[p][v] =
            sums[p][v] + (v == V - 1 ? Sum::load(added + v * lanes, mask) : Sum::load(added + v * lanes));
      }
    }
  }
  if (tile.clamped) {
    const Sum low = Sum::broadcast(tile.low), high = Sum::broadcast(tile.high);
#pragma GCC unroll 16
    for (int p = 0; p < P; ++p) {
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) sums[p][v] = clamp(low, high, sums[p][v]);
    }
  }
#pragma GCC unroll 16
  for (int p = 0; p < P; ++p) {
    sum_t<T>* dest = tile.dest + p * tile.dest_stride;
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) {
      if (v == V - 1) {
        sums[p][v].store(dest + v * lanes, mask);
      } else {
        sums[p][v].store(dest + v * lanes);
      }
    }
  }
}

template <class T, int V, int P = most_pixels(V)>
void multiply_pixel_run(const PixelTile<T>& tile, int64_t pixels) {
  if constexpr (P > 1) {
    if (pixels < P) return multiply_pixel_run<T, V, P - 1>(tile, pixels);
  }
  multiply_pixels<T, V, P>(tile);
}

}  // namespace
}  // namespace groupconv::cpu
