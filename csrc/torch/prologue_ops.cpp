// The ops on convolutions with a prologue, x' = act(x · scale + shift), on the CPU.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "torch/kept_weights.h"
#include "torch/prologue.h"

namespace groupconv::ops {
namespace {

Tensor prologue_conv2d(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias,
                       const std::optional<Tensor>& residual, const std::optional<Tensor>& scale,
                       const std::optional<Tensor>& shift, bool relu, const Tensor& table,
                       int64_t out_channels, int64_t stride_h, int64_t stride_w, int64_t pad_top,
                       int64_t pad_bottom, int64_t pad_left, int64_t pad_right, int64_t dilation_h,
                       int64_t dilation_w, int64_t activation) {
  const PrologueTensors prologue{scale, shift, relu};
  TensorKeeper keeper(weight);
  return conv2d_after(&prologue, keeper.if_allowed(), input, weight, bias, residual, table, out_channels,
                      stride_h, stride_w, pad_top, pad_bottom, pad_left, pad_right, dilation_h, dilation_w,
                      activation);
}

Tensor prologue_conv2d_weight_grad(const Tensor& grad, const Tensor& input,
                                   const std::optional<Tensor>& scale, const std::optional<Tensor>& shift,
                                   bool relu, const Tensor& table, int64_t entries, int64_t kernel_h,
                                   int64_t kernel_w, int64_t stride_h, int64_t stride_w, int64_t pad_top,
                                   int64_t pad_bottom, int64_t pad_left, int64_t pad_right,
                                   int64_t dilation_h, int64_t dilation_w) {
  const PrologueTensors prologue{scale, shift, relu};
  return conv2d_weight_grad_after(&prologue, grad, input, table, entries, kernel_h, kernel_w, stride_h,
                                  stride_w, pad_top, pad_bottom, pad_left, pad_right, dilation_h, dilation_w);
}

// A fixed cut of the images, whatever the number of threads: each part makes sums of its own.
int64_t slices_of(const Tensor& input) {
  constexpr int64_t elements_of_a_slice = 1 << 16, most = 8;
  return std::clamp<int64_t>(input.numel() / elements_of_a_slice, 1, most);
}

// What `slices` holds along its first dimension, added up in order, in the first of them or in memory of its own.
template <class Compute>
Tensor sum_of_slices(const Tensor& slices) {
  Compute* sums = static_cast<Compute*>(slices.data_ptr());
  const int64_t slice_count = slices.size(0), count = slices.numel() / slice_count;
  for (int64_t slice = 1; slice < slice_count; ++slice) {
    for (int64_t i = 0; i < count; ++i) sums[i] += sums[slice * count + i];
  }
  const Tensor total = torch::stable::select(slices, 0, 0);
  return slice_count == 1 ? total : torch::stable::clone(total);
}

// Below this many elements waking a thread costs more than it saves.
constexpr int64_t worth_threads = 1 << 16;

std::tuple<Tensor, Tensor, Tensor> prologue_conv2d_input_grad(
    const Tensor& grad, const Tensor& weight, const Tensor& input, const std::optional<Tensor>& scale,
    const std::optional<Tensor>& shift, bool relu, const Tensor& table, int64_t stride_h, int64_t stride_w,
    int64_t pad_top, int64_t pad_bottom, int64_t pad_left, int64_t pad_right, int64_t dilation_h,
    int64_t dilation_w) {
  const PrologueTensors prologue{scale, shift, relu};
  check_image("input", input);
  check_like("grad", grad, "input", input);
  check_dtype(input);
  check_prologue(prologue, input);
  STD_TORCH_CHECK(grad.dim() == 4 && grad.size(0) == input.size(0), "grad has sizes ", sizes_text(grad),
                  ", expected as many images as input, ", input.size(0));
  const Tensor input_grad = conv2d_input_grad(
      grad, weight, table, input.size(1), input.size(2), input.size(3), stride_h, stride_w, pad_top,
      pad_bottom, pad_left, pad_right, dilation_h, dilation_w, is_channels_last(input));

  return for_dtype(input, [&](auto element) {
    using Stored = decltype(element);
    using Compute = cpu::compute_t<Stored>;
    const int64_t slices = slices_of(input), channels = input.size(1);
    const Tensor scale_grad = torch::stable::new_zeros(input, {slices, channels}, compute_dtype<Stored>);
    const Tensor shift_grad = torch::stable::new_zeros(input, {slices, channels}, compute_dtype<Stored>);
    if (input.numel() > 0) {
      const TypedPrologue<Stored> before(&prologue, input);
      cpu::PrologueGradProblem<Stored> problem;
      problem.input = image_of<const Stored>(input);
      problem.grad = image_of<Stored>(input_grad);
      problem.prologue = before.view();
      problem.scale_grad = static_cast<Compute*>(scale_grad.data_ptr());
      problem.shift_grad = static_cast<Compute*>(shift_grad.data_ptr());
      problem.slices = slices;
      if (input.numel() >= worth_threads) problem.threads = torch_threads();
      cpu::typed<Stored>(cpu::kernels()).prologue_grad(problem);
    }
    return std::tuple{input_grad, sum_of_slices<Compute>(scale_grad), sum_of_slices<Compute>(shift_grad)};
  });
}

}  // namespace
}  // namespace groupconv::ops

STABLE_TORCH_LIBRARY_IMPL(groupconv, CPU, m) {
  m.impl("prologue_conv2d", TORCH_BOX(&groupconv::ops::prologue_conv2d));
  m.impl("prologue_conv2d_input_grad", TORCH_BOX(&groupconv::ops::prologue_conv2d_input_grad));
  m.impl("prologue_conv2d_weight_grad", TORCH_BOX(&groupconv::ops::prologue_conv2d_weight_grad));
}
