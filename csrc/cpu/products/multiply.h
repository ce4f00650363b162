// multiply_rows: dest[r][q] = bias[r] + Σ_j weight[r][j] · source[j][q], the heart of every forward
// pass and input gradient.
//
// Rows are given as pointers, so a channel permutation costs nothing: it is only the order of the
// pointers. A K×K window costs nothing either: each tap is one more row, the same memory shifted.
//
// Tile: R destination rows × V vectors of pixels in registers. Each step loads V vectors of one source
// row and broadcasts R weights: V + R loads for R · V multiply-adds. With 32 registers the tile is 8 × 3
// (24 sums, 3 sources, 1 weight), with 16 it is 4 × 3 (12 + 3 + 1).
// Pixels are the outer loop: the tile of source rows stays in L1 while all destination rows pass over it.
//
// Weights are read where they lie: those of a tile's rows are equally far apart, so that four registers and the
// first row's address reach all of them without an instruction (strides.h). Bringing them next to each other first
// is no faster (benches/NOTES.md). In a network they come from beyond L2, in rows too short for some processors to guess
// where the next ones begin: there the first tile of pixels fetches the weights of the rows below it.
//
// Sums leave for the image or for scratch: gaps between a tile's rows, which an image does not have, are taken out
// on the way (row_gaps.h), and what is larger than the caches is stored past them (stores.h).
#pragma once

#include "cpu/products/multiply_columns.h"
#include "cpu/products/multiply_job.h"
#include "cpu/vector/fetched_lines.h"
#include "cpu/vector/strides.h"

namespace groupconv::cpu {
namespace {

constexpr int max_tile_rows = vector_registers == 32 ? 8 : 4;

// Registers: R · V sums, V sources, one weight.
constexpr int tile_vectors(int rows) {
  const int fit = (vector_registers - 1) / (rows + 1);
  return fit < 8 ? fit : 8;
}

// Pixels of a whole tile.
template <class T>
constexpr int64_t tile_width = tile_vectors(max_tile_rows) * Vec<T>::lanes;

// The last element of a tile's vector v. What fetches lines asks for that one: of a row that does not begin a line, the
// line of the first element was the last one of the tile before.
template <class T>
constexpr int last_of(int v) {
  return (v + 1) * Vec<T>::lanes - 1;
}
// One of so many vectors asks.
template <class T>
constexpr int vectors_in_line = line_bytes / (Vec<T>::lanes * sizeof(T));

// Where a tile finds the source rows: as they lie, or a copy of a tile, which begins at a pixel of theirs.
template <class T>
struct TileSources {
  const T* const* rows;
  int64_t begin;
};

// What a tile fetches for the one after it: it is narrow and its rows lie far apart, so the hardware does not guess
// where they go on. A core keeps few lines in flight to its L1, so every tile of rows fetches its share, halfway through
// its steps: where a tile begins, the lines that it will write are asked for. A line from beyond L2 would hold one of
// those few places for as long as memory takes: it is brought into L2 before, which has more of them.
template <class T>
struct Ahead {
  const T* const* rows;
  int64_t pixel, count;  // of the rows
  int64_t further;       // pixels from there to what is brought into L2; 0: it lies there
  int64_t written;  // pixels from this tile to the one whose lines are brought into L2 to be written; 0: none

  template <int V>
  GROUPCONV_INLINE void fetch(int64_t row) const {
    const T* source = rows[row] + pixel;
    if (pixel == 0) __builtin_prefetch(source);
#pragma GCC unroll 8
    for (int v = 0; v < V; v += vectors_in_line<T>) __builtin_prefetch(source + last_of<T>(v));
    if (further == 0) return;
    source += further;
#pragma GCC unroll 8
    for (int v = 0; v < V; v += vectors_in_line<T>) __builtin_prefetch(source + last_of<T>(v), 0, into_l2);
  }
};

// After the pixels before `pixel` come those behind, and then the rows that are read next. Where nobody knows them, it is
// likely what follows in memory: small images lie one behind the other.
template <class T, class Out>
Ahead<T> ahead_of(const MultiplyJob<T, Out>& job, int64_t pixel, int64_t count) {
  if (pixel >= job.length && job.next) return {job.next, 0, count, 0, 0};
  return {job.sources, pixel, count, 0, 0};
}

template <class T, int R, int V, class Out>
GROUPCONV_INLINE void clamp_sums(const MultiplyJob<T, Out>& job, Vec<sum_t<T>> (&sums)[R][V]) {
  using Sum = Vec<sum_t<T>>;
  const Sum low = Sum::broadcast(job.low), high = Sum::broadcast(job.high);
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) sums[r][v] = clamp(low, high, sums[r][v]);
  }
}

