// What the CPU implementations of the ops share: reading a table, choosing the type, and the convolution
// itself, which ops on learned groups call with tables of their own.
#pragma once

#include <algorithm>
#include <string>
#include <vector>

#include "core/known_partitions.h"
#include "core/partition.h"
#include "core/sweep.h"
#include "cpu/dispatch.h"
#include "torch/arguments.h"
#include "torch/threads.h"

namespace groupconv::ops {

// Below this many multiply-adds waking a thread costs more than it saves.
constexpr int64_t worth_a_thread = 1 << 17;

inline void check_table(const Tensor& table) {
  STD_TORCH_CHECK(
      table.is_cpu() && table.dim() == 1 && table.scalar_type() == ScalarType::Int && table.is_contiguous(),
      "the partition table of a CPU op must be a contiguous 1-d int32 tensor on the CPU, got sizes ",
      sizes_text(table));
  check_memory("the partition table", table);
}

using KnownPartition = std::shared_ptr<const PartitionView>;

inline KnownPartition read_partition(const Tensor& table, int64_t in_channels, int64_t out_channels) {
  check_table(table);
  std::string wrong;
  const KnownPartition known =
      known_partition(table.const_data_ptr<int32_t>(), table.numel(), in_channels, out_channels, wrong);
  STD_TORCH_CHECK(known, wrong);
  return known;
}

// Of a table that an operation made itself; it begins with its channels.
inline PartitionView parsed(const std::vector<int32_t>& table) {
  PartitionView view;
  const std::string wrong =
      parse_partition(table.data(), static_cast<int64_t>(table.size()), table[0], table[1], view);
  STD_TORCH_CHECK(wrong.empty(), wrong);
  return view;
}

inline void check_weight(const Tensor& weight, const PartitionView& partition) {
  STD_TORCH_CHECK(weight.dim() == 3 && weight.size(0) == partition.entries(),
                  "the packed weight must have sizes [", partition.entries(), ", kh, kw], got ",
                  sizes_text(weight));
}

// The weight of even groups may also come as nn.Conv2d has it, [outputs, inputs of a group, kh, kw]: the same memory,
// and a small call from Python is spared the view of it.
inline void check_weight_or_grouped(const Tensor& weight, const PartitionView& partition) {
  if (weight.dim() != 4) return check_weight(weight, partition);
  const int64_t groups = partition.groups, reads = partition.inputs.offsets[groups];
  const bool even =
      partition.most_inputs * groups == reads && partition.most_outputs * groups == partition.out_channels;
  STD_TORCH_CHECK(even && weight.size(0) == partition.out_channels && weight.size(1) == partition.most_inputs,
                  "a weight of 4 dimensions must be that of even groups, [outputs, inputs of a group, kh, "
                  "kw]; got ",
                  sizes_text(weight), " for ", partition.out_channels, " outputs");
}

// float and double compute in themselves, bfloat16 in float.
template <class Body>
auto for_dtype(const Tensor& tensor, const Body& body) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return body(float{});
    case ScalarType::Double: return body(double{});
    case ScalarType::BFloat16: return body(BFloat16{});
    default: STD_TORCH_CHECK(false, "the CPU kernels take float32, float64 and bfloat16");
  }
}

inline void check_dtype(const Tensor& tensor) {
  for_dtype(tensor, [](auto) {});
}

template <class Stored>
constexpr ScalarType compute_dtype = std::is_same_v<Stored, double> ? ScalarType::Double : ScalarType::Float;

// In the type that is computed in, contiguous; the tensor itself where it already is.
template <class Stored>
Tensor for_compute(const Tensor& tensor) {
  const Tensor typed = tensor.scalar_type() == compute_dtype<Stored>
                           ? tensor
                           : torch::stable::to(tensor, compute_dtype<Stored>);
  return typed.is_contiguous() ? typed : torch::stable::contiguous(typed);
}

// Computes what `problem` says, but for its weight: from this one as it is stored where a kernel can.
template <class Stored>
void convolve_with(const Tensor& weight, cpu::ConvolveProblem<Stored> problem) {
  const auto& kernels = cpu::typed<Stored>(cpu::kernels());
  if (kernels.convolve_stored && weight.is_contiguous()) {
    problem.stored_weight = static_cast<const Stored*>(weight.data_ptr());
    if (kernels.convolve_stored(problem)) return;
  }
  const Tensor computed = for_compute<Stored>(weight);
  problem.weight = static_cast<const cpu::compute_t<Stored>*>(computed.data_ptr());
  kernels.convolve(problem);
}

// A fixed cut of the batch, whatever the number of threads. Where groups are work items of their own and there
// are enough of them, none is needed; a short slice would not pay for its own gradient.
constexpr int64_t enough_groups = 8;
inline int64_t slices_of_batch(int64_t pixels) { return std::clamp<int64_t>(pixels / 256, 1, 4); }

