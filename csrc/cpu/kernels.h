// The table of kernels that every instruction set offers, and the plain-data problems they take.
// Shared by the code that is compiled for every processor and the code compiled for one.
#pragma once

#include <cstdint>

#include "core/epilogue.h"
#include "core/labels.h"
#include "core/numeric.h"
#include "core/partition.h"
#include "core/problem.h"
#include "core/prologue.h"
#include "core/sweep.h"
#include "cpu/vector/convert.h"

namespace groupconv::cpu {

// The caller's thread pool: runs body(context, 0 … items − 1), in any order, on up to `count` threads, each
// of which holds a ScratchUse. What a body throws reaches the caller, and no further item is begun.
struct Threads {
  int64_t count = 1;
  void (*run)(int64_t items, void (*body)(void* context, int64_t item), void* context) = nullptr;
};

class WeightKeeper;  // packed_weight.h

// Staged rows of one tile and the sums made from them stay in a core's L2 together.
constexpr int64_t tile_bytes = 384 << 10;

// Source rows to destination rows: the forward pass (inputs to outputs) or, with the two sides
// exchanged, the input gradient (outputs to inputs).
template <class Stored>
struct ConvolveProblem {
  using Compute = compute_t<Stored>;

  Image<const Stored> source;
  Prologue<Compute> prologue;  // of a forward pass; an input gradient has none
  Image<Stored> dest;
  Image<const Stored> residual;  // data == nullptr: none; otherwise it has dest's strides, but for stride_n
  // Two levels: every group makes one channel of `shared`, and every output reads all of them, pixel by pixel.
  // A group's block of the weight then has a row more at its end, that of its shared channel.
  const Compute* coarse = nullptr;  // [outputs, groups]; null: one level
  Image<Stored> shared;
  const Compute* weight = nullptr;
  const Stored* stored_weight =
      nullptr;                    // the same as it is stored: for convolve_stored, where there is no `weight`
  const Compute* bias = nullptr;  // one per destination channel, or null
  const PartitionView* partition = nullptr;
  bool transposed = false;  // input gradient
  int64_t window_area = 1;
  const Sweep* sweep = nullptr;
  Activation activation = Activation::none;
  WeightKeeper* keeper = nullptr;  // who may have the weight packed already; null: nobody
  Threads threads;
};

// weight_grad is the packed gradient, zeroed before the first of the sweeps that make it. Its sums are those of
// `slices` of the batch, added up in order (staging/slices.h).
template <class Stored>
struct WeightGradProblem {
  Image<const Stored> input;
  Prologue<compute_t<Stored>> prologue;
  Image<const Stored> grad;
  compute_t<Stored>* weight_grad = nullptr;
  int64_t slices = 1;
  const PartitionView* partition = nullptr;
  int64_t window_area = 1;
  const Sweep* sweep = nullptr;  // of the forward pass
  bool whole = true;             // no other call adds to this gradient
  Threads threads;
};

// Back through a clamp to the sum under it. All images have one layout: channels_last, or pixels that are
// neighbours. bias_grad: null, or [slices][channels], zeroed, of which only the first is written where it is
// not channels_last; the caller adds them up in order.
template <class Stored>
struct EpilogueGradProblem {
  Image<const Stored> grad;
  Image<const Stored> output;  // data == nullptr: nothing was clamped
  Image<Stored> unclamped;     // data == nullptr: not wanted
  Activation activation = Activation::none;
  double* bias_grad = nullptr;
  int64_t slices = 1;
  Threads threads;
};

// All gradients of a pointwise convolution, its images flattened to rows. weight_grad is zeroed, and made as that
// of WeightGradProblem; bias_grad is [slices][channels], zeroed, which the caller adds up in order. In channels_last,
// where something was clamped and all pixels are one row, this is done part by part.
template <class Stored>
struct PointwiseBackwardProblem {
  Image<const Stored> grad;
  Image<const Stored> output;  // data == nullptr: nothing was clamped
  Image<const Stored> input;
  Image<Stored> input_grad;
  const compute_t<Stored>* weight = nullptr;
  compute_t<Stored>* weight_grad = nullptr;
  double* bias_grad = nullptr;  // or null: not wanted
  int64_t slices = 1;
  const PartitionView* partition = nullptr;
  const Sweep *part = nullptr, *last_part = nullptr;  // sweeps over some pixels and over those that are left
  Activation activation = Activation::none;
  Threads threads;
};

// Takes grad = ∂L/∂x' to ∂L/∂x in place. Its strides are those of a dense NCHW or channels_last image.
// scale_grad and shift_grad have `slices` copies of [channels], zeroed, which the caller adds up in order.
template <class Stored>
struct PrologueGradProblem {
  Image<const Stored> input;
  Image<Stored> grad;
  Prologue<compute_t<Stored>> prologue;
  compute_t<Stored>* scale_grad = nullptr;
  compute_t<Stored>* shift_grad = nullptr;
  int64_t slices = 1;
  Threads threads;
};

// Between a dense weight [N, C, area] and the packed one of a partition; each kernel knows its types.
struct PackProblem {
  void* dense = nullptr;
  void* packed = nullptr;
  const PartitionView* partition = nullptr;
  int64_t area = 1;
  Threads threads;
};

// masked = weight where the labels of output and input are equal, zero elsewhere.
template <class Stored>
struct MaskProblem {
  const Stored* weight = nullptr;
  Stored* masked = nullptr;
  const int32_t* in_labels = nullptr;
  const int32_t* out_labels = nullptr;
  int64_t in_channels = 0, out_channels = 0, area = 1;
  Threads threads;
};

// by_input has `slices` copies of [groups, C], zeroed, which the caller adds up in order; by_output is
// [N, groups], zeroed. weight_grad: null, or where grad is stored once more, masked.
template <class Stored>
struct LabelGradProblem {
  const Stored* grad = nullptr;
  const Stored* weight = nullptr;
  const PartitionView* partition = nullptr;  // of the labels, with at most `groups` groups
  const int32_t* in_labels = nullptr;
  const int32_t* out_labels = nullptr;
  int64_t groups = 0, area = 1, slices = 1;
  Stored* weight_grad = nullptr;
  compute_t<Stored>* by_input = nullptr;
  compute_t<Stored>* by_output = nullptr;
  Threads threads;
};

// by_assignment is ∂L/∂S or ∂L/∂T, [rows, groups]; winners: null, or the only entry of each row that counts.
template <class Stored>
struct LogitGradProblem {
  const Stored* logits = nullptr;
  const compute_t<Stored>* by_assignment = nullptr;
  const int32_t* winners = nullptr;
  int64_t rows = 0, groups = 0;
  Stored* logit_grad = nullptr;
};

// neighbours is Kronecker::neighbour_table; grad lies packed in it, or dense like weight. weight_grad is grad
// where the mask is one. gate_grads has gate_count sums, zeroed, for every position of an output among the
// out_channels / gcd · groups of them; the caller adds them up in order.
template <class Stored>
struct KroneckerGradProblem {
  const Stored* grad = nullptr;
  bool grad_is_packed = false;
  const Stored* weight = nullptr;
  Stored* weight_grad = nullptr;
  const PartitionView* neighbours = nullptr;
  const Kronecker::Gate* gates = nullptr;
  int64_t gate_count = 0, out_remainder = 1, area = 1;
  compute_t<Stored>* gate_grads = nullptr;
  Threads threads;
};

// One pointwise convolution of a chain.
template <class Compute>
struct ChainStage {
  const PartitionView* partition = nullptr;
  const Compute* weight = nullptr;
};

// Images are single rows (Image::as_row), and the sweep is the pointwise one over them.
template <class Stored>
struct ChainProblem {
  Image<const Stored> source;
  Image<Stored> dest;
  const ChainStage<compute_t<Stored>>* stages = nullptr;
  int64_t count = 0;
  const compute_t<Stored>* bias = nullptr;  // one per channel of dest, or null
  const Sweep* sweep = nullptr;
  Activation activation = Activation::none;
  Threads threads;
};

// weight_grad is the stages' packed gradients, one stage after another, zeroed, and made as that of WeightGradProblem.
template <class Stored>
struct ChainGradProblem {
  Image<const Stored> source;
  Image<const Stored> grad;
  Image<Stored> source_grad;                 // data == nullptr: not asked for
  compute_t<Stored>* weight_grad = nullptr;  // null: not asked for
  int64_t slices = 1;
  const ChainStage<compute_t<Stored>>* stages = nullptr;
  int64_t count = 0;
  const Sweep* sweep = nullptr;
  Threads threads;
};

template <class Stored>
struct TypedKernels {
  void (*convolve)(const ConvolveProblem<Stored>&);
  void (*weight_grad)(const WeightGradProblem<Stored>&);
  void (*epilogue_grad)(const EpilogueGradProblem<Stored>&);
  void (*pointwise_backward)(const PointwiseBackwardProblem<Stored>&);
  void (*prologue_grad)(const PrologueGradProblem<Stored>&);
  void (*pack)(const PackProblem&);         // as stored
  void (*cast_pack)(const PackProblem&);    // a dense weight in the type that is computed in
  void (*unpack)(const PackProblem&);       // as stored
  void (*cast_unpack)(const PackProblem&);  // to a dense weight in the type that is computed in
  void (*mask_weight)(const MaskProblem<Stored>&);
  void (*label_grad)(const LabelGradProblem<Stored>&);
  void (*logit_grad)(const LogitGradProblem<Stored>&);
  void (*kronecker_grad)(const KroneckerGradProblem<Stored>&);
  void (*chain)(const ChainProblem<Stored>&);
  void (*chain_grad)(const ChainGradProblem<Stored>&);
  // Whether convolve multiplies with lanes over a group's destination channels, not over pixels.
  bool (*has_lanes_over_channels)(const ConvolveProblem<Stored>&);
  // Null, or what multiplies by a weight as it is stored: false where convolve has to do it all.
  bool (*convolve_stored)(const ConvolveProblem<Stored>&) = nullptr;
};

// Of uint8 and int8: quantized.h has the problems.
template <class Out>
struct QuantizedProblem;
struct QuantizeProblem;
struct QuantizedKernels {
  void (*convolve)(const QuantizedProblem<uint8_t>&);
  void (*convolve_to_float)(const QuantizedProblem<float>&);
  void (*quantize)(const QuantizeProblem&);
};

struct KernelTable {
  const char* isa;
  TypedKernels<float> f32;
  TypedKernels<double> f64;
  TypedKernels<BFloat16> bf16;
  const QuantizedKernels* quantized;
  // GFLOP/s of independent sums, measured for about `seconds`.
  double (*f32_peak)(double seconds);
  double (*bf16_peak)(double seconds);
};

template <class Stored>
const TypedKernels<Stored>& typed(const KernelTable& table) {
  if constexpr (__is_same(Stored, float))
    return table.f32;
  else if constexpr (__is_same(Stored, double))
    return table.f64;
  else
    return table.bf16;
}

}  // namespace groupconv::cpu
