// The ops on the CPU: check, allocate, describe the problem, call the kernels.
#include "torch/cpu_ops.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <tuple>
#include <utility>
#include <vector>

#include "core/numeric.h"
#include "core/partition.h"
#include "core/sweep.h"
#include "cpu/dispatch.h"
#include "torch/kept_weights.h"
#include "torch/prologue.h"
#include "torch/threads.h"

namespace groupconv::ops {
namespace {

// The part of an image that a sweep visits, as an image that it visits all of.
template <class Element>
Image<Element> crop_to(Sweep& sweep, const Image<Element>& image) {
  const Image<Element> part =
      image.crop(sweep.dest_origin_h, sweep.dest_origin_w, (sweep.rows - 1) * sweep.dest_step_h + 1,
                 (sweep.cols - 1) * sweep.dest_step_w + 1);
  sweep.dest_origin_h = sweep.dest_origin_w = 0;
  return part;
}

bool any_padded(const std::vector<Axis>& rows, const std::vector<Axis>& cols) {
  const auto padded = [](const Axis& axis) { return axis.padded(); };
  return std::any_of(rows.begin(), rows.end(), padded) || std::any_of(cols.begin(), cols.end(), padded);
}

int64_t positions(const std::vector<Axis>& axes) {
  int64_t sum = 0;
  for (const Axis& axis : axes) sum += axis.count;
  return sum;
}

}  // namespace

Tensor conv2d_after(const PrologueTensors* prologue, cpu::WeightKeeper* keeper, const Tensor& input,
                    const Tensor& weight, const std::optional<Tensor>& bias,
                    const std::optional<Tensor>& residual, const Tensor& table, int64_t out_channels,
                    int64_t stride_h, int64_t stride_w, int64_t pad_top, int64_t pad_bottom, int64_t pad_left,
                    int64_t pad_right, int64_t dilation_h, int64_t dilation_w, int64_t activation) {
  check_image("input", input);
  const KnownPartition known = read_partition(table, input.size(1), out_channels);
  const PartitionView& partition = *known;
  check_weight_or_grouped(weight, partition);
  check_like("weight", weight, "input", input);
  const int64_t rank = weight.dim();
  const Window window = make_window(weight.size(rank - 2), weight.size(rank - 1), stride_h, stride_w, pad_top,
                                    pad_bottom, pad_left, pad_right, dilation_h, dilation_w);
  const auto sizes =
      output_sizes(window, input.size(0), partition.out_channels, input.size(2), input.size(3));
  const Activation activate = make_activation(activation);
  check_bias("bias", bias, input, partition.out_channels);
  check_residual(residual, input, sizes);
  check_dtype(input);
  if (prologue) check_prologue(*prologue, input);

  const bool channels_last = is_channels_last(input);
  Tensor output = empty_image(input, sizes, channels_last);
  const Tensor added = residual ? laid_out_like(output, *residual) : output;
  if (output.numel() == 0) return output;

  for_dtype(input, [&](auto element) {
    using Stored = decltype(element);
    using Compute = cpu::compute_t<Stored>;
    const Tensor typed_bias = bias ? for_compute<Stored>(*bias) : weight;
    const TypedPrologue<Stored> before(prologue, input);
    cpu::ConvolveProblem<Stored> problem;
    problem.source = image_of<const Stored>(input);
    problem.prologue = before.view();
    problem.dest = image_of<Stored>(output);
    if (residual) problem.residual = image_of<const Stored>(added);
    if (bias) problem.bias = static_cast<const Compute*>(typed_bias.data_ptr());
    problem.partition = &partition;
    problem.keeper = keeper;
    problem.window_area = window.area();
    problem.activation = activate;
    problem.threads = threads_for(partition, window, sizes[0] * sizes[2] * sizes[3]);
    // Without weights every window gives the same, nothing.
    const Window used = partition.entries() > 0 ? window : Window{};
    Sweep sweep = make_sweep(forward_axis(vertical(used), input.size(2), sizes[2]),
                             forward_axis(horizontal(used), input.size(3), sizes[3]), used.kernel_w,
                             plane_pixels(problem.source, partition.most_inputs));
    check_span(sweep, partition.in_channels + partition.out_channels);
    problem.sweep = &sweep;
    if (collapse(sweep, problem.source, problem.dest) && residual)
      problem.residual = problem.residual.as_row();
    convolve_with(weight, problem);
  });
  return output;
}

Tensor conv2d_input_grad(const Tensor& grad, const Tensor& weight, const Tensor& table, int64_t in_channels,
                         int64_t height, int64_t width, int64_t stride_h, int64_t stride_w, int64_t pad_top,
                         int64_t pad_bottom, int64_t pad_left, int64_t pad_right, int64_t dilation_h,
                         int64_t dilation_w, bool channels_last) {
  check_image("grad", grad);
  const KnownPartition known = read_partition(table, in_channels, grad.size(1));
  const PartitionView& partition = *known;
  check_weight(weight, partition);
  check_like("weight", weight, "grad", grad);
  check_side("height", height);
  check_side("width", width);
  const Window window = make_window(weight.size(1), weight.size(2), stride_h, stride_w, pad_top, pad_bottom,
                                    pad_left, pad_right, dilation_h, dilation_w);
  check_sizes("grad", grad, output_sizes(window, grad.size(0), partition.out_channels, height, width));

  const std::array<int64_t, 4> input_sizes{grad.size(0), partition.in_channels, height, width};
  check_countable("an input", input_sizes);
  check_dtype(grad);

  Tensor input_grad = empty_image(grad, input_sizes, channels_last);
  if (input_grad.numel() == 0) return input_grad;
  if (partition.entries() == 0) {
    torch::stable::zero_(input_grad);
    return input_grad;
  }

  for_dtype(grad, [&](auto element) {
    using Stored = decltype(element);
    const Tensor typed_weight = for_compute<Stored>(weight);
    const auto* weights = static_cast<const cpu::compute_t<Stored>*>(typed_weight.data_ptr());
    cpu::ConvolveProblem<Stored> problem;
    problem.source = image_of<const Stored>(grad);
    problem.weight = weights;
    problem.partition = &partition;
    problem.transposed = true;
    problem.window_area = window.area();

    auto rows = input_grad_axes(vertical(window), height, grad.size(2));
    auto cols = input_grad_axes(horizontal(window), width, grad.size(3));
    // No product meets the padding; where a weight is infinite, its product with a staged zero would show.
    const bool in_parts = any_padded(rows, cols) && !all_finite(weights, partition.entries() * window.area());
    if (in_parts) {
      rows = without_padding(rows);
      cols = without_padding(cols);
    }
    // A driver writes the pixels that its sweep visits and the channels that some group reads.
    if (positions(rows) < height || positions(cols) < width || !partition.inputs_complete) {
      torch::stable::zero_(input_grad);
    }
    const int64_t pixels = plane_pixels(problem.source, partition.most_outputs);
    for (const Axis& down : rows) {
      for (const Axis& right : cols) {
        Sweep sweep = make_sweep(down, right, window.kernel_w, pixels);
        check_span(sweep, partition.in_channels + partition.out_channels);
        cpu::ConvolveProblem<Stored> part = problem;
        part.dest = image_of<Stored>(input_grad);
        if (in_parts) part.dest = crop_to(sweep, part.dest);
        part.sweep = &sweep;
        part.threads = threads_for(partition, window, grad.size(0) * sweep.rows * sweep.cols);
        collapse(sweep, part.source, part.dest);
        cpu::typed<Stored>(cpu::kernels()).convolve(part);
      }
    }
  });
  return input_grad;
}

Tensor conv2d_weight_grad(const Tensor& grad, const Tensor& input, const Tensor& table, int64_t entries,
                          int64_t kernel_h, int64_t kernel_w, int64_t stride_h, int64_t stride_w,
                          int64_t pad_top, int64_t pad_bottom, int64_t pad_left, int64_t pad_right,
                          int64_t dilation_h, int64_t dilation_w) {
  return conv2d_weight_grad_after(nullptr, grad, input, table, entries, kernel_h, kernel_w, stride_h,
                                  stride_w, pad_top, pad_bottom, pad_left, pad_right, dilation_h, dilation_w);
}

Tensor conv2d_weight_grad_after(const PrologueTensors* prologue, const Tensor& grad, const Tensor& input,
                                const Tensor& table, int64_t entries, int64_t kernel_h, int64_t kernel_w,
                                int64_t stride_h, int64_t stride_w, int64_t pad_top, int64_t pad_bottom,
                                int64_t pad_left, int64_t pad_right, int64_t dilation_h, int64_t dilation_w) {
  check_image("grad", grad);
  check_image("input", input);
  check_like("grad", grad, "input", input);
  const KnownPartition known = read_partition(table, input.size(1), grad.size(1));
  const PartitionView& partition = *known;
  STD_TORCH_CHECK(entries == partition.entries(), "entries is ", entries, ", the partition table says ",
                  partition.entries());
  const Window window = make_window(kernel_h, kernel_w, stride_h, stride_w, pad_top, pad_bottom, pad_left,
                                    pad_right, dilation_h, dilation_w);
  check_sizes("grad", grad,
              output_sizes(window, input.size(0), partition.out_channels, input.size(2), input.size(3)));

  check_dtype(input);
  if (prologue) check_prologue(*prologue, input);

  return for_dtype(input, [&](auto element) {
    using Stored = decltype(element);
    using Compute = cpu::compute_t<Stored>;
    const TypedPrologue<Stored> before(prologue, input);
    cpu::WeightGradProblem<Stored> problem;
    problem.input = image_of<const Stored>(input);
    problem.prologue = before.view();
    problem.grad = image_of<const Stored>(grad);
    const int64_t pixels = grad.size(0) * grad.size(2) * grad.size(3);
    const bool rows_of_pixels = !problem.grad.channels_last() && !problem.input.channels_last();
    const bool by_group = rows_of_pixels && partition.groups >= enough_groups;
    // One large 1×1 block is cut by its columns, in channels_last if it is no less efficient that way.
    const int64_t map = problem.grad.height * problem.grad.width;
    const bool large = !(problem.grad.channels_last() && problem.input.channels_last())
                           ? partition.entries() >= 1 << 12
                           : partition.in_channels >= 64 && partition.out_channels >= 64 && map >= 32;
    const bool by_column = large && partition.groups == 1 && window.area() == 1 &&
                           problem.input.height == problem.grad.height &&
                           problem.input.width == problem.grad.width;
    const int64_t slices = by_group || by_column ? 1 : slices_of_batch(pixels);
    Tensor total =
        torch::stable::new_zeros(input, {partition.entries(), kernel_h, kernel_w}, compute_dtype<Stored>);
    const int64_t size = partition.entries() * window.area();
    if (grad.numel() > 0 && size > 0) {
      problem.weight_grad = static_cast<Compute*>(total.data_ptr());
      problem.slices = slices;
      problem.partition = &partition;
      problem.window_area = window.area();
      problem.threads = threads_for(partition, window, pixels);
      const int64_t staged = plane_pixels(problem.input, partition.most_inputs);
      const auto add = [&](const Axis& down, const Axis& right, bool is_part) {
        Sweep sweep = make_sweep(down, right, window.kernel_w, staged);
        check_span(sweep, partition.in_channels + partition.out_channels);
        cpu::WeightGradProblem<Stored> part = problem;
        if (is_part) part.grad = crop_to(sweep, part.grad);
        part.sweep = &sweep;
        part.whole = !is_part;
        collapse(sweep, part.input, part.grad);
        cpu::typed<Stored>(cpu::kernels()).weight_grad(part);
      };
      const std::vector<Axis> rows{forward_axis(vertical(window), input.size(2), grad.size(2))};
      const std::vector<Axis> cols{forward_axis(horizontal(window), input.size(3), grad.size(3))};
      add(rows[0], cols[0], false);
      // A NaN may come from an infinite gradient and a staged zero: then once more, without padding.
      if (any_padded(rows, cols) && !all_finite(problem.weight_grad, size)) {
        torch::stable::zero_(total);
        for (const Axis& down : without_padding(rows)) {
          for (const Axis& right : without_padding(cols)) add(down, right, true);
        }
      }
    }
    return std::is_same_v<Stored, Compute> ? total : torch::stable::to(total, ScalarType::BFloat16);
  });
}

namespace {

Tensor conv2d(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias,
              const std::optional<Tensor>& residual, const Tensor& table, int64_t out_channels,
              int64_t stride_h, int64_t stride_w, int64_t pad_top, int64_t pad_bottom, int64_t pad_left,
              int64_t pad_right, int64_t dilation_h, int64_t dilation_w, int64_t activation) {
  TensorKeeper keeper(weight);
  return conv2d_after(nullptr, keeper.if_allowed(), input, weight, bias, residual, table, out_channels,
                      stride_h, stride_w, pad_top, pad_bottom, pad_left, pad_right, dilation_h, dilation_w,
                      activation);
}

double fma_peak(double seconds, bool bfloat16) {
  const cpu::KernelTable& table = cpu::kernels();
  return bfloat16 ? table.bf16_peak(seconds) : table.f32_peak(seconds);
}

}  // namespace
}  // namespace groupconv::ops

STABLE_TORCH_LIBRARY_IMPL(groupconv, CPU, m) {
  m.impl("conv2d", TORCH_BOX(&groupconv::ops::conv2d));
  m.impl("conv2d_input_grad", TORCH_BOX(&groupconv::ops::conv2d_input_grad));
  m.impl("conv2d_weight_grad", TORCH_BOX(&groupconv::ops::conv2d_weight_grad));
}

STABLE_TORCH_LIBRARY_IMPL(groupconv, CompositeExplicitAutograd, m) {
  m.impl("fma_peak", TORCH_BOX(&groupconv::ops::fma_peak));
}
