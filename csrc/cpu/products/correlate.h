// correlate_rows: sums[r][j] += Σ_q grad[r][q] · source[j][q], the heart of the weight gradient.
//
// Both operands are rows of pixels, so lanes hold partial sums over pixels and are added up once per
// tile. Tile: R gradient rows × J source rows; with 32 registers 4 × 6 (24 sums, 4 gradients, 1 source),
// with 16 registers 3 × 3 (9 + 3 + 1).
//
// In a padded tile some lattice positions are no pixels (the gap between two rows of the image). Both
// operands are masked there: zeroing one of them alone would turn an Inf in the other into a NaN.
#pragma once

#include "cpu/vector/pair.h"
#include "cpu/vector/vec.h"

namespace groupconv::cpu {
namespace {

template <class T>
struct CorrelateJob {
  const T* const* grads;    // [rows]
  const T* const* sources;  // [depth]
  const int64_t* steps;     // [depth] distance of source j's weight from a row's first weight
  sum_t<T>* weight_grad;
  int64_t weight_row_stride;
  int64_t rows, depth;
  int64_t length;
  const uint32_t* lane_masks;  // one per vector, or null: every position is a pixel
};

constexpr int correlate_rows_tile = vector_registers == 32 ? 4 : 3;
constexpr int correlate_depth_tile = vector_registers == 32 ? 6 : 3;

template <class T, int R, int J>
void correlate_tile(const CorrelateJob<T>& job, int64_t row, int64_t first) {
  using V_ = Vec<T>;
  constexpr int lanes = V_::lanes;
  Vec<sum_t<T>> sums[R * J];
#pragma GCC unroll 24
  for (int i = 0; i < R * J; ++i) sums[i] = zero<sum_t<T>>();

  const T* grads[R];
  const T* sources[J];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) grads[r] = job.grads[row + r];
#pragma GCC unroll 8
  for (int j = 0; j < J; ++j) sources[j] = job.sources[first + j];
  const auto step = [&](int64_t at, auto load) GROUPCONV_INLINE_LAMBDA {
    V_ g[R];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) g[r] = load(grads[r] + at);
#pragma GCC unroll 8
    for (int j = 0; j < J; ++j) {
      const V_ x = load(sources[j] + at);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) sums[r * J + j] = multiply_add(g[r], x, sums[r * J + j]);
    }
  };
  int64_t at = 0;
  if (job.lane_masks) {
    for (int64_t v = 0; at < job.length; ++v, at += lanes) {
      const auto mask = V_::from_bits(job.lane_masks[v]);
      step(at, [&](const T* p) GROUPCONV_INLINE_LAMBDA { return V_::load(p, mask); });
    }
  } else {
    for (; at + lanes <= job.length; at += lanes) {
      step(at, [](const T* p) GROUPCONV_INLINE_LAMBDA { return V_::load(p); });
    }
    if (at < job.length) {
      const auto mask = V_::first(job.length - at);
      step(at, [&](const T* p) GROUPCONV_INLINE_LAMBDA { return V_::load(p, mask); });
    }
  }

  sum_t<T> totals[R * J];
  sum_each<R * J>(sums, totals);
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
    sum_t<T>* out = job.weight_grad + (row + r) * job.weight_row_stride;
#pragma GCC unroll 8
    for (int j = 0; j < J; ++j) out[job.steps[first + j]] += totals[r * J + j];
  }
}

template <class T, int R, int J = correlate_depth_tile>
void correlate_last(const CorrelateJob<T>& job, int64_t row, int64_t first) {
  if constexpr (J > 0) {
    if (job.depth - first >= J) return correlate_tile<T, R, J>(job, row, first);
    correlate_last<T, R, J - 1>(job, row, first);
  }
}

template <class T, int R = correlate_rows_tile>
void correlate_panel(const CorrelateJob<T>& job, int64_t row, int64_t first, int64_t end) {
  if constexpr (R > 0) {
    if (job.rows - row < R) return correlate_panel<T, R - 1>(job, row, first, end);
    for (; first + correlate_depth_tile <= end; first += correlate_depth_tile) {
      correlate_tile<T, R, correlate_depth_tile>(job, row, first);
    }
    if (first < end) correlate_last<T, R, correlate_depth_tile - 1>(job, row, first);
  }
}

template <class T>
void correlate_rows(const CorrelateJob<T>& job) {
  // A block of source rows stays in L1 while all gradient rows pass over it.
  constexpr int64_t l1_share = 16 << 10;
  const int64_t fit = l1_share / (job.length * static_cast<int64_t>(sizeof(T)));
  const int64_t block = larger(fit / correlate_depth_tile, int64_t{1}) * correlate_depth_tile;
  for (int64_t first = 0; first < job.depth; first += block) {
    for (int64_t row = 0; row < job.rows; row += correlate_rows_tile) {
      correlate_panel<T>(job, row, first, smaller(first + block, job.depth));
    }
  }
}

}  // namespace
}  // namespace groupconv::cpu
