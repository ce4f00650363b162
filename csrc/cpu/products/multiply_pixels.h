// multiply_pixels: dest[p][r] = bias[r] + Σ_j weight[j][r] · source[p · pixel_stride + offset[j]], the
// heart of the channels_last convolution.
//
// Lanes are destination channels, so a destination pixel is stored as it lies and nothing is transposed;
// the source is read one broadcast value at a time, from any offset, so a permutation of the inputs and
// the taps of a window are only the list of offsets. Weights are packed, lanes next to each other.
//
// Tile: P pixels × V vectors of channels, W neighbouring taps of a window's row at a time. A value that is broadcast
// is the source of W pixels' sums: W · V vectors of weights and P + W − 1 broadcasts for P · V · W multiply-adds.
//   registers  P · V sums, V · W weights, 1 value
//   with 32    W = 1: 14 × 2, 14 × 1    W = 3: 12 × 2, 14 × 1
//   with 16    W = 1: 6 × 2, 12 × 1     W = 3: 4 × 2, 12 × 1
// 14 divides the widths that networks have (7, 14, 28, 56, 112).
#pragma once

#include "cpu/vector/pair.h"
#include "cpu/vector/pixel_run.h"
#include "cpu/vector/strides.h"
#include "cpu/vector/vec.h"

