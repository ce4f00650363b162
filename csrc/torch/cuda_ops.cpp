// The convolution, its two gradients and the two-level convolution on a CUDA device: check, allocate, describe
// the problem, launch on the caller's stream.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "torch/cuda_device.h"

namespace groupconv::ops::on_cuda {

void check_prologue(const PrologueTensors& prologue, const Tensor& input) {
  const auto check = [&](const char* name, const std::optional<Tensor>& tensor) {
    if (!tensor) return;
    check_memory(name, *tensor);
    STD_TORCH_CHECK(tensor->dim() == 1 && tensor->size(0) == input.size(1), name, " must have sizes [",
                    input.size(1), "], got ", sizes_text(*tensor));
    STD_TORCH_CHECK(on_device_of(*tensor, input), name, " is on another device than input");
    STD_TORCH_CHECK(tensor->scalar_type() == input.scalar_type() || tensor->scalar_type() == sum_type(input),
                    name, " has neither input's dtype nor the one that is computed in");
  };
  check("scale", prologue.scale);
  check("shift", prologue.shift);
}

TypedPrologue::TypedPrologue(const PrologueTensors* prologue, const Tensor& input) {
  if (!prologue) return;
  const auto prepare = [&](const std::optional<Tensor>& given, double otherwise) {
    if (given) return packed(torch::stable::to(*given, sum_type(input)));
    Tensor filled = scratch(input, input.size(1), sum_type(input));
    return torch::stable::fill_(filled, otherwise);
  };
  scale_ = prepare(prologue->scale, 1);
  shift_ = prepare(prologue->shift, 0);
  view_ = {scale_->data_ptr(), shift_->data_ptr(), prologue->relu};
}

namespace {

// Of both images, their batch and the window: what coordinates are made of.
int64_t longest_side(const Image<const void>& one, int64_t height, int64_t width, const Window& w) {
  return std::max({one.batch, one.height, one.width, height, width, w.pad_top + w.reach_h(),
                   w.pad_left + w.reach_w(), w.stride_h, w.stride_w});
}

void run_product(const Tensor& like, const cuda::PlanProblem& partition, cuda::ProductProblem& problem,
                 cudaStream_t stream) {
  const cuda::Element element = element_of(like);
  cuda::Device device;
  check_launch(cuda::describe_device(device));
  problem.partition = partition;
  const cuda::ProductChoice choice = cuda::prefer_whole_pixels(
      element, problem, device,
      cuda::choose_product(
          element, partition, problem.window.area(),
          problem.dest.batch * problem.dest.height * problem.dest.width,
          longest_side(problem.source, problem.dest.height, problem.dest.width, problem.window),
          problem.coarse.data != nullptr));
  const Tensor plan = scratch(like, choice.plan_words, ScalarType::Long);
  problem.partition = choice.partition;
  problem.plan = static_cast<int64_t*>(plan.data_ptr());
  check_launch(cuda::run_product(element, choice, problem, stream));
}

}  // namespace

Tensor convolve(const PrologueTensors* prologue, const Tensor& input, const Tensor& weight,
                const std::optional<Tensor>& bias, const std::optional<Tensor>& residual,
                const Groups& groups, const Window& window, int64_t activation) {
  check_image("input", input);
  check_like("weight", weight, "input", input);
  const cuda::PlanProblem& partition = groups.partition;
  const int64_t out_channels = partition.out_channels;
  const auto sizes = output_sizes(window, input.size(0), out_channels, input.size(2), input.size(3));
  check_bias("bias", bias, input, out_channels);
  check_residual(residual, input, sizes);
  element_of(input);  // or an error
  if (prologue) check_prologue(*prologue, input);
  cuda::ProductProblem problem;
  problem.activation = make_activation(activation);

  const OnDevice device(input);
  Tensor output = empty_image(input, sizes, is_channels_last(input));
  if (output.numel() == 0) return output;

  const Tensor packed_weight = packed(weight);
  const Tensor packed_bias = bias ? packed(*bias) : packed_weight;
  const TypedPrologue before(prologue, input);
  problem.source = image_of<const void>(input);
  problem.dest = image_of<void>(output);
  if (residual) problem.residual = image_of<const void>(*residual);
  problem.weight = packed_weight.data_ptr();
  if (groups.in_labels) problem.dense_columns = partition.in_channels;
  if (bias) problem.bias = packed_bias.data_ptr();
  problem.window = window;
  problem.before = before.view();
  run_product(input, partition, problem, device.stream());
  return output;
}

Tensor convolve_input_grad(const Tensor& grad, const Tensor& weight, const Groups& groups,
                           const Window& window, int64_t height, int64_t width, bool channels_last) {
  check_image("grad", grad);
  check_like("weight", weight, "grad", grad);
  cuda::PlanProblem partition = groups.partition;
  partition.transposed = true;
  check_side("height", height);
  check_side("width", width);
  check_sizes("grad", grad, output_sizes(window, grad.size(0), partition.out_channels, height, width));
  const std::array<int64_t, 4> sizes{grad.size(0), partition.in_channels, height, width};
  check_countable("an input", sizes);
  element_of(grad);  // or an error

  const OnDevice device(grad);
  Tensor input_grad = empty_image(grad, sizes, channels_last);
  if (input_grad.numel() == 0) return input_grad;
  const Tensor packed_weight = packed(weight);
  cuda::ProductProblem problem;
  problem.source = image_of<const void>(grad);
  problem.dest = image_of<void>(input_grad);
  problem.weight = packed_weight.data_ptr();
  if (groups.in_labels) problem.dense_columns = partition.in_channels;
  problem.window = window;
  run_product(grad, partition, problem, device.stream());
  return input_grad;
}

Tensor convolve_weight_grad(const PrologueTensors* prologue, const Tensor& grad, const Tensor& input,
                            const Groups& groups, const Window& window) {
  check_image("grad", grad);
  check_image("input", input);
  check_like("grad", grad, "input", input);
  const cuda::PlanProblem& partition = groups.partition;
  check_sizes("grad", grad,
              output_sizes(window, input.size(0), partition.out_channels, input.size(2), input.size(3)));
  check_countable("a weight", {partition.entries, window.kernel_h, window.kernel_w, 1});
  const cuda::Element element = element_of(input);
  if (prologue) check_prologue(*prologue, input);

  const OnDevice device(input);
  const bool dense = groups.in_labels != nullptr;
  const int64_t rows = dense ? partition.out_channels * partition.in_channels : partition.entries;
  const std::vector<int64_t> sizes =
      dense ? std::vector{partition.out_channels, partition.in_channels, window.kernel_h, window.kernel_w}
            : std::vector{partition.entries, window.kernel_h, window.kernel_w};
  Tensor weight_grad = allocate(rows * window.area() * static_cast<int64_t>(input.element_size()), [&] {
    return torch::stable::new_empty(input, {sizes.data(), sizes.size()});
  });
  if (weight_grad.numel() == 0) return weight_grad;
  const TypedPrologue before(prologue, input);
  const cuda::WeightGradChoice choice =
      cuda::choose_weight_grad(element, partition, window.area(), grad.size(0) * grad.size(2) * grad.size(3),
                               longest_side(image_of<const void>(input), grad.size(2), grad.size(3), window));
  const Tensor plan = scratch(input, choice.plan_words, ScalarType::Long);
  const Tensor partial = scratch(input, choice.slices * weight_grad.numel(), sum_type(input));
  cuda::WeightGradProblem problem;
  problem.grad = image_of<const void>(grad);
  problem.input = image_of<const void>(input);
  problem.weight_grad = weight_grad.data_ptr();
  problem.partial = partial.data_ptr();
  problem.size = weight_grad.numel() / window.area();
  problem.in_labels = groups.in_labels;
  problem.out_labels = groups.out_labels;
  problem.window = window;
  problem.before = before.view();
  problem.plan = static_cast<int64_t*>(plan.data_ptr());
  check_launch(cuda::run_weight_grad(element, choice, problem, device.stream()));
  return weight_grad;
}

namespace {

Tensor conv2d(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias,
              const std::optional<Tensor>& residual, const Tensor& table, int64_t out_channels,
              int64_t stride_h, int64_t stride_w, int64_t pad_top, int64_t pad_bottom, int64_t pad_left,
              int64_t pad_right, int64_t dilation_h, int64_t dilation_w, int64_t activation) {
  return convolve(
      nullptr, input, weight, bias, residual, tabled_groups(table, input, out_channels, weight),
      window_of(weight, stride_h, stride_w, pad_top, pad_bottom, pad_left, pad_right, dilation_h, dilation_w),
      activation);
}

Tensor conv2d_input_grad(const Tensor& grad, const Tensor& weight, const Tensor& table, int64_t in_channels,
                         int64_t height, int64_t width, int64_t stride_h, int64_t stride_w, int64_t pad_top,
                         int64_t pad_bottom, int64_t pad_left, int64_t pad_right, int64_t dilation_h,
                         int64_t dilation_w, bool channels_last) {
  check_image("grad", grad);
  check_packed_weight(weight, grad, "grad");
  return convolve_input_grad(
      grad, weight, {plan_problem(table, grad, in_channels, grad.size(1), weight.size(0))},
      window_of(weight, stride_h, stride_w, pad_top, pad_bottom, pad_left, pad_right, dilation_h, dilation_w),
      height, width, channels_last);
}

Tensor conv2d_weight_grad(const Tensor& grad, const Tensor& input, const Tensor& table, int64_t entries,
                          int64_t kernel_h, int64_t kernel_w, int64_t stride_h, int64_t stride_w,
                          int64_t pad_top, int64_t pad_bottom, int64_t pad_left, int64_t pad_right,
                          int64_t dilation_h, int64_t dilation_w) {
  check_image("grad", grad);
  check_image("input", input);
  STD_TORCH_CHECK(entries >= 0, "entries must not be negative, got ", entries);
  return convolve_weight_grad(nullptr, grad, input,
                              {plan_problem(table, input, input.size(1), grad.size(1), entries)},
                              make_window(kernel_h, kernel_w, stride_h, stride_w, pad_top, pad_bottom,
                                          pad_left, pad_right, dilation_h, dilation_w));
}

// z = R input first; then A's convolution adds coarse · z to its sums before they are rounded.
std::tuple<Tensor, Tensor> two_level(const Tensor& input, const Tensor& weight, const Tensor& restriction,
                                     const Tensor& coarse, const std::optional<Tensor>& bias,
                                     const Tensor& table, int64_t stride_h, int64_t stride_w, int64_t pad_top,
                                     int64_t pad_bottom, int64_t pad_left, int64_t pad_right,
                                     int64_t dilation_h, int64_t dilation_w) {
  check_like("coarse", coarse, "input", input);
  STD_TORCH_CHECK(coarse.dim() == 2, "coarse must have sizes [outputs, groups], got ", sizes_text(coarse));
  const int64_t out_channels = coarse.size(0), groups = coarse.size(1);
  const cuda::PlanProblem within = tabled_groups(table, input, out_channels, weight).partition;
  check_packed_weight(restriction, input, "input", "restriction");
  STD_TORCH_CHECK(restriction.size(1) == weight.size(1) && restriction.size(2) == weight.size(2),
                  "restriction has sizes ", sizes_text(restriction), ", expected windows of ", weight.size(1),
                  "×", weight.size(2));
  check_setting("groups", groups, 0);
  cuda::PlanProblem restrict = within;
  restrict.one_output_each = true;
  restrict.out_channels = groups;
  restrict.length = table.numel() - out_channels + groups;
  restrict.entries = restriction.size(0);
  STD_TORCH_CHECK(restrict.length >= 4 + 2 * (groups + 1) + groups, "the partition table of ", table.numel(),
                  " entries is too short for ", groups, " groups");
  const Window window =
      window_of(weight, stride_h, stride_w, pad_top, pad_bottom, pad_left, pad_right, dilation_h, dilation_w);
  check_bias("bias", bias, input, out_channels);
  const auto sizes = output_sizes(window, input.size(0), out_channels, input.size(2), input.size(3));
  const std::array<int64_t, 4> shared_sizes{sizes[0], groups, sizes[2], sizes[3]};
  check_countable("an output", shared_sizes);
  element_of(input);  // or an error

  const OnDevice device(input);
  Tensor output = empty_image(input, sizes, is_channels_last(input));
  Tensor shared = empty_image(input, shared_sizes, is_channels_last(input));
  const Tensor packed_weight = packed(weight), packed_restriction = packed(restriction);
  const Tensor packed_coarse = packed(coarse), packed_bias = bias ? packed(*bias) : packed_weight;
  cuda::ProductProblem problem;
  problem.source = image_of<const void>(input);
  problem.window = window;
  if (shared.numel() > 0) {
    problem.dest = image_of<void>(shared);
    problem.weight = packed_restriction.data_ptr();
    run_product(input, restrict, problem, device.stream());
    problem.coarse = image_of<const void>(shared);
    problem.coarse_weight = packed_coarse.data_ptr();
  }
  if (output.numel() > 0) {
    problem.dest = image_of<void>(output);
    problem.weight = packed_weight.data_ptr();
    if (bias) problem.bias = packed_bias.data_ptr();
    run_product(input, within, problem, device.stream());
  }
  return {output, shared};
}

void allow_tf32(bool allowed) { cuda::allow_tf32(allowed); }

}  // namespace
}  // namespace groupconv::ops::on_cuda

STABLE_TORCH_LIBRARY_IMPL(groupconv, GROUPCONV_CUDA_KEY, m) {
  m.impl("conv2d", TORCH_BOX(&groupconv::ops::on_cuda::conv2d));
  m.impl("two_level", TORCH_BOX(&groupconv::ops::on_cuda::two_level));
  m.impl("conv2d_input_grad", TORCH_BOX(&groupconv::ops::on_cuda::conv2d_input_grad));
  m.impl("conv2d_weight_grad", TORCH_BOX(&groupconv::ops::on_cuda::conv2d_weight_grad));
}

STABLE_TORCH_LIBRARY_IMPL(groupconv, CompositeExplicitAutograd, m) {
  m.impl("allow_tf32", TORCH_BOX(&groupconv::ops::on_cuda::allow_tf32));
}
