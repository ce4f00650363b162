// Rows to columns: as many rows as a register has lanes, four columns at a time.
//
// Rows i, i + 4, … meet in one register as they are loaded, as its 128-bit parts: an insertion from memory takes no
// shuffle. Only two rounds of shuffles inside the parts are left to do. With 16 lanes 64 numbers are 16 loads, 8
// shuffles and 4 stores of whole cache lines.
#pragma once

#include <type_traits>

#include "cpu/vector/convert.h"
#include "cpu/vector/pair.h"
#include "cpu/vector/strides.h"
#include "cpu/vector/vec.h"

namespace groupconv::cpu {
namespace {

constexpr int64_t columns_at_once = 4;

// To the type of a row: the same, or the one that is computed in.
template <class T, class Stored>
GROUPCONV_INLINE T element_of(Stored x) {
  if constexpr (__is_same(Stored, T)) {
    return x;
  } else {
    return widen(x);
  }
}

// The same, or to a type that is stored.
template <class S, class T>
GROUPCONV_INLINE void convert(S x, T& to) {
  if constexpr (__is_same(S, compute_t<T>)) {
    narrow(x, to);
  } else {
    to = element_of<T>(x);
  }
}

// Rows equally far apart.
template <class S>
struct SpacedRows {
  const S* first;
  int64_t distance;

  GROUPCONV_INLINE const S* operator()(int64_t row) const { return first + row * distance; }
};

// As many rows as a register has lanes, from a column on which moves along.
template <class S>
class SpacedStrip {
 public:
  GROUPCONV_INLINE SpacedStrip(const S* first, int64_t distance)
      : first_(first), strides_(distance * static_cast<int64_t>(sizeof(S))) {}
  GROUPCONV_INLINE void move(int64_t columns) { first_ += columns; }
  GROUPCONV_INLINE void move_eight_rows() { first_ = strides_.at(first_, 8); }
  GROUPCONV_INLINE auto rows() const {
    const S* low = first_;
    const S* high = strides_.at(low, 8);
    asm("" : "+r"(low), "+r"(high));  // two pointers; else the compiler keeps one for each row
    return [low, high, strides = strides_](int i)
               GROUPCONV_INLINE_LAMBDA { return i < 8 ? strides.at(low, i) : strides.at(high, i - 8); };
  }

 private:
  const S* first_;
  Strides strides_;
};
template <class S, int Lanes>
class ListedStrip {
 public:
  // Of fewer rows the last stands for those that are missing.
  template <class From>
  GROUPCONV_INLINE ListedStrip(const From& from, int64_t first, int64_t count) {
    for (int64_t i = 0; i < Lanes; ++i) rows_[i] = from(first + smaller(i, count - 1));
  }
  GROUPCONV_INLINE void move(int64_t columns) { column_ += columns; }
  GROUPCONV_INLINE auto rows() const {
    return [this](int i) GROUPCONV_INLINE_LAMBDA { return rows_[i] + column_; };
  }

 private:
  const S* rows_[Lanes];
  int64_t column_ = 0;
};
// What a pointer to a row points to.
template <class Pointer>
using element_t = std::remove_cv_t<std::remove_pointer_t<Pointer>>;

template <int Lanes, class From>
GROUPCONV_INLINE auto whole_strip(const From& from, int64_t first) {
  return ListedStrip<element_t<decltype(from(0))>, Lanes>(from, first, Lanes);
}
template <int Lanes, class S>
GROUPCONV_INLINE auto whole_strip(const SpacedRows<S>& from, int64_t first) {
  return SpacedStrip<S>(from(first), from.distance);
}

// Where columns go, from a row and a column on: equally far apart, or wherever they shall lie.
template <class T>
class SpacedColumns {
 public:
  GROUPCONV_INLINE SpacedColumns(T* first, int64_t distance) : first_(first), distance_(distance) {}
  GROUPCONV_INLINE SpacedColumns from_row(int64_t row) const { return {first_ + row, distance_}; }
  GROUPCONV_INLINE void move(int64_t columns) { first_ += columns * distance_; }
  GROUPCONV_INLINE T* operator()(int64_t column) const { return first_ + column * distance_; }

 private:
  T* first_;
  int64_t distance_;
};
template <class To>
class ListedColumns {
 public:
  explicit GROUPCONV_INLINE ListedColumns(const To& to) : to_(to) {}
  GROUPCONV_INLINE ListedColumns from_row(int64_t row) const {
    ListedColumns later(to_);
    later.row_ = row;
    return later;
  }
  GROUPCONV_INLINE void move(int64_t columns) { column_ += columns; }
  GROUPCONV_INLINE auto operator()(int64_t column) const { return to_(column_ + column) + row_; }

