// multiply_rows for the few pixels beyond the last whole vector, on which a masked tile would spend as much as on a
// whole one. Lanes run over what is contiguous in the weight: over the depth in a forward pass (a row of weights times
// columns of pixels), over the rows in an input gradient. A vector of weights meets all of these pixels.
#pragma once

#include "cpu/products/multiply_job.h"
#include "cpu/vector/convert.h"

namespace groupconv::cpu {
namespace {

template <class T>
constexpr int most_columns = Vec<T>::lanes / 4 > 0 ? Vec<T>::lanes / 4 : 1;

template <class T, int P, class Out>
class ColumnMultiply {
  using V_ = Vec<T>;
  using Sum = Vec<sum_t<T>>;
  static constexpr int lanes = V_::lanes;
  static constexpr int rows_at_once = 4 * P <= vector_registers / 3 ? 8 : 4;

 public:
  ColumnMultiply(const MultiplyJob<T, Out>& job, int64_t pixel) : job_(job) {
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
      Out* dest = job_.dests[row] + places_[p];
      if (job_.bias) sum += job_.bias[row];
      if (job_.accumulate) sum += widen(*dest);
      if (job_.residuals) sum += widen(job_.residuals[row][places_[p]]);
      if (job_.clamped) {
        sum = sum < job_.low ? job_.low : sum;  // false for NaN, which passes through
        sum = sum > job_.high ? job_.high : sum;
      }
      narrow(sum, *dest);
    }
  }

  const MultiplyJob<T, Out>& job_;
  int64_t places_[P];
};

template <class T, class Out>
bool suits_columns(const MultiplyJob<T, Out>& job, int64_t pixels) {
  constexpr int lanes = Vec<T>::lanes;
  const bool depth_contiguous = job.depth > 1 && job.steps[job.depth - 1] == job.depth - 1;
  return lanes > 1 && pixels <= lanes / 4 && job.depth >= 2 * lanes &&
         (depth_contiguous || job.weight_row_stride == 1);
}

template <class T, int P = most_columns<T>, class Out>
void multiply_columns(const MultiplyJob<T, Out>& job, int64_t pixel) {
  if constexpr (P > 0) {
    if (job.length - pixel == P) {
      ColumnMultiply<T, P, Out>(job, pixel);
    } else {
      multiply_columns<T, P - 1>(job, pixel);
    }
  }
}

}  // namespace
}  // namespace groupconv::cpu