// Without masks to store by, a vector is stored as a whole where that is not beyond the row: vectors follow in order,
// and what lies behind its pixels is written after it.
template <class T, int R, int V, bool Tail, class Out>
GROUPCONV_INLINE void store_without_gaps(const MultiplyJob<T, Out>& job, Vec<sum_t<T>> (&sums)[R][V],
                                         int64_t row, int64_t pixel, typename Vec<T>::Mask tail) {
  using Sum = Vec<sum_t<T>>;
  uint32_t taken[V];
  typename Sum::Mask present[V];
  int64_t at[V];
  bool whole[V];
#pragma GCC unroll 8
  for (int v = 0; v < V; ++v) {
    const GapVector& gap = job.gaps[pixel / Sum::lanes + v];
    taken[v] = Tail && v == V - 1 ? gap.lanes & Sum::bits(tail) : gap.lanes;
    present[v] = Sum::first(__builtin_popcount(taken[v]));
    at[v] = gap.before;
    whole[v] = !has_mask_registers && at[v] + Sum::lanes <= job.pixels;
  }
  if (job.residuals) {
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) {
        sums[r][v] = sums[r][v] + expand(Sum::load(job.residuals[row + r] + at[v], present[v]), taken[v]);
      }
    }
  }
  if (job.clamped) clamp_sums<T, R, V>(job, sums);
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) {
      const Sum x = compress(sums[r][v], taken[v]);
      Out* to = job.dests[row + r] + at[v];
      if (whole[v]) {
        x.store(to);
      } else {
        x.store(to, present[v]);
      }
    }
  }
}

template <class Loaded, class Element>
GROUPCONV_INLINE Loaded load_part(const Element* p, bool masked, typename Loaded::Mask mask) {
  return masked ? Loaded::load(p, mask) : Loaded::load(p);
}

template <class T, int R, int V, bool Tail, class Out>
GROUPCONV_INLINE void multiply_tile(const MultiplyJob<T, Out>& job, const Strides& weight_rows,
                                    const TileSources<T>& where, int64_t row, int64_t pixel,
                                    typename Vec<T>::Mask tail, const Ahead<T>& ahead) {
  using V_ = Vec<T>;
  using Sum = Vec<sum_t<T>>;
  constexpr int lanes = V_::lanes;
  const auto is_last = [](int v) GROUPCONV_INLINE_LAMBDA { return Tail && v == V - 1; };

  Sum sums[R][V];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
    const Sum start = job.bias ? Sum::broadcast(job.bias[row + r]) : zero<sum_t<T>>();
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) sums[r][v] = start;
  }

  if (!Tail && job.stores == Stores::fetched) {
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const Out* dest = job.dests[row + r] + pixel;
      if (pixel == 0) __builtin_prefetch(dest, 1);
#pragma GCC unroll 8
      for (int v = 0; v < V; v += vectors_in_line<T>) {
        if (ahead.written) __builtin_prefetch(dest + ahead.written + last_of<T>(v), 0, into_l2);
        __builtin_prefetch(dest + last_of<T>(v), 1);
      }
    }
  }

  // Counted up to zero, which takes no comparison.
  const int64_t depth = job.depth;
  int64_t offset = (pixel - where.begin) * static_cast<int64_t>(sizeof(T));
  const T* const* const sources = where.rows + depth;
  const int64_t* const steps = job.steps + depth;
  const T* first_weights = job.weight + row * job.weight_row_stride;
  asm("" : "+r"(first_weights));
  const auto step = [&](int64_t j) GROUPCONV_INLINE_LAMBDA {
    const T* source = sources[j];
    const T* weight = first_weights + steps[j];
    // Else the compiler keeps a distance for each vector and each row.
    asm("" : "+r"(source), "+r"(weight), "+r"(offset));
    source = reinterpret_cast<const T*>(reinterpret_cast<const char*>(source) + offset);
    V_ x[V];
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) x[v] = load_part<V_>(source + v * lanes, is_last(v), tail);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const V_ w = V_::broadcast(*weight_rows.at(weight, r));
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) sums[r][v] = multiply_add(w, x[v], sums[r][v]);
    }
  };
  const int64_t begin = -(depth + ahead.count) / 2, end = begin + ahead.count;
  const auto run = [&](const auto& each_step) GROUPCONV_INLINE_LAMBDA {
    int64_t j = -depth;
    for (; j < begin; ++j) each_step(j);
    for (; j < end; ++j) {
      ahead.template fetch<tile_vectors(R)>(j - begin);
      each_step(j);
    }
    for (; j != 0; ++j) each_step(j);
  };
  if (job.fetches_weights && pixel == 0) {
    // Each step fetches as many as it reads.
    const T* next_weights = first_weights + R * job.weight_row_stride;
    run([&](int64_t j) GROUPCONV_INLINE_LAMBDA {
      __builtin_prefetch(next_weights, 0, into_l2);
      next_weights += R;
      step(j);
    });
  } else {
    run(step);
  }

  if constexpr (has_compress) {
    if (job.gaps) return store_without_gaps<T, R, V, Tail>(job, sums, row, pixel, tail);
  }
  const auto add_rows = [&](const Out* const* rows) GROUPCONV_INLINE_LAMBDA {
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const Out* from = rows[row + r] + pixel;
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) {
        sums[r][v] = sums[r][v] + load_part<Sum>(from + v * lanes, is_last(v), tail);
      }
    }
  };
  if (job.accumulate) add_rows(job.dests);
  if (job.residuals) add_rows(job.residuals);
  if (job.clamped) clamp_sums<T, R, V>(job, sums);
  if constexpr (!Tail && fills_lines<Out>) {
    if (job.stores == Stores::streamed) {
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
        for (int v = 0; v < V; ++v) sums[r][v].stream(job.dests[row + r] + pixel + v * lanes);
      }
      return;
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
    Out* dest = job.dests[row + r] + pixel;
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) {
      if (is_last(v)) {
        sums[r][v].store(dest + v * lanes, tail);
      } else {
        sums[r][v].store(dest + v * lanes);
      }
    }
  }
}

