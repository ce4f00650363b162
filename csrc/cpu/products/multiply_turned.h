// multiply_rows over rows of scratch that are one tile of registers wide, or two: what a longer tile decides for every
// row and every step is known here, and a tile of a group with few channels takes as long as its multiply-adds.
//
// Tile: R destination rows × V vectors of pixels, three, or one where rows are narrow; weights read where they lie. Lines
// of memory are fetched between the steps, one to read and one to write in each, which is no more at once than a core
// keeps in flight.
#pragma once

#include "cpu/products/multiply.h"
#include "cpu/vector/fetched_lines.h"
#include "cpu/vector/strides.h"
#include "cpu/vector/vec.h"

namespace groupconv::cpu {
namespace {

constexpr int64_t turned_width = 48;  // pixels: three cache lines of floats
template <class T>
constexpr int64_t narrow_turned_width = Vec<T>::lanes;

// dest[r][q] = bias[r] + Σ_j weight[r][j] · source[j][q], of a group
template <class T>
struct TurnedJob {
  const T* const* sources;
  int64_t depth;
  const T* weight;
  int64_t weight_row, weight_step;  // from one row's weight to the next's, and from one source's
  Strides weight_rows;              // weight_row, for a tile
  T* const* dests;
  const T* bias;
  int64_t rows;
};

template <class T, int V, int R>
void multiply_turned_tile(const TurnedJob<T>& job, int64_t row, int64_t pixel, FetchedLines& lines) {
  using V_ = Vec<T>;
  V_ sums[R][V];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
    const V_ start = V_::broadcast(job.bias[row + r]);
#pragma GCC unroll 3
    for (int v = 0; v < V; ++v) sums[r][v] = start;
  }
  const Strides strides = job.weight_rows;
  const T* weight = job.weight + row * job.weight_row;
  const auto step = [&](int64_t j) GROUPCONV_INLINE_LAMBDA {
    const T* source = job.sources[j] + pixel;
    asm("" : "+r"(source), "+r"(weight));  // else the compiler keeps a distance for each vector and each row
    V_ x[V];
#pragma GCC unroll 3
    for (int v = 0; v < V; ++v) x[v] = V_::load(source + v * V_::lanes);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const V_ w = V_::broadcast(*strides.at(weight, r));
#pragma GCC unroll 3
      for (int v = 0; v < V; ++v) sums[r][v] = multiply_add(w, x[v], sums[r][v]);
    }
    weight += job.weight_step;
  };
  FetchedLines fetched = lines;
  const int64_t depth = job.depth, fetching = smaller(depth, lines.per_tile);
  int64_t j = 0;
  for (; j < fetching; ++j) {
    fetched.fetch();
    step(j);
  }
  for (; j < depth; ++j) step(j);
  lines = fetched;
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
    T* dest = job.dests[row + r] + pixel;
#pragma GCC unroll 3
    for (int v = 0; v < V; ++v) sums[r][v].store(dest + v * V_::lanes);
  }
}

template <class T, int V, int R>
void multiply_turned_rows(const TurnedJob<T>& job, int64_t width, int64_t row, FetchedLines& lines) {
  for (int64_t pixel = 0; pixel < width; pixel += V * Vec<T>::lanes) {
    multiply_turned_tile<T, V, R>(job, row, pixel, lines);
  }
}

template <class T, int V, int R = max_tile_rows - 1>
void multiply_last_turned_rows(const TurnedJob<T>& job, int64_t width, int64_t row, FetchedLines& lines) {
  if constexpr (R > 0) {
    if (job.rows - row == R) return multiply_turned_rows<T, V, R>(job, width, row, lines);
    multiply_last_turned_rows<T, V, R - 1>(job, width, row, lines);
  }
}

template <class T, int V>
void multiply_turned(const TurnedJob<T>& job, int64_t width, FetchedLines& lines) {
  int64_t row = 0;
  for (; row + max_tile_rows <= job.rows; row += max_tile_rows) {
    multiply_turned_rows<T, V, max_tile_rows>(job, width, row, lines);
  }
  multiply_last_turned_rows<T, V>(job, width, row, lines);
}
template <class T>
void multiply_turned(const TurnedJob<T>& job, int64_t width, FetchedLines& lines) {
  if constexpr (vector_registers == 32) {
    if (width == narrow_turned_width<T>) return multiply_turned<T, 1>(job, width, lines);
  }
  multiply_turned<T, tile_vectors(max_tile_rows)>(job, width, lines);
}

// How many tiles of registers the rows of a group take.
template <class T>
int64_t turned_tiles(int64_t rows, int64_t width) {
  return divide_up(rows, int64_t{max_tile_rows}) * divide_up(width, tile_width<T>);
}

}  // namespace
}  // namespace groupconv::cpu
