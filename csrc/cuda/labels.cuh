// Learned groups on the device: from labels to a table, masks that are never stored, and the gradients that
// the structure learns from.
//
//   label_sums      ∂L/∂S[c, g] = Σ over the filters n of group g of (D·W)[n, c], and ∂L/∂T[n, g] over the
//                   inputs c of group g                                              (FLGC eq. 17, 18)
//   logit_grads     the assignments' gradient through the softmax Jacobian of their row
//   gate_sums       ∂L/∂g_k: the sum of D·W over the pairs of channels that differ in digit k and agree at
//                   every zero gate but k                                            (DGConv eq. 4)
//
// D·W: the gradient of the masked weight times the weight, added up over the window.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/element.cuh"
#include "cuda/launch.h"
#include "cuda/plan.h"

namespace groupconv::cuda {

constexpr int label_threads = 256;

__device__ inline int64_t first_item() { return static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; }
__device__ inline int64_t all_threads() { return static_cast<int64_t>(gridDim.x) * blockDim.x; }

// An element [n, c, tap] of a dense weight.
struct DenseMask {
  const int32_t* in_labels;
  const int32_t* out_labels;
  int64_t columns, area;

  __device__ bool selects(int64_t element) const {
    const int64_t entry = element / area;
    return out_labels[entry / columns] == in_labels[entry % columns];
  }
};

// As add_slices; where the labels differ nothing was added up.
template <class From, class To>
__global__ void __launch_bounds__(label_threads, 2)
    add_labelled_slices(const From* partial, int64_t slices, To* total, int64_t count, DenseMask mask) {
  for (int64_t i = first_item(); i < count; i += all_threads()) {
    From sum = 0;
    if (mask.selects(i)) {
      for (int64_t slice = 0; slice < slices; ++slice) sum += partial[slice * count + i];
    }
    total[i] = static_cast<To>(sum);
  }
}

template <class T>
__global__ void __launch_bounds__(label_threads, 2)
    mask_elements(const T* from, T* to, int64_t count, DenseMask mask) {
  for (int64_t i = first_item(); i < count; i += all_threads()) {
    to[i] = mask.selects(i) ? from[i] : static_cast<T>(0.0f);
  }
}

// The table of partition.h with a group for every label up to `groups`. Channels ascend in a group: each finds
// its place by itself, from how many labels are smaller, or equal and before it. A label that is out of range
// leaves offsets that are no partition's, which the plan will find.
struct LabelTable {
  const int32_t* in_labels;  // null: all 0
  int64_t in_channels;
  const int32_t* out_labels;
  int64_t out_channels, groups;
  int32_t* table;
};

__device__ inline int32_t count_smaller(const int32_t* labels, int64_t channels, int64_t label) {
  int32_t smaller = 0;
  for (int64_t c = 0; c < channels; ++c) smaller += (labels ? labels[c] : 0) < label;
  return smaller;
}

__device__ inline int32_t place_of(const int32_t* labels, int64_t channels, int64_t channel) {
  if (!labels) return static_cast<int32_t>(channel);
  const int32_t label = labels[channel];
  int32_t before = 0;
  for (int64_t c = 0; c < channels; ++c) before += labels[c] < label || (labels[c] == label && c < channel);
  return before;
}

// The first largest entry of each row; −1, which makes no partition, where one is not finite.
template <class T>
__global__ void __launch_bounds__(label_threads, 2)
    label_rows(const T* logits, int64_t rows, int64_t groups, int32_t* labels) {
  for (int64_t row = first_item(); row < rows; row += all_threads()) {
    const T* entries = logits + row * groups;
    auto largest = static_cast<Sum<T>>(entries[0]);
    int32_t best = 0;
    bool finite = true;
    for (int64_t g = 0; g < groups; ++g) {
      const auto value = static_cast<Sum<T>>(entries[g]);
      finite &= is_finite(value);
      if (value > largest) {
        largest = value;
        best = static_cast<int32_t>(g);
      }
    }
    labels[row] = finite ? best : -1;
  }
}

// ---- packing ---------------------------------------------------------------------------------------

// Element i of the packed weight and its place in the dense one; `pack`: dense to packed, else back.
template <class From, class To>
__global__ void __launch_bounds__(label_threads, 2)
    move_packed(const From* from, To* to, bool pack, int64_t in_channels, int64_t area, int64_t to_count,
                Plan plan) {
  if (!plan.valid()) {
    fill_with_nan(to, to_count);
    return;
  }
  const int64_t groups = plan.groups(), count = plan.weight_offsets[groups] * area;
  for (int64_t i = first_item(); i < count; i += all_threads()) {
    const int64_t entry = i / area;
    int64_t low = 0, high = groups;
    while (high - low > 1) {
      const int64_t middle = (low + high) / 2;
      (plan.weight_offsets[middle] <= entry ? low : high) = middle;
    }
    const int64_t columns = plan.source_offsets[low + 1] - plan.source_offsets[low];
    const int64_t within = entry - plan.weight_offsets[low];
    const int64_t row = plan.row_list[plan.row_offsets[low] + within / columns];
    const int64_t column = plan.source_list[plan.source_offsets[low] + within % columns];
    const int64_t dense = (row * in_channels + column) * area + i % area;
    const auto value = static_cast<Sum<From>>(from[pack ? dense : i]);
    to[pack ? i : dense] = static_cast<To>(value);
  }
}

// ---- FLGC ------------------------------------------------------------------------------------------

template <class T>
__device__ Sum<T> window_product(const T* grad, const T* weight, int64_t entry, int64_t area) {
  Sum<T> sum = 0;
  for (int64_t k = entry * area; k < (entry + 1) * area; ++k) {
    sum += static_cast<Sum<T>>(grad[k]) * static_cast<Sum<T>>(weight[k]);
  }
  return sum;
}

// by_input [inputs, groups], by_output [outputs, groups]. Neighbouring threads take neighbouring inputs for the
// one, and a warp the inputs of a group for the other.
template <class T>
__global__ void __launch_bounds__(label_threads, 2)
    label_sums(const T* grad, const T* weight, Sum<T>* by_input, Sum<T>* by_output, int64_t groups,
               int64_t inputs, int64_t outputs, int64_t area, Plan plan) {
  if (!plan.valid()) {
    fill_with_nan(by_input, inputs * groups);
    fill_with_nan(by_output, outputs * groups);
    return;
  }
  for (int64_t i = first_item(); i < inputs * groups; i += all_threads()) {
    const int64_t group = i / inputs, column = i % inputs;
    Sum<T> sum = 0;
    for (int32_t row = plan.row_offsets[group]; row < plan.row_offsets[group + 1]; ++row) {
      sum += window_product(grad, weight, plan.row_list[row] * inputs + column, area);
    }
    by_input[column * groups + group] = sum;
  }
  constexpr int lanes = 32;
  const int lane = threadIdx.x % lanes;
  for (int64_t i = first_item() / lanes; i < outputs * groups; i += all_threads() / lanes) {
    const int64_t row = i / groups, group = i % groups;
    Sum<T> sum = 0;
    for (int64_t column = plan.source_offsets[group] + lane; column < plan.source_offsets[group + 1];
         column += lanes) {
      sum += window_product(grad, weight, row * inputs + plan.source_list[column], area);
    }
    for (int distance = lanes / 2; distance > 0; distance /= 2) {
      sum += __shfl_down_sync(0xffffffffu, sum, distance);
    }
    if (lane == 0) by_output[i] = sum;
  }
}

// A row of assignments A = softmax(logits): ∂L/∂logits = A ⊙ (∂L/∂A − Σ A ∂L/∂A), where ∂L/∂A is that of the
// hard assignments, straight through, or with labels that of the winning entry and zero elsewhere.
template <class T>
__global__ void __launch_bounds__(label_threads, 2)
    logit_grads(const T* logits, const Sum<T>* by_assignment, const int32_t* winners, int64_t rows,
                int64_t groups, T* grads) {
  for (int64_t row = first_item(); row < rows; row += all_threads()) {
    const T* entries = logits + row * groups;
    const Sum<T>* given = by_assignment + row * groups;
    auto largest = static_cast<Sum<T>>(entries[0]);
    for (int64_t g = 1; g < groups; ++g) {
      const auto value = static_cast<Sum<T>>(entries[g]);
      largest = value > largest ? value : largest;
    }
    const auto taken = [&](int64_t g) { return winners && winners[row] != g ? Sum<T>(0) : given[g]; };
    Sum<T> total = 0, inner = 0;
    for (int64_t g = 0; g < groups; ++g) {
      const Sum<T> soft = std::exp(static_cast<Sum<T>>(entries[g]) - largest);
      total += soft;
      inner += soft * taken(g);
    }
    inner /= total;
    for (int64_t g = 0; g < groups; ++g) {
      const Sum<T> soft = std::exp(static_cast<Sum<T>>(entries[g]) - largest) / total;
      grads[row * groups + g] = static_cast<T>(soft * (taken(g) - inner));
    }
  }
}

// ---- DGConv ----------------------------------------------------------------------------------------

// See Kronecker in core/labels.h: digits of the channels' numbers, the first factor with the largest stride.
struct Gates {
  KroneckerFactors factors;
  const double* gates;

