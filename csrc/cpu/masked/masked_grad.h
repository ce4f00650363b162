// What the structure of a masked weight learns from D = ∂L/∂(W ⊙ M), in one pass over D and W:
//
//   label_grad      ∂M[n][c] = Σ_k D·W, never stored: summed over the filters of a group for S, over the
//                   inputs of a group for T, while eight rows of it lie in L1        (FLGC eq. 17, 18)
//   logit_grad      the assignments' gradient through the softmax Jacobian of their row
//   kronecker_grad  ∂g_k: the sum of D·W over the pairs of channels that differ in digit k and agree at
//                   every zero gate but k                                            (DGConv eq. 4)
//
// S: a vector of the row is added to the G × C sums of the row's group. T, few groups: the vector, masked, is
// added to a sum of each group that stays in a register. Else each group's list of inputs picks from eight rows
// at once, so an index is loaded once for eight elements and the sums are independent.
#pragma once

#include "cpu/masked/masked.h"
#include "cpu/vector/activation.h"

namespace groupconv::cpu {
namespace {

// products[c] = Σ_k a[c][k] · b[c][k]. Eight windows are added up at once.
template <class T>
void window_products(const T* a, const T* b, int64_t windows, int64_t area, T* __restrict products) {
  using V = Vec<T>;
  if (area == 1) {
    for (int64_t i = 0; i < windows; ++i) products[i] = a[i] * b[i];
    return;
  }
  const int64_t whole = area / V::lanes * V::lanes;
  const auto tail = V::first(area - whole);
  const auto dot = [&](int64_t window) GROUPCONV_INLINE_LAMBDA {
    const T *x = a + window * area, *y = b + window * area;
    V sum = zero<T>();
    for (int64_t k = 0; k < whole; k += V::lanes) sum = multiply_add(V::load(x + k), V::load(y + k), sum);
    if (whole < area) sum = multiply_add(V::load(x + whole, tail), V::load(y + whole, tail), sum);
    return sum;
  };
  int64_t c = 0;
  for (; c + 8 <= windows; c += 8) {
    V sums[8];
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) sums[i] = dot(c + i);
    sum_each<8>(sums, products + c);
  }
  for (; c < windows; ++c) products[c] = dot(c).sum();
}

template <class T>
GROUPCONV_INLINE T sum_of(const T* values, int64_t count) {
  using V = Vec<T>;
  V sum = zero<T>();
  int64_t i = 0;
  for (; i + V::lanes <= count; i += V::lanes) sum = sum + V::load(values + i);
  if (i < count) sum = sum + V::load(values + i, V::first(count - i));
  return sum.sum();
}

template <class T>
GROUPCONV_INLINE void add_row(const T* row, int64_t count, T* __restrict sums) {
  for (int64_t i = 0; i < count; ++i) sums[i] += row[i];
}

// The row itself where it is stored as it is computed in, else widened into scratch.
template <class T>
GROUPCONV_INLINE const T* widened(const T* row, int64_t, T*) {
  return row;
}
GROUPCONV_INLINE const float* widened(const BFloat16* row, int64_t length, float* scratch) {
  for (int64_t i = 0; i < length; ++i) scratch[i] = widen(row[i]);
  return scratch;
}

template <class Stored>
class LabelGrad {
  using T = compute_t<Stored>;
  static constexpr int rows_at_once = 8;
  static constexpr int few_groups = 8;
  static constexpr int rows_in_registers = vector_registers == 32 ? 2 : 1;
  static constexpr bool computes_as_stored = __is_same(Stored, T);

 public:
  explicit LabelGrad(const LabelGradProblem<Stored>& problem)
      : p_(problem), channels_(p_.partition->in_channels), row_length_(channels_ * p_.area) {}

  void run() const {
    for_each_item(p_.threads, p_.slices, [&](int64_t slice) {
      const int64_t blocks = divide_up(p_.partition->out_channels, rows_at_once);
      run_rows(slice, blocks * slice / p_.slices * rows_at_once,
               smaller(blocks * (slice + 1) / p_.slices * rows_at_once, p_.partition->out_channels));
    });
  }

