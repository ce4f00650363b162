// Convolutions of uint8 images with int8 weights on the CPU, for inference.
#include <torch/csrc/stable/library.h>

#include <cmath>
#include <limits>

#include "core/quantized_layout.h"
#include "cpu/quantized.h"
#include "torch/cpu_ops.h"

namespace groupconv::ops {
namespace {

void check_zero_point(const char* name, int64_t zero_point) {
  STD_TORCH_CHECK(zero_point >= 0 && zero_point <= 255, name, " must be from 0 to 255, got ", zero_point);
}

void check_scale(const char* name, double scale) {
  STD_TORCH_CHECK(scale > 0.0 && std::isfinite(1.0 / scale) && std::isfinite(scale), name,
                  " must be a positive number, got ", scale);
}

void check_dtype_is(const char* name, const Tensor& tensor, ScalarType dtype, const char* dtype_name) {
  check_memory(name, tensor);
  STD_TORCH_CHECK(tensor.is_cpu() && tensor.scalar_type() == dtype, name, " must be a ", dtype_name,
                  " tensor on the CPU");
}

void check_per_channel(const char* name, const Tensor& tensor, ScalarType dtype, const char* dtype_name,
                       int64_t channels) {
  check_dtype_is(name, tensor, dtype, dtype_name);
  STD_TORCH_CHECK(tensor.dim() == 1 && tensor.size(0) == channels && tensor.is_contiguous(), name,
                  " must be contiguous and have sizes [", channels, "], got ", sizes_text(tensor));
}

Tensor quantized_pack(const Tensor& weight, const Tensor& table, int64_t in_channels, int64_t out_channels) {
  const KnownPartition known = read_partition(table, in_channels, out_channels);
  const PartitionView& partition = *known;
  check_dtype_is("weight", weight, ScalarType::Char, "int8");
  check_weight(weight, partition);
  const QuantizedLayout layout(partition);
  const int64_t area = weight.size(1) * weight.size(2);
  const int64_t size = layout.weight_size(area);
  STD_TORCH_CHECK(size >= 0, "a packed weight of windows of ", area, " is too large");
  const Tensor own = weight.is_contiguous() ? weight : torch::stable::contiguous(weight);
  Tensor packed = torch::stable::new_empty(weight, {size}, ScalarType::Char);
  if (size > 0) {
    layout.pack(own.const_data_ptr<int8_t>(), area, packed.mutable_data_ptr<int8_t>());
  }
  return packed;
}

// The bounds that an activation sets, of values in steps of `scale`.
template <class Out>
cpu::Rescaling rescaling(Activation activation, double scale, int64_t zero_point) {
  STD_TORCH_CHECK(is_clamp(activation),
                  "the activation of a quantized convolution must be 0 (none), 1 (relu) ",
                  "or 2 (relu6), got ", static_cast<int64_t>(activation));
  const float infinity = std::numeric_limits<float>::infinity();
  float low = -infinity, high = infinity;
  if (activation != Activation::none) low = 0.0f;
  if (activation == Activation::relu6) high = static_cast<float>(std::nearbyint(6.0 / scale));
  if constexpr (std::is_same_v<Out, uint8_t>) {
    const float least = static_cast<float>(-zero_point);
    return {std::max(low, least), std::min(high, least + 255.0f), static_cast<int32_t>(zero_point)};
  } else {
    return {low, activation == Activation::relu6 ? 6.0f : infinity};
  }
}

Tensor quantized_conv2d(const Tensor& input, const Tensor& weight, const Tensor& start, const Tensor& scale,
                        const Tensor& table, int64_t out_channels, int64_t kernel_h, int64_t kernel_w,
                        int64_t stride_h, int64_t stride_w, int64_t pad_top, int64_t pad_bottom,
                        int64_t pad_left, int64_t pad_right, int64_t dilation_h, int64_t dilation_w,
                        int64_t activation, int64_t input_zero_point, double output_scale,
                        int64_t output_zero_point, bool floating) {
  check_image("input", input);
  check_dtype_is("input", input, ScalarType::Byte, "uint8");
  const KnownPartition known = read_partition(table, input.size(1), out_channels);
  const PartitionView& partition = *known;
  const Window window = make_window(kernel_h, kernel_w, stride_h, stride_w, pad_top, pad_bottom, pad_left,
                                    pad_right, dilation_h, dilation_w);
  const QuantizedLayout layout(partition);
  check_dtype_is("weight", weight, ScalarType::Char, "int8");
  STD_TORCH_CHECK(
      weight.dim() == 1 && weight.is_contiguous() && weight.size(0) == layout.weight_size(window.area()),
      "weight must be what quantized_pack made of this partition and window, ",
      layout.weight_size(window.area()), " numbers, got sizes ", sizes_text(weight));
  check_per_channel("start", start, ScalarType::Int, "int32", out_channels);
  check_per_channel("scale", scale, ScalarType::Float, "float32", out_channels);
  check_zero_point("input_zero_point", input_zero_point);
  check_zero_point("output_zero_point", output_zero_point);
  check_scale("output_scale", output_scale);
  const auto sizes = output_sizes(window, input.size(0), out_channels, input.size(2), input.size(3));

  const auto convolve = [&](auto element, int32_t dtype, auto kernel, double step) {
    using Out = decltype(element);
    cpu::QuantizedProblem<Out> problem;
    problem.output = rescaling<Out>(make_activation(activation), step, output_zero_point);
    Tensor output = empty_image(input, sizes, is_channels_last(input), dtype);
    if (output.numel() == 0) return output;
    std::vector<float> multiplier(static_cast<size_t>(out_channels));
    const float* scales = scale.const_data_ptr<float>();
    std::transform(scales, scales + out_channels, multiplier.begin(),
                   [&](float one) { return static_cast<float>(static_cast<double>(one) / step); });
    for (const float one : multiplier) {
      STD_TORCH_CHECK(std::isfinite(one), "scale / output_scale must be finite, got ", one);
    }
    problem.source = image_of<const uint8_t>(input);
    problem.source_zero = static_cast<uint8_t>(input_zero_point);
    problem.dest = image_of<Out>(output);
    problem.weight = weight.const_data_ptr<int8_t>();
    problem.start = start.const_data_ptr<int32_t>();
    problem.multiplier = multiplier.data();
    problem.layout = &layout;
    problem.window = window;
    problem.threads = threads_for(partition, window, sizes[0] * sizes[2] * sizes[3]);
    kernel(problem);
    return output;
  };
  const cpu::QuantizedKernels& kernels = *cpu::kernels().quantized;
  return floating ? convolve(float{}, aoti_torch_dtype_float32(), kernels.convolve_to_float, 1.0)
                  : convolve(uint8_t{}, aoti_torch_dtype_uint8(), kernels.convolve, output_scale);
}

Tensor quantize(const Tensor& input, double scale, int64_t zero_point) {
  check_image("input", input);
  check_dtype_is("input", input, ScalarType::Float, "float32");
  check_scale("scale", scale);
  check_zero_point("zero_point", zero_point);
  const std::array<int64_t, 4> sizes{input.size(0), input.size(1), input.size(2), input.size(3)};
  const bool channels_last = is_channels_last(input);
  Tensor output = empty_image(input, sizes, channels_last, aoti_torch_dtype_uint8());
  if (output.numel() == 0) return output;
  bool same = true;
  for (int64_t d = 0; d < 4; ++d) same = same && (sizes[d] == 1 || input.stride(d) == output.stride(d));
  Tensor source = input;
  if (!same) {
    source = empty_image(input, sizes, channels_last);
    torch::stable::copy_(source, input);
  }
  constexpr int64_t numbers_worth_a_thread = 1 << 16;
  cpu::QuantizeProblem problem;
  problem.source = source.const_data_ptr<float>();
  problem.dest = output.mutable_data_ptr<uint8_t>();
  problem.count = output.numel();
  problem.inverse_scale = static_cast<float>(1.0 / scale);
  problem.zero_point = static_cast<int32_t>(zero_point);
  if (problem.count >= 2 * numbers_worth_a_thread) problem.threads = torch_threads();
  cpu::kernels().quantized->quantize(problem);
  return output;
}

}  // namespace
}  // namespace groupconv::ops

STABLE_TORCH_LIBRARY_IMPL(groupconv, CPU, m) {
  m.impl("quantized_pack", TORCH_BOX(&groupconv::ops::quantized_pack));
  m.impl("quantized_conv2d", TORCH_BOX(&groupconv::ops::quantized_conv2d));
  m.impl("quantize", TORCH_BOX(&groupconv::ops::quantize));
}