template <class T, class Out>
Strides weight_rows_of(const MultiplyJob<T, Out>& job) {
  return Strides(job.weight_row_stride * static_cast<int64_t>(sizeof(T)));
}

// Rows [0, rows), whole tiles, of the pixels of one tile, each of which fetches `share` rows of what is read next. What
// comes before and after the multiply-adds of a tile hides behind them only where it is short: the tiles are one
// function, and what they share is made ready once.
template <class T, int V, bool Tail, class Out>
void multiply_column(const MultiplyJob<T, Out>& job, const TileSources<T>& where, int64_t rows, int64_t pixel,
                     typename Vec<T>::Mask tail, int64_t share) {
  const Strides weight_rows = weight_rows_of(job);
  Ahead<T> ahead = ahead_of(job, pixel + V * Vec<T>::lanes, 0);
  ahead.further = job.from_afar ? tile_width<T> : 0;
  // Rounded vectors are half a line and would ask for each one twice.
  ahead.written = sizeof(Out) == sizeof(T) ? tile_width<T> : 0;
  int64_t left = job.depth;
  for (int64_t row = 0; row < rows; row += max_tile_rows) {
    ahead.count = smaller(share, left);
    multiply_tile<T, max_tile_rows, V, Tail>(job, weight_rows, where, row, pixel, tail, ahead);
    ahead.rows += ahead.count;
    left -= ahead.count;
  }
}

// The last, partial tile of a row: as few vectors as it needs, the last one masked.
template <class T, int R, int V = tile_vectors(R), class Out>
void multiply_tail(const MultiplyJob<T, Out>& job, const TileSources<T>& where, int64_t row, int64_t rows,
                   int64_t pixel, int64_t fetched) {
  constexpr int lanes = Vec<T>::lanes;
  const int64_t left = job.length - pixel;
  if constexpr (V > 1) {
    if (left <= (V - 1) * lanes) return multiply_tail<T, R, V - 1>(job, where, row, rows, pixel, fetched);
  }
  const auto tail = Vec<T>::first(left - (V - 1) * lanes);
  if constexpr (R == max_tile_rows) {
    multiply_column<T, V, true>(job, where, rows, pixel, tail, fetched);
  } else {
    multiply_tile<T, R, V, true>(job, weight_rows_of(job), where, row, pixel, tail,
                                 ahead_of(job, job.length, fetched));
  }
}

