// Masked weights: dense W [N, C, area] times a mask that is given by groups and never built.
//
//   pack         packed weight of a Partition ← W          mask, gather, cast in one pass
//   unpack       W ← packed weight, zero off the mask      its transpose
//   mask_weight  W ⊙ M, M[n][c] = [t(n) = s(c)]            FLGC eq. 14 and DGConv eq. 3, from labels
//
// Loads and stores bound all of them. pack: one element in and one out of four rows at a time, so that an
// index is loaded once for four elements. mask_weight: two streams and one compare for a vector.
#pragma once

#include "cpu/kernels.h"
#include "cpu/staging/workspace.h"

namespace groupconv::cpu {
namespace {

// The window's area as a constant where it is a usual one: short loops then unroll completely.
template <int64_t N>
struct Constant {
  constexpr operator int64_t() const { return N; }
};

template <class Body>
GROUPCONV_INLINE void for_area(int64_t area, const Body& body) {
  if (area == 1) {
    body(Constant<1>{});
  } else if (area == 9) {
    body(Constant<9>{});
  } else {
    body(area);
  }
}

// dest[i] ← source[index[i]], windows of `area` elements, for `Rows` rows at once.
template <int Rows, class From, class To, class Area>
GROUPCONV_INLINE void gather_rows(const From* const* sources, const int32_t* index, int64_t count, Area area,
                                  To* dest, int64_t dest_stride) {
  for (int64_t i = 0; i < count; ++i) {
    const int64_t from = index[i] * area, to = i * area;
#pragma GCC unroll 4
    for (int r = 0; r < Rows; ++r) {
      for (int64_t k = 0; k < area; ++k) {
        narrow(widen(sources[r][from + k]), dest[r * dest_stride + to + k]);
      }
    }
  }
}

// dest[index[i]] ← source[i], and zero elsewhere.
template <class From, class To, class Area>
GROUPCONV_INLINE void scatter_row(const From* source, const int32_t* index, int64_t count, Area area,
                                  To* dest, int64_t length) {
  std::memset(static_cast<void*>(dest), 0, static_cast<size_t>(length) * sizeof(To));
  for (int64_t i = 0; i < count; ++i) {
    for (int64_t k = 0; k < area; ++k) narrow(widen(source[i * area + k]), dest[index[i] * area + k]);
  }
}

template <class From, class To>
void pack(const PackProblem& problem) {
  constexpr int rows = 4;
  const PartitionView& partition = *problem.partition;
  const int64_t row_length = partition.in_channels * problem.area;
  const From* dense = static_cast<const From*>(problem.dense);
  for_each_item(problem.threads, partition.groups, [&](int64_t g) {
    const int32_t* from = partition.inputs.of(g);
    const int32_t* to = partition.outputs.of(g);
    const int64_t ins = partition.inputs.count(g), outs = partition.outputs.count(g);
    To* block = static_cast<To*>(problem.packed) + partition.weight_offsets[g] * problem.area;
    const int64_t block_stride = ins * problem.area;
    for_area(problem.area, [&](auto area) GROUPCONV_INLINE_LAMBDA {
      const From* sources[rows];
      int64_t r = 0;
      for (; r + rows <= outs; r += rows) {
        for (int i = 0; i < rows; ++i) sources[i] = dense + to[r + i] * row_length;
        gather_rows<rows>(sources, from, ins, area, block + r * block_stride, block_stride);
      }
      for (; r < outs; ++r) {
        sources[0] = dense + to[r] * row_length;
        gather_rows<1>(sources, from, ins, area, block + r * block_stride, block_stride);
      }
    });
  });
}

template <class From, class To>
void unpack(const PackProblem& problem) {
  const PartitionView& partition = *problem.partition;
  const int64_t row_length = partition.in_channels * problem.area;
  To* dense = static_cast<To*>(problem.dense);
  for_each_item(problem.threads, partition.groups, [&](int64_t g) {
    const int64_t ins = partition.inputs.count(g);
    const From* block = static_cast<const From*>(problem.packed) + partition.weight_offsets[g] * problem.area;
    for_area(problem.area, [&](auto area) GROUPCONV_INLINE_LAMBDA {
      for (int64_t r = 0; r < partition.outputs.count(g); ++r) {
        scatter_row(block + r * ins * problem.area, partition.inputs.of(g), ins, area,
                    dense + partition.outputs.of(g)[r] * row_length, row_length);
      }
    });
  });
}

// Every element's label, so that a window of any area is a row like that of a 1×1 weight.
GROUPCONV_INLINE void repeat_labels(const int32_t* labels, int64_t channels, int64_t area,
                                    int32_t* repeated) {
  for (int64_t c = 0; c < channels; ++c) {
    for (int64_t k = 0; k < area; ++k) repeated[c * area + k] = labels[c];
  }
}

// The value is read whether it is kept or not: so the loop becomes vectors. Lines are fetched before they are
// written, which the hardware is late to guess where a weight is larger than the caches.
template <class Element>
GROUPCONV_INLINE void mask_row(const Element* weight, const int32_t* labels, int32_t label, int64_t length,
                               Element* __restrict masked) {
  constexpr int64_t line = 64 / sizeof(Element), ahead = 16 * line;
  const auto element = [&](int64_t i) GROUPCONV_INLINE_LAMBDA {
    const Element value = weight[i];
    masked[i] = labels[i] == label ? value : Element(0);
  };
  int64_t i = 0;
  for (; i + line <= length; i += line) {
    __builtin_prefetch(masked + i + ahead, 1);
    __builtin_prefetch(weight + i + 2 * ahead);
#pragma GCC unroll 1  // unrolled it would no longer become vectors
    for (int64_t k = i; k < i + line; ++k) element(k);
  }
  for (; i < length; ++i) element(i);
}
GROUPCONV_INLINE void mask_row(const BFloat16* weight, const int32_t* labels, int32_t label, int64_t length,
                               BFloat16* masked) {
  mask_row(&weight->bits, labels, label, length, &masked->bits);
}

// Rows of a dense weight that are worth an item of their own.
constexpr int64_t rows_per_item = 32;

template <class Stored>
void mask_weight(const MaskProblem<Stored>& problem) {
  const int64_t row_length = problem.in_channels * problem.area;
  for_each_item(problem.threads, divide_up(problem.out_channels, rows_per_item), [&](int64_t item) {
    const int32_t* labels = problem.in_labels;
    if (problem.area > 1) {
      Workspace space;
      space.plan<int32_t>(row_length);
      space.open();
      int32_t* repeated = space.take<int32_t>(row_length);
      repeat_labels(problem.in_labels, problem.in_channels, problem.area, repeated);
      labels = repeated;
    }
    const int64_t end = smaller((item + 1) * rows_per_item, problem.out_channels);
    for (int64_t n = item * rows_per_item; n < end; ++n) {
      mask_row(problem.weight + n * row_length, labels, problem.out_labels[n], row_length,
               problem.masked + n * row_length);
    }
  });
}

}  // namespace
}  // namespace groupconv::cpu
