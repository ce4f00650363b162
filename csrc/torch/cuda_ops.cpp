// The ops on a CUDA device: check, allocate, describe the problem, launch on the caller's stream.
//
// Everything here must load where there is no CUDA: the runtime is linked statically, and what only a
// CUDA build of torch has is looked up by name when it is first used.
#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include "cuda/launch.h"
#include "torch/arguments.h"

namespace groupconv::ops {
namespace {

cudaStream_t current_stream(int32_t device) {
  using GetStream = AOTITorchError(int32_t device, void** stream);
  static GetStream* const get_stream = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_NOW | RTLD_NOLOAD);
    void* symbol = dlsym(library ? library : RTLD_DEFAULT, "aoti_torch_get_current_cuda_stream");
    return reinterpret_cast<GetStream*>(symbol);
  }();
  STD_TORCH_CHECK(get_stream, "this build of torch offers no current CUDA stream");
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(get_stream(device, &stream));
  return static_cast<cudaStream_t>(stream);
}

cuda::Element element_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return cuda::Element::f32;
    case ScalarType::Double: return cuda::Element::f64;
    case ScalarType::Half: return cuda::Element::f16;
    case ScalarType::BFloat16: return cuda::Element::bf16;
    default: STD_TORCH_CHECK(false, "the CUDA kernels take float32, float64, float16 and bfloat16");
  }
}

Tensor packed(const Tensor& tensor) {
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

Tensor conv2d(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias,
              const std::optional<Tensor>& residual, const Tensor& table, int64_t out_channels,
              int64_t stride_h, int64_t stride_w, int64_t pad_top, int64_t pad_bottom, int64_t pad_left,
              int64_t pad_right, int64_t dilation_h, int64_t dilation_w, int64_t activation) {
  check_image("input", input);
  check_like("weight", weight, "input", input);
  STD_TORCH_CHECK(weight.dim() == 3, "the packed weight must have sizes [entries, kh, kw], got ",
                  sizes_text(weight));
  check_setting("out_channels", out_channels, 0);
  STD_TORCH_CHECK(table.is_cuda() && table.get_device_index() == input.get_device_index() &&
                      table.dim() == 1 && table.scalar_type() == ScalarType::Int && table.is_contiguous() &&
                      table.numel() >= cuda::shortest_table(out_channels),
                  "the partition table must be a contiguous 1-d int32 tensor of at least ",
                  cuda::shortest_table(out_channels), " entries on the input's device, got sizes ",
                  sizes_text(table));
  check_memory("the partition table", table);
  const Window window = make_window(weight.size(1), weight.size(2), stride_h, stride_w, pad_top, pad_bottom,
                                    pad_left, pad_right, dilation_h, dilation_w);
  const auto sizes = output_sizes(window, input.size(0), out_channels, input.size(2), input.size(3));
  if (bias) {
    check_like("bias", *bias, "input", input);
    STD_TORCH_CHECK(bias->dim() == 1 && bias->size(0) == out_channels, "bias must have sizes [", out_channels,
                    "], got ", sizes_text(*bias));
  }
  if (residual) {
    check_image("residual", *residual);
    check_like("residual", *residual, "input", input);
    check_sizes("residual", *residual, sizes);
  }
  const cuda::Element element = element_of(input);
  cuda::Conv2dForward problem;
  problem.activation = make_activation(activation);

  const int32_t device = input.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  Tensor output = empty_image(input, sizes, is_channels_last(input));
  if (output.numel() == 0) return output;

  const Tensor packed_weight = packed(weight);
  const Tensor packed_bias = bias ? packed(*bias) : packed_weight;
  // Freed on return, before the kernels have run: the allocator gives it to later work of this stream only.
  const Tensor plan =
      torch::stable::new_empty(input, {cuda::plan_words(table.numel(), out_channels)}, ScalarType::Long);
  problem.input = image_of<const void>(input);
  problem.output = image_of<void>(output);
  if (residual) problem.residual = image_of<const void>(*residual);
  problem.weight = packed_weight.data_ptr();
  if (bias) problem.bias = packed_bias.data_ptr();
  problem.entries = weight.size(0);
  problem.window = window;
  problem.table = static_cast<const int32_t*>(table.data_ptr());
  problem.table_length = table.numel();
  problem.plan = static_cast<int64_t*>(plan.data_ptr());
  const cudaError_t error = cuda::conv2d_forward(element, problem, device, current_stream(device));
  STD_TORCH_CHECK(error == cudaSuccess,
                  "the CUDA convolution could not be launched: ", cudaGetErrorString(error));
  return output;
}

}  // namespace
}  // namespace groupconv::ops

STABLE_TORCH_LIBRARY_IMPL(groupconv, CUDA, m) { m.impl("conv2d", TORCH_BOX(&groupconv::ops::conv2d)); }
