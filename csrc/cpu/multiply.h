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
// is no faster (benches/NOTES.md).
//
// Sums leave for the image or for scratch: gaps between a tile's rows, which an image does not have, are taken out
// on the way (row_gaps.h), and what is larger than the caches is stored past them (stores.h).
#pragma once

#include "cpu/pair.h"
#include "cpu/row_gaps.h"
#include "cpu/stores.h"
#include "cpu/strides.h"
#include "cpu/vec.h"

namespace groupconv::cpu {
namespace {

template <class T>
struct MultiplyJob {
  const T* const* sources;  // [depth] rows, at the tile's first pixel
  const T* const* next;     // the rows that are read after these, as many, or null: nobody knows
  const int64_t* steps;     // [depth] distance of source j's weight from a row's first weight
  int64_t depth;
  const T* weight;
  int64_t weight_row_stride;
  T* columns;                        // [most_columns][depth] scratch
  T* tile;                           // [depth][tile_width] scratch to copy source rows to, or null
  const T** tile_rows;               // [depth] scratch, where there is a tile
  sum_t<T>* const* dests;            // [rows]
  const sum_t<T>* bias;              // [rows], or null
  const sum_t<T>* const* residuals;  // [rows], or null
  int64_t rows;
  int64_t length;   // pixels
  bool accumulate;  // add to what dests hold
  bool clamped;
  sum_t<T> low, high;
  Stores stores;          // streamed: dests begin lines
  const GapVector* gaps;  // null, or of all vectors: dests and residuals have no gaps, and do not accumulate
};

constexpr int max_tile_rows = vector_registers == 32 ? 8 : 4;

// Registers: R · V sums, V sources, one weight.
constexpr int tile_vectors(int rows) {
  const int fit = (vector_registers - 1) / (rows + 1);
  return fit < 8 ? fit : 8;
}

// Where a tile finds the source rows: as they lie, or a copy of a tile, which begins at a pixel of theirs.
template <class T>
struct TileSources {
  const T* const* rows;
  int64_t begin;
};

// What a tile fetches for the one after it: it is narrow and its rows lie far apart, so the hardware does not guess
// where they go on. A core keeps few lines in flight, so every tile of rows fetches its share.
template <class T>
struct Ahead {
  const T* const* rows;
  int64_t pixel, begin, end;  // of the rows

  template <int V>
  GROUPCONV_INLINE void fetch(int64_t row) const {
    const T* source = rows[row] + pixel;
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) __builtin_prefetch(source + v * Vec<T>::lanes);
  }
};

// After the pixels before `pixel` come those behind, and then the rows that are read next. Where nobody knows them, it is
// likely what follows in memory: small images lie one behind the other.
template <class T>
Ahead<T> ahead_of(const MultiplyJob<T>& job, int64_t pixel, int64_t begin, int64_t end) {
  if (pixel >= job.length && job.next) return {job.next, 0, begin, end};
  return {job.sources, pixel, begin, end};
}

template <class T, int R, int V>
GROUPCONV_INLINE void clamp_sums(const MultiplyJob<T>& job, Vec<sum_t<T>> (&sums)[R][V]) {
  using Sum = Vec<sum_t<T>>;
  const Sum low = Sum::broadcast(job.low), high = Sum::broadcast(job.high);
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) sums[r][v] = clamp(low, high, sums[r][v]);
  }
}

#if defined(__AVX512F__)
template <class T, int R, int V, bool Tail>
GROUPCONV_INLINE void store_without_gaps(const MultiplyJob<T>& job, Vec<sum_t<T>> (&sums)[R][V], int64_t row,
                                         int64_t pixel, typename Vec<T>::Mask tail) {
  using Sum = Vec<sum_t<T>>;
  typename Sum::Mask taken[V], present[V];
  int64_t at[V];
#pragma GCC unroll 8
  for (int v = 0; v < V; ++v) {
    const GapVector& gap = job.gaps[pixel / Sum::lanes + v];
    const uint32_t lanes = Tail && v == V - 1 ? gap.lanes & tail : gap.lanes;
    taken[v] = Sum::from_bits(lanes);
    present[v] = Sum::first(__builtin_popcount(lanes));
    at[v] = gap.before;
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
      compress(sums[r][v], taken[v]).store(job.dests[row + r] + at[v], present[v]);
    }
  }
}
#endif