  __device__ bool open(int k) const { return gates[k] >= 0; }
  __device__ bool finite() const {
    bool all = true;
    for (int k = 0; k < factors.count; ++k) all &= is_finite(gates[k]);
    return all;
  }
};

__device__ inline int32_t gate_label(const Gates& g, int64_t channels, int64_t channel) {
  int64_t label = 0, stride = channels;
  for (int k = 0; k < g.factors.count; ++k) {
    stride /= g.factors.radices[k];
    if (!g.open(k)) label = label * g.factors.radices[k] + channel / stride % g.factors.radices[k];
  }
  return static_cast<int32_t>(label);
}

// Which gate's gradient a pair of channels is part of, apart from which of the digits differ.
struct Pair {
  uint64_t differing;  // a bit for each digit
  int closed;          // how many zero gates it differs at
};

__device__ inline Pair pair_of(const Gates& g, int64_t output, int64_t input) {
  Pair pair{0, 0};
  int64_t in_stride = g.factors.in_channels, out_stride = g.factors.out_channels;
  for (int k = 0; k < g.factors.count; ++k) {
    const int64_t radix = g.factors.radices[k];
    in_stride /= radix;
    out_stride /= radix;
    if (input / in_stride % radix == output / out_stride % radix) continue;
    pair.differing |= uint64_t{1} << k;
    pair.closed += !g.open(k);
  }
  return pair;
}

// The gradient of the weight: D where the mask is one.
template <class T>
__global__ void __launch_bounds__(label_threads, 2)
    mask_by_gates(Gates gates, const T* grad, T* weight_grad, int64_t entries, int64_t area) {
  const bool finite = gates.finite();
  for (int64_t entry = first_item(); entry < entries; entry += all_threads()) {
    const int64_t ins = gates.factors.in_channels;
    const bool on = pair_of(gates, entry / ins, entry % ins).closed == 0;
    for (int64_t k = entry * area; k < (entry + 1) * area; ++k) {
      weight_grad[k] = !finite ? not_a_number<T>() : on ? grad[k] : static_cast<T>(0.0f);
    }
  }
}

// sums [slices][gates]: a block adds up one gate's pairs of one slice, in a fixed order.
template <class T>
__global__ void __launch_bounds__(label_threads, 2)
    gate_sums(Gates gates, const T* grad, const T* weight, Sum<T>* sums, int64_t slices, int64_t entries,
              int64_t area) {
  __shared__ Sum<T> shared[label_threads];
  const int count = gates.factors.count;
  const int64_t ins = gates.factors.in_channels, length = (entries + slices - 1) / slices;
  for (int64_t item = blockIdx.x; item < slices * count; item += gridDim.x) {
    const int k = static_cast<int>(item % count);
    const int64_t slice = item / count;
    const int64_t end = (slice + 1) * length < entries ? (slice + 1) * length : entries;
    Sum<T> sum = gates.finite() ? Sum<T>(0) : not_a_number<Sum<T>>();
    for (int64_t entry = slice * length + threadIdx.x; entry < end; entry += label_threads) {
      const Pair pair = pair_of(gates, entry / ins, entry % ins);
      if ((pair.differing >> k & 1) == 0 || pair.closed != !gates.open(k)) continue;
      sum += window_product(grad, weight, entry, area);
    }
    shared[threadIdx.x] = sum;
    __syncthreads();
    for (int half = label_threads / 2; half > 0; half /= 2) {
      if (static_cast<int>(threadIdx.x) < half) shared[threadIdx.x] += shared[threadIdx.x + half];
      __syncthreads();
    }
    if (threadIdx.x == 0) sums[item] = shared[0];
    __syncthreads();
  }
}

}  // namespace groupconv::cuda
