// From torch's tensors to the kernels' plain data, and the checks on the way. Shared by the CPU and the
// CUDA implementations of the ops. A failed check throws before a result is allocated or anything is
// written; the Python layer checks the same things first, with ValueError and TypeError.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <array>
#include <exception>
#include <optional>
#include <sstream>

#include "core/epilogue.h"
#include "core/problem.h"
#include "torch/huge_pages.h"

namespace groupconv::ops {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t largest_setting = (int64_t{1} << 31) - 1;
// Of an image: with padding and dilation on top, coordinates stay far from what 64 bits hold.
constexpr int64_t largest_side = int64_t{1} << 40;

inline std::string sizes_text(const Tensor& tensor) {
  std::ostringstream text;
  text << "[";
  for (int64_t d = 0; d < tensor.dim(); ++d) text << (d ? ", " : "") << tensor.size(d);
  text << "]";
  return text.str();
}

inline void check_setting(const char* name, int64_t value, int64_t least) {
  STD_TORCH_CHECK(value >= least && value <= largest_setting, name, " must be from ", least, " to ",
                  largest_setting, ", got ", value);
}

inline void check_side(const char* name, int64_t value) {
  STD_TORCH_CHECK(value >= 0 && value <= largest_side, name, " must be from 0 to ", largest_side, ", got ",
                  value);
}

inline Window make_window(int64_t kernel_h, int64_t kernel_w, int64_t stride_h, int64_t stride_w,
                          int64_t pad_top, int64_t pad_bottom, int64_t pad_left, int64_t pad_right,
                          int64_t dilation_h, int64_t dilation_w) {
  check_setting("kernel height", kernel_h, 1);
  check_setting("kernel width", kernel_w, 1);
  check_setting("stride_h", stride_h, 1);
  check_setting("stride_w", stride_w, 1);
  check_setting("pad_top", pad_top, 0);
  check_setting("pad_bottom", pad_bottom, 0);
  check_setting("pad_left", pad_left, 0);
  check_setting("pad_right", pad_right, 0);
  check_setting("dilation_h", dilation_h, 1);
  check_setting("dilation_w", dilation_w, 1);
  return {kernel_h,   kernel_w, stride_h,  stride_w,   pad_top,
          pad_bottom, pad_left, pad_right, dilation_h, dilation_w};
}

inline Activation make_activation(int64_t activation) {
  STD_TORCH_CHECK(activation >= 0 && activation < activation_count, "activation must be 0 (none), 1 (relu), ",
                  "2 (relu6), 3 (silu) or 4 (hardswish), got ", activation);
  return static_cast<Activation>(activation);
}

// Storage can shrink under a tensor (sharded training resizes it to nothing between uses), whose sizes then
// say nothing about what may be read.
inline void check_memory(const char* name, const Tensor& tensor) {
  if (tensor.numel() == 0) return;
  int64_t bytes;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_size(tensor.get(), &bytes));
  int64_t last = tensor.storage_offset();
  bool overflow = false;
  for (int64_t d = 0; d < tensor.dim(); ++d) {
    int64_t reach;
    overflow |= __builtin_mul_overflow(tensor.size(d) - 1, tensor.stride(d), &reach);
    overflow |= __builtin_add_overflow(last, reach, &last);
  }
  const int64_t element = static_cast<int64_t>(tensor.element_size());
  STD_TORCH_CHECK(!overflow && last < bytes / element, name, " of sizes ", sizes_text(tensor),
                  " reaches beyond its memory: its storage was freed or shrunk to ", bytes, " bytes");
}

inline void check_image(const char* name, const Tensor& tensor) {
  check_memory(name, tensor);
  STD_TORCH_CHECK(tensor.dim() == 4, name, " must have 4 dimensions, got sizes ", sizes_text(tensor));
  STD_TORCH_CHECK(tensor.size(2) <= largest_side && tensor.size(3) <= largest_side, name, " of sizes ",
                  sizes_text(tensor), " is higher or wider than ", largest_side, " pixels");
}

inline void check_like(const char* name, const Tensor& tensor, const char* other_name, const Tensor& other) {
  check_memory(name, tensor);
  STD_TORCH_CHECK(tensor.scalar_type() == other.scalar_type(), name, " has another dtype than ", other_name);
  STD_TORCH_CHECK(
      tensor.is_cuda() == other.is_cuda() && tensor.get_device_index() == other.get_device_index(), name,
      " is on another device than ", other_name);
}

inline void check_sizes(const char* name, const Tensor& tensor, const std::array<int64_t, 4>& expected) {
  for (int64_t d = 0; d < 4; ++d) {
    STD_TORCH_CHECK(tensor.size(d) == expected[d], name, " has sizes ", sizes_text(tensor), ", expected [",
                    expected[0], ", ", expected[1], ", ", expected[2], ", ", expected[3], "]");
  }
}

