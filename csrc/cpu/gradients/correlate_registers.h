// Rows of a gradient times pairs of pixels of inputs, in matrix registers: for 16 outputs several times 16
// sums each.
//
// Six registers are sums, one holds what the gradient has, and one after the other what it is multiplied
// with: six taps of a window, or as many blocks of inputs. The pairs are few enough to stay in L1, whatever
// the outputs; of the gradient one register is loaded from L2 for up to six products. In L1 a product takes
// 6.0 to 6.4 ns, what the instruction alone takes; one register for right operands is as good as two.
#pragma once

#include <type_traits>

#include "cpu/gradients/correlate_pairs.h"

namespace groupconv::cpu {
namespace {

// body(std::integral_constant) for 0 … N − 1.
template <int N, class Body>
GROUPCONV_INLINE void for_each_register(const Body& body) {
  if constexpr (N > 0) {
    for_each_register<N - 1>(body);
    body(std::integral_constant<int, N - 1>());
  }
}

template <int N>
void correlate_registers(const CorrelatePairsJob& job, const RightOperand* rights) {
  constexpr int left = 6, right = 7;
  constexpr int64_t sum_bytes = block_cols * sizeof(float), pair_bytes = block_cols * sizeof(Pair<BFloat16>);
  const int64_t grad_bytes = job.grad_distance * static_cast<int64_t>(sizeof(BFloat16));
  const Pair<BFloat16>* pairs[N];
  for (int i = 0; i < N; ++i) pairs[i] = job.pairs + rights[i].pairs;
  for_each_register<N>([&](auto i) GROUPCONV_INLINE_LAMBDA {
    if (job.begins) {
      clear_register<i>();
    } else {
      load_register<i>(job.sums + rights[i].sums, sum_bytes);
    }
  });
  const BFloat16* grads = job.grads;
  for (int64_t at = 0; at < job.places; at += block_depth, grads += block_depth) {
    load_register<left>(grads, grad_bytes);
    for_each_register<N>([&](auto i) GROUPCONV_INLINE_LAMBDA {
      load_register<right>(pairs[i], pair_bytes);
      pairs[i] += block_depth / 2 * block_cols;
      multiply_registers<i, left, right>();
    });
  }
  for_each_register<N>(
      [&](auto i) GROUPCONV_INLINE_LAMBDA { store_register<i>(job.sums + rights[i].sums, sum_bytes); });
}

class MatrixPairProducts {
 public:
  static constexpr int outputs_at_once = block_rows;
  static constexpr int most_right_operands = 6;
  // Quarters of the products that registers make which are wanted at least.
  static constexpr int64_t least_quarters(bool) { return 1; }
  static constexpr bool takes_runs = false;
  using Registers = MatrixRegisters;

  // `count` right operands, no more than there are registers for.
  template <int N = most_right_operands>
  static void correlate(const CorrelatePairsJob& job, const RightOperand* rights, int64_t count) {
    if constexpr (N > 1) {
      if (count < N) return correlate<N - 1>(job, rights, count);
    }
    correlate_registers<N>(job, rights);
  }
};

}  // namespace
}  // namespace groupconv::cpu