namespace groupconv::cpu {
namespace {

template <class T, class Out = sum_t<T>>
struct PixelTile : PixelDest<sum_t<T>, Out> {
  const T* source;  // first pixel
  int64_t pixel_stride;
  const int64_t*
      offsets;  // [depth]; of W taps together the first counts, from which the others are one pixel apart
  int64_t depth;
  const T* weight;       // [depth][V · lanes]
  const sum_t<T>* bias;  // [V · lanes]
  int64_t channels;      // that exist, of the V · lanes
  bool lines = false;    // the offsets count up by one
};

constexpr int most_pixels(int vectors, int taps) {
  const int fit = (vector_registers - 1) / vectors - taps;
  return fit < 14 ? fit : 14;
}

// Residual, clamp and store of what was summed.
template <class T, int V, int P, class Out>
GROUPCONV_INLINE void finish_pixels(const PixelTile<T, Out>& tile, Vec<sum_t<T>> (&sums)[P][V]) {
  using Sum = Vec<sum_t<T>>;
  constexpr int lanes = Vec<T>::lanes;
  const auto mask = Vec<T>::first(tile.channels - (V - 1) * lanes);
  if (tile.residual) {
#pragma GCC unroll 16
    for (int p = 0; p < P; ++p) {
      const Out* added = tile.residual + p * tile.dest_stride;
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
    Out* dest = tile.dest + p * tile.dest_stride;
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

template <class T, int V, int W, int P, class Out>
void multiply_pixels(const PixelTile<T, Out>& tile) {
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
  // With few registers the loop is so short that counting up to zero, without a comparison, shows; elsewhere the
  // compiler makes worse of it.
  constexpr bool up_to_zero = vector_registers == 16 && W == 1;
  const int64_t begin = up_to_zero ? -tile.depth : 0, end = begin + tile.depth;
  const int64_t* const offsets = tile.offsets - begin;
  const Strides strides(tile.pixel_stride * static_cast<int64_t>(sizeof(T)));
  for (int64_t j = begin; j < end; j += W, weight += W * width) {
    const T* from = source + offsets[j];
    const T* beyond = from;
    if constexpr (P + W - 1 > 8) {
      beyond = strides.at(from, 8);
      asm("" : "+r"(from), "+r"(beyond));  // two pointers; else the compiler keeps a distance for each pixel
    } else {
      asm("" : "+r"(from));
    }
    V_ w[W][V];
#pragma GCC unroll 3
    for (int t = 0; t < W; ++t) {
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) w[t][v] = V_::load(weight + (t * V + v) * lanes);
    }
#pragma GCC unroll 16
    for (int q = 0; q < P + W - 1; ++q) {
      const V_ x = V_::broadcast(*(q < 8 ? strides.at(from, q) : strides.at(beyond, q - 8)));
#pragma GCC unroll 3
      for (int t = 0; t < W; ++t) {
        const int p = q - t;
        if (p < 0 || p >= P) continue;
#pragma GCC unroll 2
        for (int v = 0; v < V; ++v) sums[p][v] = multiply_add(w[t][v], x, sums[p][v]);
      }
    }
  }

  finish_pixels<T, V, P>(tile, sums);
}

// The same for one vector of channels where the sources of a pixel lie side by side: with a pointer for each of twelve
// pixels and the depth unrolled an address is a register and a constant, and a broadcast is part of its multiply-add.
template <class T, int P, class Out>
void multiply_lines(const PixelTile<T, Out>& tile) {
  using V_ = Vec<T>;
  using Sum = Vec<sum_t<T>>;
  constexpr int lanes = V_::lanes;
  constexpr int64_t step = 8;
  constexpr int pointers = P < 12 ? P : 12;

  Sum sums[P][1];
  const Sum start = Sum::load(tile.bias);
#pragma GCC unroll 16
  for (int p = 0; p < P; ++p) sums[p][0] = start;

  const T* from[pointers];
#pragma GCC unroll 16
  for (int p = 0; p < pointers; ++p) {
    from[p] = tile.source + tile.offsets[0] + p * tile.pixel_stride;
    asm("" : "+r"(from[p]));
  }
  // Of the thirteenth and fourteenth pixel from the first and second.
  int64_t beyond = 12 * tile.pixel_stride * static_cast<int64_t>(sizeof(T));
  asm("" : "+r"(beyond));
  const T* weight = tile.weight;
  const auto multiply = [&](int64_t j) GROUPCONV_INLINE_LAMBDA {
    const V_ w = V_::load(weight + j * lanes);
#pragma GCC unroll 16
    for (int p = 0; p < P; ++p) {
      const T* at =
          p < pointers
              ? from[p]
              : reinterpret_cast<const T*>(reinterpret_cast<const char*>(from[p - pointers]) + beyond);
      sums[p][0] = multiply_add(w, V_::broadcast(at[j]), sums[p][0]);
    }
  };
  const auto advance = [&](int64_t by) GROUPCONV_INLINE_LAMBDA {
#pragma GCC unroll 16
    for (int p = 0; p < pointers; ++p) {
      from[p] += by;
      asm("" : "+r"(from[p]));
    }
    weight += by * lanes;
  };
  int64_t left = tile.depth;
  for (; left >= step; left -= step) {
#pragma GCC unroll 8
    for (int64_t j = 0; j < step; ++j) multiply(j);
    advance(step);
  }
  for (; left > 0; --left) {
    multiply(0);
    advance(1);
  }
  finish_pixels<T, 1, P>(tile, sums);
}

// Whether the sources of a pixel lie side by side, in order. Looking at all of them, a
// vector at a time, is quicker than stopping at the first that does not.
GROUPCONV_INLINE bool count_up(const int64_t* offsets, int64_t depth) {
  if (depth == 0 || offsets[depth - 1] != offsets[0] + depth - 1) return false;
  int64_t wrong = 0;
  for (int64_t j = 0; j < depth; ++j) wrong |= offsets[j] ^ (offsets[0] + j);
  return wrong == 0;
}

template <class T, int V, int W, int P = most_pixels(V, W), class Out>
void multiply_pixel_run(const PixelTile<T, Out>& tile, int64_t pixels) {
  if constexpr (P > 1) {
    if (pixels < P) return multiply_pixel_run<T, V, W, P - 1>(tile, pixels);
  }
  if constexpr (V == 1 && W == 1 && vector_registers == 32 && P > 8) {
    if (tile.lines) return multiply_lines<T, P>(tile);
  }
  multiply_pixels<T, V, W, P>(tile);
}

// Any number of neighbouring pixels, in runs of about the same length. `tile` is left behind the last: copying what has
// just been written field by field would have to wait for it.
template <class T, int V, int W, class Out>
void multiply_pixel_row(PixelTile<T, Out>& tile, int64_t pixels) {
  constexpr int64_t most = most_pixels(V, W);
  if constexpr (V == 1 && W == 1 && vector_registers == 32) tile.lines = count_up(tile.offsets, tile.depth);
  for (int64_t runs = divide_up(pixels, most); runs > 0; --runs) {
    const int64_t run = divide_up(pixels, runs);
    multiply_pixel_run<T, V, W>(tile, run);
    tile.source += run * tile.pixel_stride;
    tile.dest += run * tile.dest_stride;
    if (tile.residual) tile.residual += run * tile.dest_stride;
    pixels -= run;
  }
}

}  // namespace
}  // namespace groupconv::cpu
