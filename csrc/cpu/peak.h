// The rate of independent float32 multiply-adds: the ceiling that benchmarks measure themselves against,
// taken with the same vectors as the kernels and in the same run.
#pragma once

#include <time.h>

#include "cpu/vec.h"

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

inline double fma_peak(double seconds) {
  using V_ = Vec<float>;
  constexpr int sums = 12;  // more than latency × issue rate of any current processor
  constexpr int64_t repeats = 20000;
  V_ sum[sums];
#pragma GCC unroll 12
  for (int i = 0; i < sums; ++i) sum[i] = V_::broadcast(static_cast<float>(i));
  V_ factor = V_::broadcast(0.5f), term = V_::broadcast(1.0f);
  // The best of many short runs: an interruption makes one slow, nothing makes one fast.
  double best = 0.0;
  const double end = monotonic_seconds() + seconds;
  do {
    const double start = monotonic_seconds();
    for (int64_t r = 0; r < repeats; ++r) {
#pragma GCC unroll 12
      for (int i = 0; i < sums; ++i) {
        sum[i] = multiply_add(sum[i], factor, term);
        keep(sum[i].v);
      }
    }
    const double rate =
        2.0 * sums * V_::lanes * static_cast<double>(repeats) / (monotonic_seconds() - start) * 1e-9;
    best = larger(best, rate);
  } while (monotonic_seconds() < end);
  return best;
}

}  // namespace
}  // namespace groupconv::cpu