 private:
  const To& to_;
  int64_t row_ = 0, column_ = 0;
};

#if defined(__AVX2__)

GROUPCONV_INLINE __m128 load_four(const float* p) { return _mm_loadu_ps(p); }
GROUPCONV_INLINE __m128 load_four(const Pair<BFloat16>* p) {
  return _mm_loadu_ps(reinterpret_cast<const float*>(p));
}
GROUPCONV_INLINE __m128 load_four(const BFloat16* p) {
  const __m128i half = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
  return _mm_castsi128_ps(_mm_slli_epi32(_mm_cvtepu16_epi32(half), 16));
}

// What is transposed in registers: 32 bits each.
template <class T>
constexpr bool transposes_vectors = __is_same(T, float) || __is_same(T, Pair<BFloat16>);
// And rounded on the way out.
template <class S, class T>
constexpr bool rounds_vectors = __is_same(S, float) && __is_same(T, BFloat16) && in_vectors<T>;

template <class Row>
GROUPCONV_INLINE void load_parts(const Row& row, int i, __m256& m) {
  m = _mm256_insertf128_ps(_mm256_castps128_ps256(load_four(row(i))), load_four(row(i + 4)), 1);
}
GROUPCONV_INLINE void shuffle_parts(const __m256 (&m)[4], __m256 (&columns)[columns_at_once]) {
  const __m256 low01 = _mm256_unpacklo_ps(m[0], m[1]), high01 = _mm256_unpackhi_ps(m[0], m[1]);
  const __m256 low23 = _mm256_unpacklo_ps(m[2], m[3]), high23 = _mm256_unpackhi_ps(m[2], m[3]);
  columns[0] = _mm256_shuffle_ps(low01, low23, 0x44);
  columns[1] = _mm256_shuffle_ps(low01, low23, 0xee);
  columns[2] = _mm256_shuffle_ps(high01, high23, 0x44);
  columns[3] = _mm256_shuffle_ps(high01, high23, 0xee);
}
GROUPCONV_INLINE void store_lanes(float* to, __m256 v) { _mm256_storeu_ps(to, v); }

#if defined(__AVX512F__)
GROUPCONV_INLINE void store_lanes(float* to, __m256 v, int64_t count) {
  _mm256_mask_storeu_ps(to, static_cast<__mmask8>((1u << count) - 1), v);
}
template <class Row>
GROUPCONV_INLINE void load_parts(const Row& row, int i, __m512& m) {
  m = _mm512_castps128_ps512(load_four(row(i)));
  m = _mm512_insertf32x4(m, load_four(row(i + 4)), 1);
  m = _mm512_insertf32x4(m, load_four(row(i + 8)), 2);
  m = _mm512_insertf32x4(m, load_four(row(i + 12)), 3);
}
GROUPCONV_INLINE void shuffle_parts(const __m512 (&m)[4], __m512 (&columns)[columns_at_once]) {
  const __m512 low01 = _mm512_unpacklo_ps(m[0], m[1]), high01 = _mm512_unpackhi_ps(m[0], m[1]);
  const __m512 low23 = _mm512_unpacklo_ps(m[2], m[3]), high23 = _mm512_unpackhi_ps(m[2], m[3]);
  columns[0] = _mm512_shuffle_ps(low01, low23, 0x44);
  columns[1] = _mm512_shuffle_ps(low01, low23, 0xee);
  columns[2] = _mm512_shuffle_ps(high01, high23, 0x44);
  columns[3] = _mm512_shuffle_ps(high01, high23, 0xee);
}
GROUPCONV_INLINE void store_lanes(float* to, __m512 v) { _mm512_storeu_ps(to, v); }
GROUPCONV_INLINE void store_lanes(float* to, __m512 v, int64_t count) {
  _mm512_mask_storeu_ps(to, static_cast<__mmask16>((1u << count) - 1), v);
}
GROUPCONV_INLINE void store_lanes(BFloat16* to, __m512 v) { Vec<float>{v}.store(to); }
GROUPCONV_INLINE void store_lanes(BFloat16* to, __m512 v, int64_t count) {
  Vec<float>{v}.store(to, Vec<float>::first(count));
}
GROUPCONV_INLINE void store_lanes(BFloat16* to, __m256 v, int64_t count = 8) {
  store_lanes(to, _mm512_castps256_ps512(v), count);
}
using LongRegister = __m512;
#else
GROUPCONV_INLINE void store_lanes(float* to, __m256 v, int64_t count) {
  Vec<float>{v}.store(to, Vec<float>::first(count));
}
using LongRegister = __m256;
#endif

template <class Register, class... Count>
GROUPCONV_INLINE void store_lanes(Pair<BFloat16>* to, Register v, Count... count) {
  store_lanes(reinterpret_cast<float*>(to), v, count...);
}

// Lane i of columns[c]: element c of row(i).
template <class Register, class Row>
GROUPCONV_INLINE void load_columns(const Row& row, Register (&columns)[columns_at_once]) {
  Register parts[4];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) load_parts(row, i, parts[i]);
  shuffle_parts(parts, columns);
}

// All columns of a strip, of whose rows `count` are there; the last columns are made together with some before them.
template <class Register, bool Whole, class Strip, class To>
void transpose_strip(Strip strip, int64_t count, int64_t columns, To to) {
  for (int64_t left = columns; left > 0; left -= columns_at_once) {
    if (left < columns_at_once) {
      strip.move(left - columns_at_once);
      to.move(left - columns_at_once);
    }
    Register column[columns_at_once];
    load_columns(strip.rows(), column);
#pragma GCC unroll 4
    for (int64_t i = 0; i < columns_at_once; ++i) {
      if constexpr (Whole) {
        store_lanes(to(i), column[i]);
      } else {
        store_lanes(to(i), column[i], count);
      }
    }
    strip.move(columns_at_once);
    to.move(columns_at_once);
  }
}
// The strip of rows from `first` on. Returns how many rows it takes.
template <class Register, class From, class To>
int64_t transpose_strip_at(const From& from, int64_t first, int64_t rows, int64_t columns, const To& to) {
  constexpr int lanes = sizeof(Register) / sizeof(float);
  const int64_t count = rows - first;
  if (count >= lanes) {
    transpose_strip<Register, true>(whole_strip<lanes>(from, first), lanes, columns, to.from_row(first));
  } else {
    const ListedStrip<element_t<decltype(from(0))>, lanes> strip(from, first, count);
    transpose_strip<Register, false>(strip, count, columns, to.from_row(first));
  }
  return lanes;
}

#else

template <class T>
constexpr bool transposes_vectors = false;

#endif

// to(c)[r] = from(r)[c]
template <class From, class To>
GROUPCONV_INLINE void transpose_between(const From& from, int64_t rows, int64_t columns, const To& to) {
#if defined(__AVX2__)
  using T = element_t<decltype(to(0))>;
  if constexpr (transposes_vectors<T> || rounds_vectors<element_t<decltype(from(0))>, T>) {
    if (columns >= columns_at_once) {
      for (int64_t r = 0; r < rows;) {
        r += rows - r <= 8 ? transpose_strip_at<__m256>(from, r, rows, columns, to)
                           : transpose_strip_at<LongRegister>(from, r, rows, columns, to);
      }
      return;
    }
  }
#endif
  for (int64_t c = 0; c < columns; ++c) {
    for (int64_t r = 0; r < rows; ++r) convert(from(r)[c], to(c)[r]);
  }
}
template <class From, class To>
void transpose_rows(const From& from, int64_t rows, int64_t columns, const To& to) {
  transpose_between(from, rows, columns, ListedColumns<To>(to));
}
// Rows `distance` apart to columns `column_distance` apart.
template <class Stored, class T>
void transpose_in(const Stored* source, int64_t distance, int64_t rows, int64_t columns, T* to,
                  int64_t column_distance) {
  transpose_between(SpacedRows<Stored>{source, distance}, rows, columns,
                    SpacedColumns<T>(to, column_distance));
}

// A square: lane i of columns[c] is element c of row(i), widened.
template <class T, class Row>
GROUPCONV_INLINE void load_square(const Row& row, Vec<T> (&columns)[Vec<T>::lanes]) {
  constexpr int lanes = Vec<T>::lanes;
#if defined(__AVX2__)
  if constexpr (__is_same(T, float)) {
#pragma GCC unroll 4
    for (int c = 0; c < lanes; c += columns_at_once) {
      LongRegister some[columns_at_once];
      load_columns([&](int i) GROUPCONV_INLINE_LAMBDA { return row(i) + c; }, some);
#pragma GCC unroll 4
      for (int i = 0; i < columns_at_once; ++i) columns[c + i].v = some[i];
    }
    return;
  }
#endif
  for (int c = 0; c < lanes; ++c) {
    T column[lanes];
    for (int i = 0; i < lanes; ++i) column[i] = element_of<T>(row(i)[c]);
    columns[c] = Vec<T>::load(column);
  }
}

}  // namespace
}  // namespace groupconv::cpu