 private:
  void run_rows(int64_t slice, int64_t row, int64_t end) const {
    Workspace space;
    space.plan<T>(rows_at_once * channels_);
    space.plan<T>(row_length_);
    space.plan<T>(row_length_);
    space.plan<int32_t>(row_length_);
    space.plan<uint32_t>(few_groups * vectors());
    space.open();
    T* products = space.take<T>(rows_at_once * channels_);
    T* wide_grad = space.take<T>(row_length_);
    T* wide_weight = space.take<T>(row_length_);
    int32_t* repeated = space.take<int32_t>(row_length_);
    uint32_t* masks = space.take<uint32_t>(few_groups * vectors());
    const int32_t* labels = p_.in_labels;
    if (p_.weight_grad && p_.area > 1) {
      repeat_labels(p_.in_labels, channels_, p_.area, repeated);
      labels = repeated;
    }
    const bool few = p_.groups <= few_groups;
    if (few) list_masks(masks);
    T* by_input = p_.by_input + slice * p_.groups * channels_;
    const int at_once = few ? rows_in_registers : rows_at_once;
    for (; row < end; row += at_once) {
      const int64_t rows = smaller<int64_t>(at_once, end - row);
      const bool multiplies = few && computes_as_stored && p_.area == 1;
      for (int64_t r = 0; r < rows; ++r) {
        const int64_t at = (row + r) * row_length_;
        const int32_t label = p_.out_labels[row + r];
        if (!multiplies) {
          window_products(widened(p_.grad + at, row_length_, wide_grad),
                          widened(p_.weight + at, row_length_, wide_weight), channels_, p_.area,
                          products + r * channels_);
          if (!few) add_row(products + r * channels_, channels_, by_input + label * channels_);
        }
        if (p_.weight_grad) mask_row(p_.grad + at, labels, label, row_length_, p_.weight_grad + at);
      }
      if (few) {
        const T *grad = products, *weight = nullptr;
        if constexpr (computes_as_stored) {
          if (multiplies) {
            grad = p_.grad + row * channels_;
            weight = p_.weight + row * channels_;
          }
        }
        if (rows == rows_in_registers) {
          add_up_masked<rows_in_registers>(grad, weight, masks, row, by_input);
        } else {
          add_up_masked<1>(grad, weight, masks, row, by_input);
        }
      } else if (rows == rows_at_once) {
        add_up_groups<rows_at_once>(products, row);
      } else {
        for (int64_t r = 0; r < rows; ++r) add_up_groups<1>(products + r * channels_, row + r);
      }
    }
  }

  int64_t vectors() const { return divide_up(channels_, Vec<T>::lanes); }

  // masks[vector · few_groups + g]: the lanes whose channel is in group g.
  void list_masks(uint32_t* masks) const {
    for (int64_t i = 0; i < few_groups * vectors(); ++i) masks[i] = 0;
    for (int64_t c = 0; c < channels_; ++c) {
      masks[c / Vec<T>::lanes * few_groups + p_.in_labels[c]] |= uint32_t{1} << c % Vec<T>::lanes;
    }
  }

