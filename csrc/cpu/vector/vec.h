// One thin vector type per instruction set and element type: Vec<float> and Vec<double>.
//
// Reached from the files of isa/, which are compiled once for each instruction set with its own flags.
// Everything sits in an anonymous namespace: internal linkage is what keeps an AVX-512 instruction from
// leaking, through a merged inline function, into code that runs on every processor. For the same
// reason no kernel header uses a standard-library template that could be emitted out of line.
#pragma once

#include <cstdint>

#include "core/inline.h"

// GCC 12 warns about its own vector headers, which leave unused lanes undefined on purpose.
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"

// Each of these has Vec<T> and
//   vector_registers    how many there are
//   has_compress        whether there are compress() and expand()
//   has_mask_registers  whether any lanes can be stored by a mask, at no cost
//   pin(x)              keeps a loaded vector in its register: else the compiler folds the load into every use, and a
//                       value that is used three times is loaded three times
// and, where it has better than what is below, add_where, store_every_second and sum_eight.
#if defined(__AVX512F__)
#include "cpu/vector/avx512.h"
#elif defined(__AVX2__)
#include "cpu/vector/avx2.h"
#else
#include "cpu/vector/scalar.h"
#endif

namespace groupconv::cpu {
namespace {

template <class T>
GROUPCONV_INLINE constexpr T smaller(T a, T b) {
  return b < a ? b : a;
}
template <class T>
GROUPCONV_INLINE constexpr T larger(T a, T b) {
  return a < b ? b : a;
}
GROUPCONV_INLINE constexpr int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Whether a vector's lanes can be brought into any order.
template <class T>
constexpr bool has_permute = __is_same(T, float) && Vec<T>::lanes > 1;

// sum + x where the mask is set, sum elsewhere.
template <class T>
GROUPCONV_INLINE Vec<T> add_where(Vec<T> sum, Vec<T> x, typename Vec<T>::Mask mask) {
  return sum + only(x, mask);
}

template <class T>
GROUPCONV_INLINE Vec<T> zero() {
  return Vec<T>::broadcast(T(0));
}

// The first `count` lanes to to[0], to[2], to[4], …
template <class T>
GROUPCONV_INLINE void store_every_second(Vec<T> x, T* to, int64_t count) {
  using V = Vec<T>;
  if constexpr (has_mask_registers) {
    constexpr int half = V::lanes / 2;
    constexpr uint32_t upper = ((1u << V::lanes) - 1) ^ ((1u << half) - 1);
    const auto spaced = [](int64_t some) GROUPCONV_INLINE_LAMBDA { return 0x5555u & ((1u << 2 * some) - 1); };
    const uint32_t low = spaced(smaller<int64_t>(count, half));
    expand(x, low).store(to, V::from_bits(low));
    if (count <= half) return;
    const uint32_t high = spaced(count - half);
    expand(compress(x, upper), high).store(to + V::lanes, V::from_bits(high));
  } else {
    T values[V::lanes];
    x.store(values);
    for (int64_t i = 0; i < count; ++i) to[2 * i] = values[i];
  }
}

// x where `by` is positive or NaN, zero elsewhere: as torch differentiates relu.
template <class T>
GROUPCONV_INLINE Vec<T> where_positive(Vec<T> by, Vec<T> x) {
  return between(zero<T>(), Vec<T>::broadcast(T(__builtin_nan(""))), by, x);
}

// The sums of eight vectors at once: each round adds halves of two vectors, so all eight together cost
// three times what one costs alone.
template <class T>
GROUPCONV_INLINE void sum_eight(const Vec<T>* sums, T* out) {
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) out[i] = sums[i].sum();
}

template <int Count, class T>
GROUPCONV_INLINE void sum_each(const Vec<T>* sums, T* out) {
  constexpr int whole = Count / 8 * 8;
#pragma GCC unroll 4
  for (int i = 0; i < whole; i += 8) sum_eight(sums + i, out + i);
#pragma GCC unroll 8
  for (int i = whole; i < Count; ++i) out[i] = sums[i].sum();
}

// Rows of an image are short, often shorter than the code that a compiler makes of a plain loop likes:
// whole vectors, then a masked one.
template <class T, class Element>
GROUPCONV_INLINE void for_each_vector(int64_t count, const Element& element) {
  constexpr int lanes = Vec<T>::lanes;
  int64_t i = 0;
  for (; i + lanes <= count; i += lanes) element(i, Vec<T>::all());
  if (i < count) element(i, Vec<T>::first(count - i));
}

}  // namespace
}  // namespace groupconv::cpu
