// Rows of a gradient times pairs of pixels of inputs, by vdpbf16ps.
//
// Lanes are inputs. Tile: 8 outputs × 3 taps or blocks of inputs; 24 sums, 3 pairs, 1 gradient. A pair of pixels takes
// 11 loads for 24 instructions that multiply, and nothing is added up across lanes.
#pragma once

#include "cpu/gradients/correlate_pairs.h"
#include "cpu/vector/strides.h"

namespace groupconv::cpu {
namespace {

class VectorPairProducts {
  using Operand = Pair<BFloat16>;
  using Sum = Vec<float>;

 public:
  static constexpr int outputs_at_once = 8;
  static constexpr int most_right_operands = 3;
  // Quarters of the lanes that are wanted at least. Rows of pixels are pairs as they lie (correlate_rows), and need no
  // lanes for channels.
  static constexpr int64_t least_quarters(bool channels_last) { return channels_last ? 2 : 3; }
  static constexpr bool takes_runs = true;
  struct Registers {};

  template <int N = most_right_operands>
  static void correlate(const CorrelatePairsJob& job, const RightOperand* rights, int64_t count) {
    if constexpr (N > 1) {
      if (count < N) return correlate<N - 1>(job, rights, count);
    }
    int64_t row = 0;
    for (; row + outputs_at_once <= job.outputs; row += outputs_at_once)
      correlate_tile<outputs_at_once, N>(job, rights, row);
    correlate_last<outputs_at_once - 1, N>(job, rights, row);
  }

 private:
  template <int R, int N>
  static void correlate_last(const CorrelatePairsJob& job, const RightOperand* rights, int64_t row) {
    if constexpr (R > 0) {
      if (job.outputs - row < R) return correlate_last<R - 1, N>(job, rights, row);
      correlate_tile<R, N>(job, rights, row);
    }
  }

  template <int R, int N>
  static void correlate_tile(const CorrelatePairsJob& job, const RightOperand* rights, int64_t row) {
    const Strides rows_apart(job.grad_distance * static_cast<int64_t>(sizeof(BFloat16)));
    const BFloat16* grads = job.grads + row * job.grad_distance;
    const Operand* pairs[N];
    for (int i = 0; i < N; ++i) pairs[i] = job.pairs + rights[i].pairs;
    Sum sums[R][N];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 3
      for (int i = 0; i < N; ++i) sums[r][i] = zero<float>();
    }
    for (const PlaceRun* run = job.runs; run < job.runs + job.run_count; ++run) {
      job.ahead->fetch();
      const Operand* grad = reinterpret_cast<const Operand*>(grads + run->first);
      int64_t at = run->first / 2 * block_cols;
      for (const Operand* end = grad + run->pairs; grad < end; ++grad, at += block_cols) {
        Vec<Operand> x[N];
#pragma GCC unroll 3
        for (int i = 0; i < N; ++i) x[i] = Vec<Operand>::load(pairs[i] + at);
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
          const auto factor = Vec<Operand>::broadcast(*rows_apart.at(grad, r));
#pragma GCC unroll 3
          for (int i = 0; i < N; ++i) sums[r][i] = multiply_add(factor, x[i], sums[r][i]);
        }
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 3
      for (int i = 0; i < N; ++i) {
        float* to = job.sums + rights[i].sums + (row + r) * block_cols;
        (job.begins ? sums[r][i] : sums[r][i] + Sum::load(to)).store(to);
      }
    }
  }
};

}  // namespace
}  // namespace groupconv::cpu