// R rows over the whole length.
template <class T, int R, class Out>
void multiply_row(const MultiplyJob<T, Out>& job, const TileSources<T>& where, int64_t row, int64_t fetched) {
  constexpr int64_t width = tile_vectors(R) * Vec<T>::lanes;
  const Strides weight_rows = weight_rows_of(job);
  int64_t pixel = 0;
  for (; pixel + width <= job.length; pixel += width) {
    multiply_tile<T, R, tile_vectors(R), false>(job, weight_rows, where, row, pixel, typename Vec<T>::Mask(),
                                                ahead_of(job, pixel + width, fetched));
  }
  if (pixel < job.length) multiply_tail<T, R>(job, where, row, R, pixel, fetched);
}

template <class T, int R = max_tile_rows - 1, class Out>
void multiply_last_rows(const MultiplyJob<T, Out>& job, const TileSources<T>& where, int64_t row) {
  if constexpr (R > 0) {
    const int64_t fetched = row == 0 ? job.depth : 0;  // the tiles before have done it
    if (job.rows - row == R) return multiply_row<T, R>(job, where, row, fetched);
    multiply_last_rows<T, R - 1>(job, where, row);
  }
}

// Of a row that does not begin a line most vectors lie in two, which takes two accesses, in every pass of a block of
// rows over the tile. Where many pass, the tile is copied first to where its rows begin lines.
constexpr int64_t rows_worth_a_copy = 16 * max_tile_rows;

template <class T, class Out>
TileSources<T> copy_tile(const MultiplyJob<T, Out>& job, int64_t pixel) {
  constexpr int lanes = Vec<T>::lanes, vectors = tile_vectors(max_tile_rows);
  const int64_t present = job.length - pixel;
  for (int64_t j = 0; j < job.depth; ++j) {
    const T* source = job.sources[j] + pixel;
    T* to = job.tile + j * tile_width<T>;
    job.tile_rows[j] = to;
    if (present >= tile_width<T>) {
#pragma GCC unroll 8
      for (int v = 0; v < vectors; ++v) Vec<T>::load(source + v * lanes).store(to + v * lanes);
    } else {
      for (int64_t v = 0; v < present; v += lanes)
        Vec<T>::load(source + v, Vec<T>::first(present - v)).store(to + v);
    }
  }
  return {job.tile_rows, pixel};
}

// Pixels are the outer loop, but for a single tile of rows.
template <class T, class Out>
void multiply_whole_tiles(const MultiplyJob<T, Out>& job, int64_t rows) {
  constexpr int V = tile_vectors(max_tile_rows);
  const TileSources<T> as_they_lie{job.sources, 0};
  if (rows == max_tile_rows) return multiply_row<T, max_tile_rows>(job, as_they_lie, 0, job.depth);
  const int64_t share = divide_up(job.depth * max_tile_rows, rows);
  for (int64_t pixel = 0; pixel < job.length; pixel += tile_width<T>) {
    TileSources<T> sources = as_they_lie;
    if (job.tile && rows >= rows_worth_a_copy) sources = copy_tile(job, pixel);
    if (pixel + tile_width<T> <= job.length) {
      multiply_column<T, V, false>(job, sources, rows, pixel, typename Vec<T>::Mask(), share);
    } else {
      multiply_tail<T, max_tile_rows>(job, sources, 0, rows, pixel, share);
    }
  }
}

template <class T, class Out>
void multiply_all_rows(const MultiplyJob<T, Out>& job) {
  const int64_t whole = job.rows - job.rows % max_tile_rows;
  if (whole > 0) multiply_whole_tiles(job, whole);
  // The rows that are left make a lower, wider tile, so they go over the whole length by themselves.
  multiply_last_rows<T>(job, {job.sources, 0}, whole);
}

template <class T, class Out>
void multiply_rows(const MultiplyJob<T, Out>& job) {
  const int64_t beyond = job.length % Vec<T>::lanes;
  if (beyond > 0 && suits_columns(job, beyond)) {
    MultiplyJob<T, Out> vectors = job;
    vectors.length -= beyond;
    multiply_rows(vectors);
    return multiply_columns(job, vectors.length);
  }
  multiply_all_rows(job);
}

}  // namespace
}  // namespace groupconv::cpu
