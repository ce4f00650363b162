// The rate of independent multiply-adds: the ceiling that benchmarks measure themselves against, taken with the same
// registers as the kernels and in the same run.
#pragma once

#include <time.h>

#include "cpu/vector/pair.h"
#include "cpu/vector/vec.h"

namespace groupconv::cpu {
namespace {

GROUPCONV_INLINE double monotonic_seconds() {
  timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return static_cast<double>(now.tv_sec) + 1e-9 * static_cast<double>(now.tv_nsec);
}

// Makes the compiler believe that the value is read and changed here.
template <class T>
GROUPCONV_INLINE void keep(T& value) {
#if defined(__AVX512F__)
  asm volatile("" : "+v"(value));
#elif defined(__x86_64__)
  asm volatile("" : "+x"(value));
#else
  asm volatile("" : "+w"(value));
#endif
}

// GFLOP/s of `run`, which makes so many multiply-adds: the best of many short runs for about `seconds`. An interruption
// makes one slow, nothing makes one fast.
template <class Run>
double best_rate(double seconds, double multiply_adds, const Run& run) {
  double best = 0.0;
  const double end = monotonic_seconds() + seconds;
  do {
    const double start = monotonic_seconds();
    run();
    best = larger(best, 2.0 * multiply_adds / (monotonic_seconds() - start) * 1e-9);
  } while (monotonic_seconds() < end);
  return best;
}

// Of independent sums of products of operands.
template <class Operand>
double product_peak(double seconds) {
  using V_ = Vec<Operand>;
  using Sum = Vec<sum_t<Operand>>;
  constexpr int sums = 12;  // more than latency × issue rate of any current processor
  constexpr int64_t repeats = 20000;
  V_ factor = V_::broadcast(Operand{});
  keep(factor.v);
  const double products = static_cast<double>(sums * V_::lanes * channels_in<Operand> * repeats);
  return best_rate(seconds, products, [&] {
    Sum sum[sums];
#pragma GCC unroll 12
    for (int i = 0; i < sums; ++i) sum[i] = Sum::broadcast(static_cast<float>(i));
    for (int64_t r = 0; r < repeats; ++r) {
#pragma GCC unroll 12
      for (int i = 0; i < sums; ++i) {
        sum[i] = multiply_add(factor, factor, sum[i]);
        keep(sum[i].v);
      }
    }
  });
}

}  // namespace
}  // namespace groupconv::cpu