template <class T, int R, int V, bool Tail>
void multiply_tile(const MultiplyJob<T>& job, const TileSources<T>& where, int64_t row, int64_t pixel,
                   typename Vec<T>::Mask tail, const Ahead<T>& ahead) {
  using V_ = Vec<T>;
  using Sum = Vec<sum_t<T>>;
  constexpr int lanes = V_::lanes;
  const auto load = [&]<class E>(const E* p, int v) GROUPCONV_INLINE_LAMBDA {
    return Tail && v == V - 1 ? Vec<E>::load(p + v * lanes, tail) : Vec<E>::load(p + v * lanes);
  };

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
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) __builtin_prefetch(job.dests[row + r] + pixel + v * lanes, 1);
    }
  }

  // Counted up to zero, which takes no comparison.
  const int64_t depth = job.depth, source_pixel = pixel - where.begin;
  const T* const* const sources = where.rows + depth;
  const int64_t* const steps = job.steps + depth;
  const T* first_weights = job.weight + row * job.weight_row_stride;
  asm("" : "+r"(first_weights));
  const Strides strides(job.weight_row_stride * static_cast<int64_t>(sizeof(T)));
  const auto step = [&](int64_t j) GROUPCONV_INLINE_LAMBDA {
    const T* source = sources[j];
    const T* weight = first_weights + steps[j];
    asm("" : "+r"(source), "+r"(weight));  // else the compiler keeps a distance for each vector and each row
    source += source_pixel;
    V_ x[V];
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) x[v] = load(source, v);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const V_ w = V_::broadcast(*strides.at(weight, r));
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) sums[r][v] = multiply_add(w, x[v], sums[r][v]);
    }
  };
  int64_t j = -depth;
  for (; j < ahead.begin - depth; ++j) step(j);
  for (; j < ahead.end - depth; ++j) {
    ahead.template fetch<tile_vectors(R)>(j + depth);
    step(j);
  }
  for (; j != 0; ++j) step(j);

#if defined(__AVX512F__)
  if (job.gaps) return store_without_gaps<T, R, V, Tail>(job, sums, row, pixel, tail);
#endif
  const auto add_rows = [&](const sum_t<T>* const* rows) GROUPCONV_INLINE_LAMBDA {
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) sums[r][v] = sums[r][v] + load(rows[row + r] + pixel, v);
    }
  };
  if (job.accumulate) add_rows(job.dests);
  if (job.residuals) add_rows(job.residuals);
  if (job.clamped) clamp_sums<T, R, V>(job, sums);
  if constexpr (!Tail && fills_lines<sum_t<T>>) {
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
    sum_t<T>* dest = job.dests[row + r] + pixel;
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) {
      if (Tail && v == V - 1) {
        sums[r][v].store(dest + v * lanes, tail);
      } else {
        sums[r][v].store(dest + v * lanes);
      }
    }
  }
}

// The last, partial tile of a row: as few vectors as it needs, the last one masked.
template <class T, int R, int V = tile_vectors(R)>
void multiply_tail(const MultiplyJob<T>& job, const TileSources<T>& where, int64_t row, int64_t pixel,
                   int64_t end, const Ahead<T>& ahead) {
  constexpr int lanes = Vec<T>::lanes;
  const int64_t left = end - pixel;
  if constexpr (V > 1) {
    if (left <= (V - 1) * lanes) return multiply_tail<T, R, V - 1>(job, where, row, pixel, end, ahead);
  }
  multiply_tile<T, R, V, true>(job, where, row, pixel, Vec<T>::first(left - (V - 1) * lanes), ahead);
}

// R rows × the pixels [pixel, pixel + span): whole tiles first, then the tail. Each fetches `fetched` rows of the next
// one from `first` on.
template <class T, int R>
void multiply_span(const MultiplyJob<T>& job, const TileSources<T>& where, int64_t row, int64_t pixel,
                   int64_t span, int64_t first, int64_t fetched) {
  constexpr int V = tile_vectors(R);
  constexpr int64_t width = V * Vec<T>::lanes;
  const int64_t end = smaller(pixel + span, job.length);
  const int64_t begin = smaller(first, job.depth), stop = smaller(first + fetched, job.depth);
  for (; pixel + width <= end; pixel += width) {
    multiply_tile<T, R, V, false>(job, where, row, pixel, typename Vec<T>::Mask(),
                                  ahead_of(job, pixel + width, begin, stop));
  }
  if (pixel < end) multiply_tail<T, R>(job, where, row, pixel, end, ahead_of(job, end, begin, stop));
}

