// One element from the type it is stored in to the type it is computed in, and back.
#pragma once

#include <cstdint>
#include <cstring>

#include "core/numeric.h"
#include "cpu/vector/vec.h"

namespace groupconv::cpu {
namespace {

template <class Stored>
struct ComputeType {
  using type = Stored;
};
template <>
struct ComputeType<BFloat16> {
  using type = float;
};
template <class Stored>
using compute_t = typename ComputeType<Stored>::type;

template <class T>
GROUPCONV_INLINE T widen(T x) {
  return x;
}
GROUPCONV_INLINE float widen(BFloat16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

template <class T>
GROUPCONV_INLINE void narrow(T x, T& stored) {
  stored = x;
}
// To nearest, ties to even; the carry of the increment may turn a finite number into infinity, as it
// should, and must not turn a NaN into one.
GROUPCONV_INLINE void narrow(float x, BFloat16& stored) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  stored.bits = static_cast<uint16_t>(x != x ? 0x7fc0 : rounded);
}

// Vec<compute_t<Stored>> loads and stores it.
#if defined(__AVX512F__)
template <class Stored>
constexpr bool in_vectors = true;
#else
template <class Stored>
constexpr bool in_vectors = __is_same(Stored, compute_t<Stored>);
#endif

// The first `count` ≤ lanes elements as a vector of the type that is computed in, zero behind them.
template <class T>
GROUPCONV_INLINE Vec<T> load_widened(const T* p, int64_t count) {
  return Vec<T>::load(p, Vec<T>::first(count));
}
template <class T>
GROUPCONV_INLINE Vec<T> load_widened(const BFloat16* p, int64_t count) {
#if defined(__AVX512F__)
  return Vec<T>::load(p, Vec<T>::first(count));
#elif defined(__AVX2__)
  BFloat16 some[8] = {};
  if (count < 8) {
    std::memcpy(some, p, static_cast<size_t>(count) * sizeof(BFloat16));
    p = some;
  }
  const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16))};
#else
  return {count > 0 ? widen(*p) : T(0)};
#endif
}

// The first `count` ≤ lanes elements to where they are stored.
template <class T>
GROUPCONV_INLINE void store_narrowed(Vec<T> x, T* p, int64_t count) {
  x.store(p, Vec<T>::first(count));
}
template <class T>
GROUPCONV_INLINE void store_narrowed(Vec<T> x, BFloat16* p, int64_t count) {
#if defined(__AVX512F__)
  x.store(p, Vec<T>::first(count));
#elif defined(__AVX2__)
  // As narrow() does it one by one.
  const __m256i bits = _mm256_castps_si256(x.v);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i carried = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x.v, x.v, _CMP_UNORD_Q));
  const __m256i words = _mm256_blendv_epi8(_mm256_srli_epi32(carried, 16), _mm256_set1_epi32(0x7fc0), nan);
  const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(words, words), 0x08);
  const __m128i half = _mm256_castsi256_si128(packed);
  std::memcpy(p, &half, static_cast<size_t>(count) * sizeof(BFloat16));
#else
  if (count > 0) narrow(x.v, *p);
#endif
}

}  // namespace
}  // namespace groupconv::cpu
