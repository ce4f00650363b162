// multiply_quads: total[p][lane] = start[lane] + Σ_j weight[j][lane] · quads(p · pixel_stride + offset[j]), the
// heart of the quantised convolution, and the totals' way out (rescale.h).
//
// Lanes are sixteen outputs of a group, or of several that share them (core/quantized_layout.h); a tile has V
// blocks of them. `offset` holds the taps of a window and the order of the inputs alike. Tile, and instructions in
// a step for each 64 multiply-adds:
//   VNNI      14 pixels × 2 blocks: a load of weights each, a pixel's quad repeated, 28 vpdpbusd:   1.6
//             14 pixels × 1 block where a group has no more:                                        2.1
//   AVX-512   12 × 1, vpmaddwd and an addition for half of it, quads widened as well:               6.2
//   AVX2      2 × 1:                                                                               12
#pragma once

#include "cpu/products/rescale.h"
#include "cpu/vector/strides.h"

namespace groupconv::cpu {
namespace {

template <class Out>
struct QuadTile {
  const uint8_t* source;   // first pixel
  int64_t pixel_stride;    // bytes
  const int64_t* offsets;  // [depth], bytes
  int64_t depth;
  const int8_t* weight;     // [V][depth][16 lanes][4]
  const int32_t* start;     // [V · 16]
  const float* multiplier;  // [V · 16]
  Rescaling output;
  Out* dest;  // first pixel
  int64_t dest_stride;
  int64_t last_lanes;  // of the last block are stored
};

template <class Out, int Share, int V, int P>
void multiply_quads(const QuadTile<Out>& tile) {
  QuadSums sums[P][V];
#pragma GCC unroll 16
  for (int p = 0; p < P; ++p) {
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) sums[p][v] = QuadSums::starting(tile.start + v * quad_lanes);
  }

  const int8_t* weight = tile.weight;
  const uint8_t* const source = tile.source;
  const int64_t* const offsets = tile.offsets;
  const int64_t block = tile.depth * quad_lanes * quad;
  const Strides strides(tile.pixel_stride);
  for (int64_t j = 0; j < tile.depth; ++j, weight += quad_lanes * quad) {
    const uint8_t* from = source + offsets[j];
    const uint8_t* beyond = strides.at(from, 8);
    asm("" : "+r"(from), "+r"(beyond));  // two pointers, as in multiply_pixels
    QuadWeights w[V];
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) w[v].load(weight + v * block);
#pragma GCC unroll 16
    for (int p = 0; p < P; ++p) {
      const Quads<Share> quads(p < 8 ? strides.at(from, p) : strides.at(beyond, p - 8));
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) sums[p][v].add(w[v], quads);
    }
  }
  store(sums, tile.multiplier, tile.output, tile.dest, tile.dest_stride, tile.last_lanes);
}

template <class Out, int Share, int V, int P = most_quad_pixels>
void multiply_quad_run(const QuadTile<Out>& tile, int64_t pixels) {
  if constexpr (P > 1) {
    if (pixels < P) return multiply_quad_run<Out, Share, V, P - 1>(tile, pixels);
  }
  multiply_quads<Out, Share, V, P>(tile);
}

// At most most_quad_pixels and most_quad_blocks; groups that share lanes have one block.
template <class Out>
void multiply_quad_run(const QuadTile<Out>& tile, int64_t pixels, int64_t blocks, int64_t share) {
  if constexpr (most_quad_blocks > 1) {
    if (blocks > 1) return multiply_quad_run<Out, 1, most_quad_blocks>(tile, pixels);
  }
  switch (share) {
    case 1: return multiply_quad_run<Out, 1, 1>(tile, pixels);
    case 2: return multiply_quad_run<Out, 2, 1>(tile, pixels);
    case 4: return multiply_quad_run<Out, 4, 1>(tile, pixels);
    case 8: return multiply_quad_run<Out, 8, 1>(tile, pixels);
    default: return multiply_quad_run<Out, 16, 1>(tile, pixels);
  }
}

}  // namespace
}  // namespace groupconv::cpu