template <class T, int R = max_tile_rows - 1>
void multiply_last_rows(const MultiplyJob<T>& job, const TileSources<T>& where, int64_t row) {
  if constexpr (R > 0) {
    const int64_t fetched = row == 0 ? job.depth : 0;  // the tiles before have done it
    if (job.rows - row == R) return multiply_span<T, R>(job, where, row, 0, job.length, 0, fetched);
    multiply_last_rows<T, R - 1>(job, where, row);
  }
}

// Of a row that does not begin a line most vectors lie in two, which takes two accesses, in every pass of a block of
// rows over the tile. Where many pass, the tile is copied first to where its rows begin lines.
constexpr int64_t rows_worth_a_copy = 16 * max_tile_rows;
template <class T>
constexpr int64_t tile_width = tile_vectors(max_tile_rows) * Vec<T>::lanes;

template <class T>
TileSources<T> copy_tile(const MultiplyJob<T>& job, int64_t pixel) {
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

template <class T>
void multiply_all_rows(const MultiplyJob<T>& job) {
  const TileSources<T> as_they_lie{job.sources, 0};
  const int64_t full = job.rows - job.rows % max_tile_rows;
  const int64_t share = full > 0 ? divide_up(job.depth * max_tile_rows, full) : 0;
  for (int64_t pixel = 0; full > 0 && pixel < job.length; pixel += tile_width<T>) {
    TileSources<T> sources = as_they_lie;
    if (job.tile && full >= rows_worth_a_copy) sources = copy_tile(job, pixel);
    for (int64_t row = 0, first = 0; row < full; row += max_tile_rows, first += share) {
      multiply_span<T, max_tile_rows>(job, sources, row, pixel, tile_width<T>, first, share);
    }
  }
  // The rows that are left make a lower, wider tile, so they go over the whole length by themselves.
  multiply_last_rows<T>(job, as_they_lie, full);
}

// The few pixels beyond the last whole vector: a masked tile would spend as much on them as on a whole vector. Now
// lanes run over what is contiguous in the weight: over the depth in a forward pass (a row of weights times columns
// of pixels), over the rows in an input gradient. A vector of weights meets all of these pixels.
template <class T>
constexpr int most_columns = Vec<T>::lanes / 4 > 0 ? Vec<T>::lanes / 4 : 1;

template <class T, int P>
class ColumnMultiply {
  using V_ = Vec<T>;
  using Sum = Vec<sum_t<T>>;
  static constexpr int lanes = V_::lanes;
  static constexpr int rows_at_once = 4 * P <= vector_registers / 3 ? 8 : 4;

 public:
  ColumnMultiply(const MultiplyJob<T>& job, int64_t pixel) : job_(job) {
    for (int p = 0; p < P; ++p) places_[p] = place(pixel + p);
    for (int64_t j = 0; j < job.depth; ++j) {
      for (int p = 0; p < P; ++p) job.columns[p * job.depth + j] = job.sources[j][pixel + p];
    }
    if (job.weight_row_stride == 1) {
      for (int64_t row = 0; row < job.rows; row += lanes) over_rows(row);
    } else {
      int64_t row = 0;
      for (; row + rows_at_once <= job.rows; row += rows_at_once) over_depth<rows_at_once>(row);
      for (; row < job.rows; ++row) over_depth<1>(row);
    }
  }

 private:
  // Where a pixel lies in a row of dests and residuals; -1: in a gap.
  int64_t place(int64_t pixel) const {
    if (!job_.gaps) return pixel;
    const GapVector& gap = job_.gaps[pixel / lanes];
    const uint32_t lane = uint32_t{1} << (pixel % lanes);
    return gap.lanes & lane ? gap.before + __builtin_popcount(gap.lanes & (lane - 1)) : -1;
  }

  template <int R>
  void over_depth(int64_t row) const {
    Sum sums[P * R];
#pragma GCC unroll 32
    for (int i = 0; i < P * R; ++i) sums[i] = zero<sum_t<T>>();
    const T* weight = job_.weight + row * job_.weight_row_stride;
    const auto add = [&](int64_t j, auto load) GROUPCONV_INLINE_LAMBDA {
      V_ x[P];
#pragma GCC unroll 4
      for (int p = 0; p < P; ++p) x[p] = load(job_.columns + p * job_.depth + j);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        const V_ w = load(weight + r * job_.weight_row_stride + j);
#pragma GCC unroll 4
        for (int p = 0; p < P; ++p) sums[p * R + r] = multiply_add(w, x[p], sums[p * R + r]);
      }
    };
    int64_t j = 0;
    for (; j + lanes <= job_.depth; j += lanes) {
      add(j, [](const T* p) GROUPCONV_INLINE_LAMBDA { return V_::load(p); });
    }
    if (j < job_.depth) {
      const auto mask = V_::first(job_.depth - j);
      add(j, [&](const T* p) GROUPCONV_INLINE_LAMBDA { return V_::load(p, mask); });
    }
    sum_t<T> totals[P * R];
    sum_each<P * R>(sums, totals);
    for (int p = 0; p < P; ++p) finish(p, row, R, totals + p * R);
  }

  void over_rows(int64_t row) const {
    const auto mask = V_::first(smaller<int64_t>(lanes, job_.rows - row));
    const T* weight = job_.weight + row;
    Sum even[P], odd[P];
#pragma GCC unroll 4
    for (int p = 0; p < P; ++p) even[p] = odd[p] = zero<sum_t<T>>();
    const auto add = [&](int64_t j, Sum(&sums)[P]) GROUPCONV_INLINE_LAMBDA {
      const V_ w = V_::load(weight + job_.steps[j], mask);
#pragma GCC unroll 4
      for (int p = 0; p < P; ++p) {
        sums[p] = multiply_add(w, V_::broadcast(job_.columns[p * job_.depth + j]), sums[p]);
      }
    };
    int64_t j = 0;
    for (; j + 2 <= job_.depth; j += 2) {
      add(j, even);
      add(j + 1, odd);
    }
    if (j < job_.depth) add(j, even);
    for (int p = 0; p < P; ++p) {
      sum_t<T> sums[lanes];
      (even[p] + odd[p]).store(sums);
      finish(p, row, smaller<int64_t>(lanes, job_.rows - row), sums);
    }
  }

  void finish(int p, int64_t first, int64_t count, const sum_t<T>* sums) const {
    if (places_[p] < 0) return;
    for (int64_t row = first; row < first + count; ++row) {
      sum_t<T> sum = sums[row - first];
      sum_t<T>* dest = job_.dests[row] + places_[p];
      if (job_.bias) sum += job_.bias[row];
      if (job_.accumulate) sum += *dest;
      if (job_.residuals) sum += job_.residuals[row][places_[p]];
      if (job_.clamped) {
        sum = sum < job_.low ? job_.low : sum;  // false for NaN, which passes through
        sum = sum > job_.high ? job_.high : sum;
      }
      *dest = sum;
    }
  }

  const MultiplyJob<T>& job_;
  int64_t places_[P];
};

template <class T>
bool suits_columns(const MultiplyJob<T>& job, int64_t pixels) {
  constexpr int lanes = Vec<T>::lanes;
  const bool depth_contiguous = job.depth > 1 && job.steps[job.depth - 1] == job.depth - 1;
  return lanes > 1 && pixels <= lanes / 4 && job.depth >= 2 * lanes &&
         (depth_contiguous || job.weight_row_stride == 1);
}

template <class T, int P = most_columns<T>>
void multiply_columns(const MultiplyJob<T>& job, int64_t pixel) {
  if constexpr (P > 0) {
    if (job.length - pixel == P) {
      ColumnMultiply<T, P>(job, pixel);
    } else {
      multiply_columns<T, P - 1>(job, pixel);
    }
  }
}

template <class T>
void multiply_rows(const MultiplyJob<T>& job) {
  const int64_t beyond = job.length % Vec<T>::lanes;
  if (beyond > 0 && suits_columns(job, beyond)) {
    MultiplyJob<T> vectors = job;
    vectors.length -= beyond;
    multiply_rows(vectors);
    return multiply_columns(job, vectors.length);
  }
  multiply_all_rows(job);
}

}  // namespace
}  // namespace groupconv::cpu
