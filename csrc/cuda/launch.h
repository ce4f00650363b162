// The CUDA kernels as the rest of the library sees them: plain data in, cudaError_t out, nothing waits.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "core/epilogue.h"
#include "core/problem.h"

namespace groupconv::cuda {

enum class Element { f32, f64, f16, bf16 };

// y = activation(conv(input) + bias + residual). All pointers are device memory of `device`, and the
// element type of all tensors is the same. The caller has checked every shape; the contents of the table
// are checked on the device (plan.cuh), because reading them here would mean waiting for the device.
struct Conv2dForward {
  Image<const void> input;
  Image<void> output;            // dense, in any order of its dimensions
  Image<const void> residual;    // of the output's shape; data == nullptr: none
  const void* weight = nullptr;  // packed: [entries, kernel_h, kernel_w]
  const void* bias = nullptr;    // [out_channels], or null
  int64_t entries = 0;
  Window window;
  Activation activation = Activation::none;
  const int32_t* table = nullptr;
  int64_t table_length = 0;  // at least shortest_table(out_channels)
  int64_t* plan = nullptr;   // scratch of plan_words(...) words
};

// A header, one group, no reads.
constexpr int64_t shortest_table(int64_t out_channels) { return 8 + out_channels; }
int64_t plan_words(int64_t table_length, int64_t out_channels);

// A table that is no partition of these channels and entries makes every output NaN.
cudaError_t conv2d_forward(Element element, const Conv2dForward& problem, int device, cudaStream_t stream);

}  // namespace groupconv::cuda
