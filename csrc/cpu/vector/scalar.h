// Vectors of one lane, for every processor, for vec.h.
#pragma once

#include <cstdint>

#include "core/inline.h"

namespace groupconv::cpu {
namespace {

constexpr int vector_registers = 16;
constexpr bool has_compress = false, has_mask_registers = false;

template <class T>
struct Vec {
  static constexpr int lanes = 1;
  using Mask = bool;
  T v;

  static GROUPCONV_INLINE Mask first(int64_t n) { return n > 0; }
  static GROUPCONV_INLINE Mask all() { return true; }
  static GROUPCONV_INLINE Mask from_bits(uint32_t bits) { return bits != 0; }
  static GROUPCONV_INLINE Vec broadcast(T x) { return {x}; }
  static GROUPCONV_INLINE Vec load(const T* p) { return {*p}; }
  static GROUPCONV_INLINE Vec load(const T* p, Mask m) { return {m ? *p : T(0)}; }
  static GROUPCONV_INLINE Vec gather(const T* p, const int32_t* index, Mask m) { return load(p + *index, m); }
  GROUPCONV_INLINE void store(T* p) const { *p = v; }
  GROUPCONV_INLINE void store(T* p, Mask m) const {
    if (m) *p = v;
  }
  GROUPCONV_INLINE T sum() const { return v; }
  friend GROUPCONV_INLINE Vec operator+(Vec a, Vec b) { return {a.v + b.v}; }
  friend GROUPCONV_INLINE Vec operator*(Vec a, Vec b) { return {a.v * b.v}; }
  friend GROUPCONV_INLINE Vec multiply_add(Vec a, Vec b, Vec c) { return {a.v * b.v + c.v}; }
  friend GROUPCONV_INLINE Vec only(Vec x, Mask m) { return {m ? x.v : T(0)}; }
  friend GROUPCONV_INLINE Vec even(Vec a, Vec) { return a; }
  friend GROUPCONV_INLINE Vec clamp(Vec low, Vec high, Vec x) {
    const T above = low.v > x.v ? low.v : x.v;
    return {high.v < above ? high.v : above};
  }
  friend GROUPCONV_INLINE Vec between(Vec low, Vec high, Vec y, Vec x) {
    return {y.v <= low.v || y.v >= high.v ? T(0) : x.v};
  }
  friend GROUPCONV_INLINE Vec at_least(Vec low, Vec x) { return {low.v > x.v ? low.v : x.v}; }
};

template <class T>
GROUPCONV_INLINE void pin(Vec<T>&) {}

}  // namespace
}  // namespace groupconv::cpu
