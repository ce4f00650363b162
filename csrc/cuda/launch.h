// The CUDA kernels as the rest of the library sees them: plain data in, cudaError_t out, nothing waits.
//
// All pointers are device memory of the current device; the tensors of a problem have one element type. The
// caller has checked every shape; the contents of tables and labels are checked on the device, because
// reading them here would mean waiting for it. A table that is no partition makes every result NaN.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "core/epilogue.h"
#include "core/problem.h"
#include "cuda/plan.h"

namespace groupconv::cuda {

enum class Element { f32, f64, f16, bf16 };

// The static runtime has a current device of its own beside the one of torch's runtime.
cudaError_t use_device(int device);

// What comes before a convolution, see core/prologue.h, in the type of the sums (float, of doubles double).
struct Before {
  const void* scale = nullptr;
  const void* shift = nullptr;
  bool relu = false;
};

// dest = activation(conv(prologue(source)) + bias + residual), or transposed the gradient of a
// convolution's input, source being that of its output.
struct ProductProblem {
  Image<const void> source;
  Image<void> dest;              // dense, in any order of its dimensions
  Image<const void> residual;    // of the output's shape; data == nullptr: none
  const void* weight = nullptr;  // packed: [entries, kernel_h, kernel_w]
  const void* bias = nullptr;    // by written channel, or null
  Window window;
  Activation activation = Activation::none;
  Before before;
  PlanProblem partition;  // direction, table, channels and entries; tiles are set by choose_product
  int64_t* plan = nullptr;
};

// How a problem is cut, from sizes alone, so that it is the same at every call.
enum class ProductKernel { pixels, narrow, wide, mma_slim, mma_wide };
struct ProductChoice {
  ProductKernel kernel;
  PlanProblem partition;  // with the tiles of that kernel
  int64_t plan_words;
};
// `longest_side`: of both images, their batch and the window.
ProductChoice choose_product(Element element, const PlanProblem& partition, int64_t longest_side);
cudaError_t run_product(Element element, const ProductChoice& choice, const ProductProblem& problem,
                        cudaStream_t stream);

struct WeightGradProblem {
  Image<const void> grad, input;
  void* weight_grad = nullptr;  // packed
  void* partial = nullptr;      // scratch: choice.slices gradients in the type of the sums
  Window window;
  Before before;  // of the input
  int64_t* plan = nullptr;
};

enum class WeightGradKernel { entries, tiles, mma_slim, mma_wide };
struct WeightGradChoice {
  WeightGradKernel kernel;
  PlanProblem partition;
  int64_t slices;
  int64_t plan_words;
};
WeightGradChoice choose_weight_grad(Element element, const PlanProblem& partition, int64_t window_area,
                                    int64_t pixels, int64_t longest_side);
cudaError_t run_weight_grad(Element element, const WeightGradChoice& choice, const WeightGradProblem& problem,
                            cudaStream_t stream);

// Sums by channel over slices of an image, see channel_pass.cuh.
int64_t channel_slices(int64_t pixels, int64_t channels);
constexpr int64_t channel_sums = 2;  // scratch: [slices][channel_sums][channels] in the type of the sums

struct EpilogueGradProblem {
  Image<const void> grad, output;  // output.data == nullptr: no clamp to undo
  Image<void> unclamped;
  void* bias_grad = nullptr;  // [channels] or null
  void* partial = nullptr;    // scratch, if bias_grad is wanted
  int64_t slices = 1;
  Activation activation = Activation::none;
};
cudaError_t run_epilogue_grad(Element element, const EpilogueGradProblem& problem, cudaStream_t stream);

struct PrologueGradProblem {
  Image<const void> input;
  Image<void> grad;  // of what the prologue makes; becomes that of the input
  Before before;
  void* scale_grad = nullptr;  // [channels] in the type of the sums
  void* shift_grad = nullptr;
  void* partial = nullptr;
  int64_t slices = 1;
};
cudaError_t run_prologue_grad(Element element, const PrologueGradProblem& problem, cudaStream_t stream);

}  // namespace groupconv::cuda
