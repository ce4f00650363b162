// The backward pass of a convolution as one op, and the gradients of a prologue, on a CUDA device: what was
// clamped is undone while the bias gets its sums, then the gradients that are asked for are made.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "torch/cuda_device.h"

namespace groupconv::ops::on_cuda {
namespace {

using Gradients = std::tuple<Tensor, Tensor, Tensor>;

// The gradient of the sum under the clamp (grad itself without one); fills bias_grad where it is not empty.
Tensor undo_epilogue(const Tensor& grad, const std::optional<Tensor>& output, Activation activation,
                     const Tensor& bias_grad, cudaStream_t stream) {
  const bool want_bias = bias_grad.numel() > 0;
  if (!output && !want_bias) return grad;
  const Tensor unclamped = output ? empty_image(grad, sizes_of(grad), is_channels_last(grad)) : grad;
  cuda::EpilogueGradProblem problem;
  problem.grad = image_of<const void>(grad);
  if (output) {
    problem.output = image_of<const void>(*output);
    problem.unclamped = image_of<void>(unclamped);
  }
  problem.activation = activation;
  problem.slices = cuda::channel_slices(grad.size(0) * grad.size(2) * grad.size(3), grad.size(1));
  const Tensor partial =
      scratch(grad, want_bias ? problem.slices * cuda::channel_sums * grad.size(1) : 0, sum_type(grad));
  if (want_bias) {
    problem.bias_grad = bias_grad.data_ptr();
    problem.partial = partial.data_ptr();
  }
  check_launch(cuda::run_epilogue_grad(element_of(grad), problem, stream));
  return unclamped;
}

Gradients conv2d_backward(const Tensor& grad, const std::optional<Tensor>& output, const Tensor& input,
                          const Tensor& weight, const Tensor& table, int64_t stride_h, int64_t stride_w,
                          int64_t pad_top, int64_t pad_bottom, int64_t pad_left, int64_t pad_right,
                          int64_t dilation_h, int64_t dilation_w, int64_t activation, bool want_input,
                          bool want_weight, bool want_bias) {
  check_image("grad", grad);
  check_like("grad", grad, "input", input);
  const Groups groups = tabled_groups(table, input, grad.size(1), weight);
  const Window window =
      window_of(weight, stride_h, stride_w, pad_top, pad_bottom, pad_left, pad_right, dilation_h, dilation_w);
  check_sizes("grad", grad, output_sizes(window, input.size(0), grad.size(1), input.size(2), input.size(3)));
  const Activation clamp = make_activation(activation);
  STD_TORCH_CHECK(is_clamp(clamp), "activation is ", activation,
                  "; only of 0 (none), 1 (relu) and 2 (relu6) the derivative shows in the output");
  STD_TORCH_CHECK(output.has_value() == (clamp != Activation::none),
                  "output is needed with an activation, and only then");
  if (output) {
    check_image("output", *output);
    check_like("output", *output, "input", input);
    check_sizes("output", *output, sizes_of(grad));
  }
  element_of(input);  // or an error

  const OnDevice device(input);
  Tensor input_grad = torch::stable::new_empty(input, {0}),
         weight_grad = torch::stable::new_empty(input, {0});
  Tensor bias_grad = torch::stable::new_empty(input, {want_bias ? grad.size(1) : 0});
  if (want_bias && grad.numel() == 0) torch::stable::zero_(bias_grad);
  const Tensor unclamped =
      grad.numel() > 0 ? undo_epilogue(grad, output, clamp, bias_grad, device.stream()) : grad;
  if (want_input) {
    input_grad = convolve_input_grad(unclamped, weight, groups, window, input.size(2), input.size(3),
                                     is_channels_last(input));
  }
  if (want_weight) weight_grad = convolve_weight_grad(nullptr, unclamped, input, groups, window);
  return {input_grad, weight_grad, bias_grad};
}

// ---- with a prologue -------------------------------------------------------------------------------

Tensor prologue_conv2d(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias,
                       const std::optional<Tensor>& residual, const std::optional<Tensor>& scale,
                       const std::optional<Tensor>& shift, bool relu, const Tensor& table,
                       int64_t out_channels, int64_t stride_h, int64_t stride_w, int64_t pad_top,
                       int64_t pad_bottom, int64_t pad_left, int64_t pad_right, int64_t dilation_h,
                       int64_t dilation_w, int64_t activation) {
  const PrologueTensors prologue{scale, shift, relu};
  return convolve(
      &prologue, input, weight, bias, residual, tabled_groups(table, input, out_channels, weight),
      window_of(weight, stride_h, stride_w, pad_top, pad_bottom, pad_left, pad_right, dilation_h, dilation_w),
      activation);
}

Tensor prologue_conv2d_weight_grad(const Tensor& grad, const Tensor& input,
                                   const std::optional<Tensor>& scale, const std::optional<Tensor>& shift,
                                   bool relu, const Tensor& table, int64_t entries, int64_t kernel_h,
                                   int64_t kernel_w, int64_t stride_h, int64_t stride_w, int64_t pad_top,
                                   int64_t pad_bottom, int64_t pad_left, int64_t pad_right,
                                   int64_t dilation_h, int64_t dilation_w) {
  const PrologueTensors prologue{scale, shift, relu};
  check_image("grad", grad);
  check_image("input", input);
  STD_TORCH_CHECK(entries >= 0, "entries must not be negative, got ", entries);
  return convolve_weight_grad(&prologue, grad, input,
                              {plan_problem(table, input, input.size(1), grad.size(1), entries)},
                              make_window(kernel_h, kernel_w, stride_h, stride_w, pad_top, pad_bottom,
                                          pad_left, pad_right, dilation_h, dilation_w));
}

Gradients prologue_conv2d_input_grad(const Tensor& grad, const Tensor& weight, const Tensor& input,
                                     const std::optional<Tensor>& scale, const std::optional<Tensor>& shift,
                                     bool relu, const Tensor& table, int64_t stride_h, int64_t stride_w,
                                     int64_t pad_top, int64_t pad_bottom, int64_t pad_left, int64_t pad_right,
                                     int64_t dilation_h, int64_t dilation_w) {
  const PrologueTensors prologue{scale, shift, relu};
  check_image("input", input);
  check_like("grad", grad, "input", input);
  check_prologue(prologue, input);
  STD_TORCH_CHECK(grad.dim() == 4 && grad.size(0) == input.size(0), "grad has sizes ", sizes_text(grad),
                  ", expected as many images as input, ", input.size(0));
  const Tensor input_grad = convolve_input_grad(
      grad, weight, tabled_groups(table, input, grad.size(1), weight),
      window_of(weight, stride_h, stride_w, pad_top, pad_bottom, pad_left, pad_right, dilation_h, dilation_w),
      input.size(2), input.size(3), is_channels_last(input));

  const OnDevice device(input);
  const int64_t channels = input.size(1);
  Tensor scale_grad = torch::stable::new_zeros(input, {channels}, sum_type(input));
  Tensor shift_grad = torch::stable::new_zeros(input, {channels}, sum_type(input));
  if (input.numel() == 0) return {input_grad, scale_grad, shift_grad};
  const TypedPrologue before(&prologue, input);
  cuda::PrologueGradProblem problem;
  problem.slices = cuda::channel_slices(input.size(0) * input.size(2) * input.size(3), channels);
  const Tensor partial = scratch(input, problem.slices * cuda::channel_sums * channels, sum_type(input));
  problem.input = image_of<const void>(input);
  problem.grad = image_of<void>(input_grad);
  problem.before = before.view();
  problem.scale_grad = scale_grad.data_ptr();
  problem.shift_grad = shift_grad.data_ptr();
  problem.partial = partial.data_ptr();
  check_launch(cuda::run_prologue_grad(element_of(input), problem, device.stream()));
  return {input_grad, scale_grad, shift_grad};
}

}  // namespace
}  // namespace groupconv::ops::on_cuda

STABLE_TORCH_LIBRARY_IMPL(groupconv, GROUPCONV_CUDA_KEY, m) {
  m.impl("conv2d_backward", TORCH_BOX(&groupconv::ops::on_cuda::conv2d_backward));
  m.impl("prologue_conv2d", TORCH_BOX(&groupconv::ops::on_cuda::prologue_conv2d));
  m.impl("prologue_conv2d_input_grad", TORCH_BOX(&groupconv::ops::on_cuda::prologue_conv2d_input_grad));
  m.impl("prologue_conv2d_weight_grad", TORCH_BOX(&groupconv::ops::on_cuda::prologue_conv2d_weight_grad));
}
