// What the CUDA implementations of the ops share: the device and stream they work on, the checks, and from
// tensors to the kernels' plain data.
#pragma once

#include <cuda_runtime_api.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <memory>
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
  std::unique_ptr<Guard> guard_;
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
  if (tensor.is_contiguous()) return tensor;
  return allocate(bytes_of(tensor), [&] { return torch::stable::contiguous(tensor); });
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
  constexpr int64_t widest_element = 8;
  return allocate(count * widest_element, [&] { return torch::stable::new_empty(like, {count}, dtype); });
}

// The table of an op, whose contents the device will check.
inline cuda::PlanProblem plan_problem(const Tensor& table, const Tensor& like, int64_t in_channels,
                                      int64_t out_channels, int64_t entries) {
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
  return problem;
}

inline void check_packed_weight(const Tensor& weight, const Tensor& like, const char* like_name,
                                const char* name = "weight") {
  check_like(name, weight, like_name, like);
  STD_TORCH_CHECK(weight.dim() == 3, "the packed ", name, " must have sizes [entries, kh, kw], got ",
                  sizes_text(weight));
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

// The groups of a convolution: a table that the device checks, and the layout of the weight.
struct Groups {
  cuda::PlanProblem partition;
  const int32_t* in_labels = nullptr;  // of a dense weight; null: packed
  const int32_t* out_labels = nullptr;
};

inline Groups tabled_groups(const Tensor& table, const Tensor& input, int64_t out_channels,
                            const Tensor& packed_weight) {
  check_image("input", input);
  check_packed_weight(packed_weight, input, "input");
  return {plan_problem(table, input, input.size(1), out_channels, packed_weight.size(0))};
}

// Of a weight whose last two dimensions are the window's.
inline Window window_of(const Tensor& weight, int64_t stride_h, int64_t stride_w, int64_t pad_top,
                        int64_t pad_bottom, int64_t pad_left, int64_t pad_right, int64_t dilation_h,
                        int64_t dilation_w) {
  return make_window(weight.size(weight.dim() - 2), weight.size(weight.dim() - 1), stride_h, stride_w,
                     pad_top, pad_bottom, pad_left, pad_right, dilation_h, dilation_w);
}

// The ops that others build on. A null prologue: none. The weight is packed, [entries, kh, kw], or with labels
// dense, [outputs, inputs, kh, kw].
Tensor convolve(const PrologueTensors* prologue, const Tensor& input, const Tensor& weight,
                const std::optional<Tensor>& bias, const std::optional<Tensor>& residual,
                const Groups& groups, const Window& window, int64_t activation);
Tensor convolve_input_grad(const Tensor& grad, const Tensor& weight, const Groups& groups,
                           const Window& window, int64_t height, int64_t width, bool channels_last);
Tensor convolve_weight_grad(const PrologueTensors* prologue, const Tensor& grad, const Tensor& input,
                            const Groups& groups, const Window& window);

}  // namespace groupconv::ops::on_cuda