  // by_output and by_input of `Rows` rows of products, or of two factors where there is a second.
  template <int Rows>
  void add_up_masked(const T* first, const T* second, const uint32_t* masks, int64_t row, T* by_input) const {
    using V = Vec<T>;
    V sums[Rows * few_groups];
#pragma GCC unroll 16
    for (int i = 0; i < Rows * few_groups; ++i) sums[i] = zero<T>();
    T* inputs[Rows];
    for (int r = 0; r < Rows; ++r) inputs[r] = by_input + p_.out_labels[row + r] * channels_;
    const auto step = [&](int64_t c, auto load, auto store) GROUPCONV_INLINE_LAMBDA {
      V products[Rows];
#pragma GCC unroll 2
      for (int r = 0; r < Rows; ++r) {
        products[r] = load(first + r * channels_ + c);
        if (second) products[r] = products[r] * load(second + r * channels_ + c);
        store(load(inputs[r] + c) + products[r], inputs[r] + c);
      }
#pragma GCC unroll 8
      for (int g = 0; g < few_groups; ++g) {
        const auto mask = V::from_bits(masks[g]);
#pragma GCC unroll 2
        for (int r = 0; r < Rows; ++r) {
          sums[r * few_groups + g] = add_where(sums[r * few_groups + g], products[r], mask);
        }
      }
      masks += few_groups;
    };
    int64_t c = 0;
    for (; c + V::lanes <= channels_; c += V::lanes) {
      step(
          c, [](const T* p) GROUPCONV_INLINE_LAMBDA { return V::load(p); },
          [](V x, T* p) GROUPCONV_INLINE_LAMBDA { x.store(p); });
    }
    if (c < channels_) {
      const auto tail = V::first(channels_ - c);
      step(
          c, [&](const T* p) GROUPCONV_INLINE_LAMBDA { return V::load(p, tail); },
          [&](V x, T* p) GROUPCONV_INLINE_LAMBDA { x.store(p, tail); });
    }
    T totals[Rows * few_groups];
    sum_each<Rows * few_groups>(sums, totals);
    for (int r = 0; r < Rows; ++r) {
      for (int64_t g = 0; g < p_.groups; ++g) {
        p_.by_output[(row + r) * p_.groups + g] = totals[r * few_groups + g];
      }
    }
  }

  // by_output[n][g] = Σ_{c: s(c) = g} products[n][c]
  template <int Rows>
  void add_up_groups(const T* products, int64_t row) const {
    const ChannelLists& inputs = p_.partition->inputs;
    for (int64_t g = 0; g < p_.partition->groups; ++g) {
      const int32_t* channels = inputs.of(g);
      const int64_t count = inputs.count(g);
      T sums[Rows] = {};
      for (int64_t i = 0; i < count; ++i) {
#pragma GCC unroll 8
        for (int r = 0; r < Rows; ++r) sums[r] += products[r * channels_ + channels[i]];
      }
      for (int r = 0; r < Rows; ++r) p_.by_output[(row + r) * p_.groups + g] = sums[r];
    }
  }

  const LabelGradProblem<Stored>& p_;
  int64_t channels_, row_length_;
};

template <class Stored>
void label_grad(const LabelGradProblem<Stored>& problem) {
  LabelGrad<Stored>(problem).run();
}

// A row of assignments A = softmax(logits): ∂L/∂logits = A ⊙ (∂L/∂A − Σ A ∂L/∂A), where ∂L/∂A is that of the
// hard assignments, straight through, or with labels that of the winning entry and zero elsewhere.
template <class Stored>
void logit_grad(const LogitGradProblem<Stored>& p) {
  using T = compute_t<Stored>;
  const ScratchUse scratch;
  Workspace space;
  space.plan<T>(p.groups);
  space.plan<T>(p.groups);
  space.open();
  T* soft = space.take<T>(p.groups);
  T* given = space.take<T>(p.groups);
  for (int64_t row = 0; row < p.rows; ++row) {
    const Stored* logits = p.logits + row * p.groups;
    const T* by_assignment = p.by_assignment + row * p.groups;
    T largest = widen(logits[0]);
    for (int64_t g = 0; g < p.groups; ++g) largest = larger(largest, static_cast<T>(widen(logits[g])));
    T total = 0, inner = 0;
    for (int64_t g = 0; g < p.groups; ++g) soft[g] = exponential(widen(logits[g]) - largest);
    for (int64_t g = 0; g < p.groups; ++g) {
      given[g] = p.winners && p.winners[row] != g ? T(0) : by_assignment[g];
      total += soft[g];
      inner += soft[g] * given[g];
    }
    const T scale = T(1) / total;
    inner *= scale;
    Stored* grad = p.logit_grad + row * p.groups;
    for (int64_t g = 0; g < p.groups; ++g) narrow(soft[g] * scale * (given[g] - inner), grad[g]);
  }
}

// Row r of a group stands for the digits r / out_remainder at the open gates, and column c of the group's own
// inputs for c / in_remainder. Rows with the same digits are added up first; a chain of folds, each shorter
// by its radix, then gives the sums of every gate.
template <class Stored>
class KroneckerGrad {
  using T = compute_t<Stored>;