// What one pixel of the source takes in scratch: where it is channels_last, all channels are staged at once.
template <class Stored>
int64_t plane_pixels(const Image<const Stored>& source, int64_t most_sources) {
  const int64_t channels = std::max<int64_t>(source.channels_last() ? source.channels : 1, most_sources);
  return cpu::tile_bytes / static_cast<int64_t>(sizeof(cpu::compute_t<Stored>)) / channels;
}

// Staging a tile may take as many elements as the lattice and its halo have, for every channel and phase;
// beyond what 64 bits count, nothing may start.
inline void check_span(const Sweep& sweep, int64_t channels) {
  int64_t bytes = 64;
  for (const int64_t factor : {std::max<int64_t>(channels, 1), static_cast<int64_t>(sweep.phases.size()) + 1,
                               sweep.rows + sweep.halo_rows + 1, sweep.cols + sweep.halo_cols + 1}) {
    STD_TORCH_CHECK(!__builtin_mul_overflow(bytes, factor, &bytes), "the window spans ",
                    sweep.rows + sweep.halo_rows, "×", sweep.cols + sweep.halo_cols, " pixels of ", channels,
                    " channels, more than can be addressed");
  }
}

// A residual whose images lie as the output's, or a copy of it that does. Images may be further apart: a
// residual is often some of the channels of a larger tensor.
inline Tensor laid_out_like(const Tensor& output, const Tensor& residual) {
  for (int64_t d = 1; d < 4; ++d) {
    if (residual.stride(d) == output.stride(d)) continue;
    const std::array<int64_t, 4> sizes{output.size(0), output.size(1), output.size(2), output.size(3)};
    Tensor copy = empty_image(output, sizes, is_channels_last(output));
    torch::stable::copy_(copy, residual);
    return copy;
  }
  return residual;
}

// Pointwise over flat images: one long row, which needs no staging and can be cut anywhere.
template <class Source, class Dest>
bool collapse(Sweep& sweep, Image<Source>& source, Image<Dest>& dest) {
  if (!sweep.pointwise() || !source.flat() || !dest.flat()) return false;
  if (source.height != dest.height || source.width != dest.width) return false;
  if (sweep.rows != dest.height || sweep.cols != dest.width) return false;
  sweep.make_one_row();
  source = source.as_row();
  dest = dest.as_row();
  return true;
}

// A pointwise convolution of images that are single rows.
inline Sweep one_row(int64_t pixels) {
  return make_sweep(forward_axis(vertical(Window{}), 1, 1),
                    forward_axis(horizontal(Window{}), pixels, pixels), 1, pixels);
}

inline cpu::Threads threads_for(const PartitionView& partition, const Window& window, int64_t pixels) {
  const int64_t work = partition.entries() * window.area();
  if (work == 0 || pixels < worth_a_thread / work) return {};
  return torch_threads();
}

// What comes before a convolution, one number per input channel: without a scale it is 1, without a shift 0.
struct PrologueTensors {
  std::optional<Tensor> scale, shift;
  bool relu = false;
};

// The op conv2d, of what a prologue makes of the input; null: of the input itself. `keeper`: of the weight, or null.
Tensor conv2d_after(const PrologueTensors* prologue, cpu::WeightKeeper* keeper, const Tensor& input,
                    const Tensor& weight, const std::optional<Tensor>& bias,
                    const std::optional<Tensor>& residual, const Tensor& table, int64_t out_channels,
                    int64_t stride_h, int64_t stride_w, int64_t pad_top, int64_t pad_bottom, int64_t pad_left,
                    int64_t pad_right, int64_t dilation_h, int64_t dilation_w, int64_t activation);

Tensor conv2d_input_grad(const Tensor& grad, const Tensor& weight, const Tensor& table, int64_t in_channels,
                         int64_t height, int64_t width, int64_t stride_h, int64_t stride_w, int64_t pad_top,
                         int64_t pad_bottom, int64_t pad_left, int64_t pad_right, int64_t dilation_h,
                         int64_t dilation_w, bool channels_last);

Tensor conv2d_weight_grad(const Tensor& grad, const Tensor& input, const Tensor& table, int64_t entries,
                          int64_t kernel_h, int64_t kernel_w, int64_t stride_h, int64_t stride_w,
                          int64_t pad_top, int64_t pad_bottom, int64_t pad_left, int64_t pad_right,
                          int64_t dilation_h, int64_t dilation_w);

Tensor conv2d_weight_grad_after(const PrologueTensors* prologue, const Tensor& grad, const Tensor& input,
                                const Tensor& table, int64_t entries, int64_t kernel_h, int64_t kernel_w,
                                int64_t stride_h, int64_t stride_w, int64_t pad_top, int64_t pad_bottom,
                                int64_t pad_left, int64_t pad_right, int64_t dilation_h, int64_t dilation_w);

}  // namespace groupconv::ops