// One number for each output channel, or none.
inline void check_bias(const char* name, const std::optional<Tensor>& bias, const Tensor& input,
                       int64_t out_channels) {
  if (!bias) return;
  check_like(name, *bias, "input", input);
  STD_TORCH_CHECK(bias->dim() == 1 && bias->size(0) == out_channels, name, " must have sizes [", out_channels,
                  "], got ", sizes_text(*bias));
}

inline void check_residual(const std::optional<Tensor>& residual, const Tensor& input,
                           const std::array<int64_t, 4>& output_sizes) {
  if (!residual) return;
  check_image("residual", *residual);
  check_like("residual", *residual, "input", input);
  check_sizes("residual", *residual, output_sizes);
}

// The bytes of any dtype have to be countable, also of a result that is empty: so has torch to.
inline void check_countable(const char* name, const std::array<int64_t, 4>& sizes) {
  int64_t bytes = 16;  // of the largest element
  for (const int64_t size : sizes) {
    STD_TORCH_CHECK(!__builtin_mul_overflow(bytes, std::max<int64_t>(size, 1), &bytes), name, " of sizes [",
                    sizes[0], ", ", sizes[1], ", ", sizes[2], ", ", sizes[3], "] is too large");
  }
}

// The size of the output, after checking that the window fits the padded image.
inline std::array<int64_t, 4> output_sizes(const Window& window, int64_t batch, int64_t channels,
                                           int64_t height, int64_t width) {
  const int64_t padded_h = height + window.pad_top + window.pad_bottom;
  const int64_t padded_w = width + window.pad_left + window.pad_right;
  STD_TORCH_CHECK(padded_h >= window.reach_h() && padded_w >= window.reach_w(), "the kernel reaches over ",
                  window.reach_h(), "×", window.reach_w(), " pixels, more than the padded input's ", padded_h,
                  "×", padded_w);
  const std::array<int64_t, 4> sizes{batch, channels, window.out_height(height), window.out_width(width)};
  check_countable("an output", sizes);
  return sizes;
}

// torch's own rule for the memory format of a convolution's output (suggest_memory_format).
inline bool is_channels_last(const Tensor& tensor) {
  if (tensor.stride(1) == 0) return false;
  int64_t least = 0;
  for (const int64_t d : {1, 3, 2, 0}) {
    const int64_t size = tensor.size(d), stride = tensor.stride(d);
    if (size == 0 || stride < least) return false;
    if (d == 0 && least == tensor.stride(1)) return false;
    least = size > 1 ? stride * size : stride;
  }
  return true;
}

// `make()`, which takes memory of this many bytes. Why it can't does not come through the stable interface; how
// much it was lets Python ask torch again, and hear it from torch itself (groupconv_ext/_ops.py).
template <class Make>
auto allocate(int64_t bytes, const Make& make) {
  try {
    return make();
  } catch (const std::exception&) {
    STD_TORCH_CHECK(false, "out of memory: ", bytes, " bytes could not be allocated");
  }
}

inline int64_t bytes_of(const Tensor& tensor) {
  return tensor.numel() * static_cast<int64_t>(tensor.element_size());
}

// Of the dtype of `like`, or another.
inline Tensor empty_image(const Tensor& like, const std::array<int64_t, 4>& s, bool channels_last,
                          std::optional<int32_t> other_dtype = {}) {
  const auto at_least_1 = [](int64_t size) { return size > 1 ? size : int64_t{1}; };
  const int64_t c = at_least_1(s[1]), h = at_least_1(s[2]), w = at_least_1(s[3]);
  const int64_t strides[4] = {c * h * w, channels_last ? 1 : h * w, channels_last ? w * c : w,
                              channels_last ? c : 1};
  int32_t dtype, device_type;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(like.get(), &dtype));
  dtype = other_dtype.value_or(dtype);
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  const auto other_bytes = [&] { return *other_dtype == aoti_torch_dtype_uint8() ? 1 : 4; };
  int64_t bytes = other_dtype ? other_bytes() : static_cast<int64_t>(like.element_size());
  for (const int64_t size : s) bytes *= size;  // check_countable has seen that it can be counted
  Tensor image = allocate(bytes, [&] {
    AtenTensorHandle handle;
    TORCH_ERROR_CODE_CHECK(
        aoti_torch_empty_strided(4, s.data(), strides, dtype, device_type, like.get_device_index(), &handle));
    return Tensor(handle);
  });
  if (device_type == aoti_torch_device_type_cpu()) {
    ask_for_huge_pages(image.data_ptr(), static_cast<size_t>(bytes_of(image)));
  }
  return image;
}

template <class T>
Image<T> image_of(const Tensor& tensor) {
  return {static_cast<T*>(tensor.data_ptr()),
          tensor.size(0),
          tensor.size(1),
          tensor.size(2),
          tensor.size(3),
          tensor.stride(0),
          tensor.stride(1),
          tensor.stride(2),
          tensor.stride(3)};
}

}  // namespace groupconv::ops