 public:
  explicit KroneckerGrad(const KroneckerGradProblem<Stored>& problem)
      : p_(problem),
        near_(*p_.neighbours),
        reads_(near_.inputs.count(0)),
        rows_(near_.outputs.count(0)),
        own_(near_.in_channels / near_.groups),
        row_length_(near_.in_channels * p_.area) {}

  void run() const {
    const int64_t positions = rows_ / p_.out_remainder;
    for_each_item(p_.threads, positions, [&](int64_t position) {
      for_area(p_.area, [&](auto area) GROUPCONV_INLINE_LAMBDA { run_position(position, area); });
    });
  }

 private:
  template <class Area>
  void run_position(int64_t position, Area area) const {
    Workspace space;
    space.plan<T>(reads_ * area);
    space.plan<T>(reads_ * area);
    space.plan<T>(reads_);
    space.plan<T>(own_);
    space.open();
    T* weights = space.take<T>(reads_ * area);
    T* wide = space.take<T>(reads_ * area);
    T* products = space.take<T>(reads_);
    T* own = space.take<T>(own_);
    for (int64_t i = 0; i < own_; ++i) own[i] = T(0);
    T* gate_grads = p_.gate_grads + position * p_.gate_count;

    for (int64_t g = 0; g < near_.groups; ++g) {
      const int32_t* from = near_.inputs.of(g);
      for (int64_t r = position * p_.out_remainder; r < (position + 1) * p_.out_remainder; ++r) {
        const int64_t at = near_.outputs.of(g)[r] * row_length_;
        const Stored* row = p_.weight + at;
        gather_rows<1>(&row, from, reads_, area, weights, 0);
        const T* grads = wide;
        if (p_.grad_is_packed) {
          const Stored* packed = p_.grad + (near_.weight_offsets[g] + r * reads_) * area;
          grads = widened(packed, reads_ * area, wide);
        } else {
          const Stored* dense = p_.grad + at;
          gather_rows<1>(&dense, from, reads_, area, wide, 0);
        }
        window_products(grads, weights, reads_, area, products);
        scatter_row(grads, from, own_, area, p_.weight_grad + at, row_length_);
        add_row(products, own_, own);
        const T* flipped = products + own_;
        for (int64_t k = 0; k < p_.gate_count; ++k) {
          if (p_.gates[k].open) continue;
          const int64_t count = (p_.gates[k].radix - 1) * own_;
          gate_grads[k] += sum_of(flipped, count);
          flipped += count;
        }
      }
    }
    fold(own, position, gate_grads);
  }

  void fold(T* sums, int64_t position, T* gate_grads) const {
    int64_t length = own_, stride = rows_ / p_.out_remainder;
    for (int64_t k = 0; k < p_.gate_count; ++k) {
      if (!p_.gates[k].open) continue;
      const int64_t radix = p_.gates[k].radix;
      length /= radix;
      stride /= radix;
      const int64_t digit = position / stride % radix;
      for (int64_t other = 0; other < radix; ++other) {
        if (other != digit) gate_grads[k] += sum_of(sums + other * length, length);
      }
      for (int64_t other = 1; other < radix; ++other) add_row(sums + other * length, length, sums);
    }
  }

  const KroneckerGradProblem<Stored>& p_;
  const PartitionView& near_;
  int64_t reads_, rows_, own_, row_length_;
};

template <class Stored>
void kronecker_grad(const KroneckerGradProblem<Stored>& problem) {
  KroneckerGrad<Stored>(problem).run();
}

}  // namespace
}  // namespace groupconv::cpu
