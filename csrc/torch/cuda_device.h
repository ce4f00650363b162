// What the CUDA implementations of the ops share: the device and stream they work on, the checks, and from
// tensors to the kernels' plain data.
#pragma once

#include <cuda_runtime_api.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>

#include "cuda/launch.h"
#include "torch/arguments.h"

// Whose tensors come here. The tests build the same ops for those of the CPU, on which they run the kernels.
#ifndef GROUPCONV_CUDA_KEY
#define GROUPCONV_CUDA_KEY CUDA
#endif

namespace groupconv::ops::on_cuda {

// The caller's stream of the device. Looked up by name when it is first used: everything here must load
// where there is no CUDA, so what only a CUDA build of torch has can't be named.
cudaStream_t current_stream(int32_t device);

// Makes the device of a tensor the current one, of torch's runtime and of ours, for as long as it lives.
class OnDevice {
 public:
  explicit OnDevice(const Tensor& tensor);
  ~OnDevice();
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;

  cudaStream_t stream() const { return stream_; }

 private:
  struct Guard;
  Guard* guard_;
  cudaStream_t stream_;
};

inline void check_launch(cudaError_t error) {
  STD_TORCH_CHECK(error == cudaSuccess,
                  "a CUDA kernel of groupconv could not be launched: ", cudaGetErrorString(error));
}

inline cuda::Element element_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return cuda::Element::f32;
    case ScalarType::Double: return cuda::Element::f64;
    case ScalarType::Half: return cuda::Element::f16;
    case ScalarType::BFloat16: return cuda::Element::bf16;
    default: STD_TORCH_CHECK(false, "the CUDA kernels take float32, float64, float16 and bfloat16");
  }
}

inline ScalarType sum_type(const Tensor& tensor) {
  return tensor.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

inline Tensor packed(const Tensor& tensor) {
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

inline bool on_device_of(const Tensor& tensor, const Tensor& other) {
  return tensor.is_cuda() == other.is_cuda() && tensor.get_device_index() == other.get_device_index();
}

inline std::array<int64_t, 4> sizes_of(const Tensor& tensor) {
  return {tensor.size(0), tensor.size(1), tensor.size(2), tensor.size(3)};
}

// Memory that the kernels of one call use among themselves. It is freed on return, before they have run: the
// allocator gives it to later work of this stream only, or keeps it for as long as a captured graph lives.
inline Tensor scratch(const Tensor& like, int64_t count, ScalarType dtype) {
  return torch::stable::new_empty(like, {count}, dtype);
}

// The table of an op, whose contents the device will check.
inline cuda::PlanProblem plan_problem(const Tensor& table, const Tensor& like, int64_t in_channels,
                                      int64_t out_channels, int64_t entries, bool transposed) {
  check_setting("in_channels", in_channels, 0);
  check_setting("out_channels", out_channels, 0);
  STD_TORCH_CHECK(on_device_of(table, like) && table.dim() == 1 && table.scalar_type() == ScalarType::Int &&
                      table.is_contiguous() && table.numel() >= cuda::shortest_table(out_channels),
                  "the partition table must be a contiguous 1-d int32 tensor of at least ",
                  cuda::shortest_table(out_channels),
                  " entries on the device of the other operands, got sizes ", sizes_text(table));
  check_memory("the partition table", table);
  cuda::PlanProblem problem;
  problem.table = static_cast<const int32_t*>(table.data_ptr());
  problem.length = table.numel();
  problem.in_channels = in_channels;
  problem.out_channels = out_channels;
  problem.entries = entries;
  problem.transposed = transposed;
  return problem;
}

inline void check_packed_weight(const Tensor& weight, const Tensor& like, const char* like_name) {
  check_like("weight", weight, like_name, like);
  STD_TORCH_CHECK(weight.dim() == 3, "the packed weight must have sizes [entries, kh, kw], got ",
                  sizes_text(weight));
}

inline void check_bias(const std::optional<Tensor>& bias, const Tensor& input, int64_t out_channels) {
  if (!bias) return;
  check_like("bias", *bias, "input", input);
  STD_TORCH_CHECK(bias->dim() == 1 && bias->size(0) == out_channels, "bias must have sizes [", out_channels,
                  "], got ", sizes_text(*bias));
}

// A prologue's tensors, in the type of the sums; without a scale it is 1, without a shift 0.
struct PrologueTensors {
  std::optional<Tensor> scale, shift;
  bool relu = false;
};
void check_prologue(const PrologueTensors& prologue, const Tensor& input);

class TypedPrologue {
 public:
  TypedPrologue(const PrologueTensors* prologue, const Tensor& input);
  const cuda::Before& view() const { return view_; }

 private:
  std::optional<Tensor> scale_, shift_;  // kept for as long as the view is used
  cuda::Before view_;
};

// The ops that others build on. A null prologue: none.
Tensor conv2d_after(const PrologueTensors* prologue, const Tensor& input, const Tensor& weight,
                    const std::optional<Tensor>& bias, const std::optional<Tensor>& residual,
                    const Tensor& table, int64_t out_channels, int64_t stride_h, int64_t stride_w,
                    int64_t pad_top, int64_t pad_bottom, int64_t pad_left, int64_t pad_right,
                    int64_t dilation_h, int64_t dilation_w, int64_t activation);

Tensor conv2d_input_grad(const Tensor& grad, const Tensor& weight, const Tensor& table, int64_t in_channels,
                         int64_t height, int64_t width, int64_t stride_h, int64_t stride_w, int64_t pad_top,
                         int64_t pad_bottom, int64_t pad_left, int64_t pad_right, int64_t dilation_h,
                         int64_t dilation_w, bool channels_last);

Tensor conv2d_weight_grad_after(const PrologueTensors* prologue, const Tensor& grad, const Tensor& input,
                                const Tensor& table, int64_t entries, int64_t kernel_h, int64_t kernel_w,
                                int64_t stride_h, int64_t stride_w, int64_t pad_top, int64_t pad_bottom,
                                int64_t pad_left, int64_t pad_right, int64_t dilation_h, int64_t dilation_w);

}  // namespace groupconv::ops::on_cuda
