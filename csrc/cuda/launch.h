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
#include "cuda/whole_pixels.h"

namespace groupconv::cuda {

enum class Element { f32, f64, f16, bf16 };

// Whether products of float32 may be made in TF32 where that pays; false at first.
void allow_tf32(bool allowed);
bool on_tensor_cores(Element element);

// The static runtime has a current device of its own beside the one of torch's runtime.
cudaError_t use_device(int device);
cudaError_t describe_device(Device& device);  // the current one

// What comes before a convolution, see core/prologue.h, in the type of the sums (float, of doubles double).
struct Before {
  const void* scale = nullptr;
  const void* shift = nullptr;
  bool relu = false;
};

// dest = activation(conv(prologue(source)) + S coarse + bias + residual), or transposed the gradient of a
// convolution's input, source being that of its output.
struct ProductProblem {
  Image<const void> source;
  Image<void> dest;              // dense, in any order of its dimensions
  Image<const void> residual;    // of the output's shape; data == nullptr: none
  Image<const void> coarse;      // channels that every output reads at its own pixel; data == nullptr: none
  const void* weight = nullptr;  // packed: [entries, kernel_h, kernel_w]; dense: [outputs, inputs, …]
  const void* coarse_weight = nullptr;  // S, [outputs, coarse channels]
  int64_t dense_columns = 0;            // the inputs of a dense weight; 0: packed
  const void* bias = nullptr;           // by written channel, or null
  Window window;
  Activation activation = Activation::none;
  Before before;
  PlanProblem partition;  // direction, table, channels and entries; tiles are set by choose_product
  int64_t* plan = nullptr;
};

// How a problem is cut, from sizes and the current device alone, so that it is the same at every call.
enum class ProductKernel { pixels, narrow, wide, mma_slim, mma_wide, wgmma_64, wgmma_128, whole_pixels };
struct ProductChoice {
  ProductKernel kernel;
  PlanProblem partition;  // with the tiles of that kernel
  int64_t plan_words;
  WholePixelCut cut = {};  // of whole_pixels
};
// `pixels`: those that are written; `longest_side`: of both images, their batch and the window.
ProductChoice choose_product(Element element, const PlanProblem& partition, int64_t window_area,
                             int64_t pixels, int64_t longest_side, bool has_coarse = false);
// Whole pixels instead of another kernel for tensor cores, where images, window and device allow it.
ProductChoice prefer_whole_pixels(Element element, const ProductProblem& problem, const Device& device,
                                  const ProductChoice& otherwise);
cudaError_t run_product(Element element, const ProductChoice& choice, const ProductProblem& problem,
                        cudaStream_t stream);

struct WeightGradProblem {
  Image<const void> grad, input;
  void* weight_grad = nullptr;         // packed, or dense with zeros where labels differ
  void* partial = nullptr;             // scratch: choice.slices gradients in the type of the sums
  int64_t size = 0;                    // the entries of a gradient: partition.entries, or all of a dense one
  const int32_t* in_labels = nullptr;  // of a dense gradient's columns, and its rows'; null: packed
  const int32_t* out_labels = nullptr;
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

// ---- learned groups, see labels.cuh ----------------------------------------------------------------

// A partition table of `groups` groups from labels on the device; null labels: all channels in group 0.
constexpr int64_t label_table_length(int64_t in_channels, int64_t out_channels, int64_t groups) {
  return 6 + 2 * groups + in_channels + out_channels;
}
cudaError_t run_label_table(const int32_t* in_labels, int64_t in_channels, const int32_t* out_labels,
                            int64_t out_channels, int64_t groups, int32_t* table, cudaStream_t stream);

cudaError_t run_row_labels(Element element, const void* logits, int64_t rows, int64_t groups, int32_t* labels,
                           cudaStream_t stream);

// Between dense and packed, `from` and `to` of the same type or of float32 and bfloat16.
struct PackProblem {
  const void* from = nullptr;
  void* to = nullptr;  // unpacking: zeros before
  Element from_element, to_element;
  bool pack = true;
  PlanProblem partition;
  int64_t area = 1, to_count = 0;
  int64_t* plan = nullptr;
};
cudaError_t run_pack(const PackProblem& problem, cudaStream_t stream);

// `to` = `from`, a dense weight or its gradient, where labels agree; zero elsewhere.
struct MaskProblem {
  const void* from = nullptr;
  void* to = nullptr;
  const int32_t* in_labels = nullptr;
  const int32_t* out_labels = nullptr;
  int64_t in_channels = 0, out_channels = 0, area = 1;
};
cudaError_t run_mask(Element element, const MaskProblem& problem, cudaStream_t stream);

struct LabelGradProblem {
  const void* grad = nullptr;
  const void* weight = nullptr;
  int64_t area = 1, groups = 1;
  PlanProblem partition;
  int64_t* plan = nullptr;
  void* by_input = nullptr;   // scratch: [inputs, groups] in the type of the sums
  void* by_output = nullptr;  // and [outputs, groups]
  const void* input_logits = nullptr;
  const void* output_logits = nullptr;
  void* input_logit_grad = nullptr;
  void* output_logit_grad = nullptr;
  const int32_t* in_winners = nullptr;  // null: the gradient of every entry
  const int32_t* out_winners = nullptr;
};
cudaError_t run_label_grad(Element element, const LabelGradProblem& problem, cudaStream_t stream);

// DGConv's factors: the prime factors of gcd(in_channels, out_channels), ascending.
constexpr int most_factors = 64;
struct KroneckerFactors {
  int64_t in_channels = 0, out_channels = 0;
  int count = 0;
  int32_t radices[most_factors] = {};
};
cudaError_t run_kronecker_labels(const KroneckerFactors& factors, const double* gates, int32_t* in_labels,
                                 int32_t* out_labels, cudaStream_t stream);

struct KroneckerGradProblem {
  KroneckerFactors factors;
  const double* gates = nullptr;
  const void* grad = nullptr;
  const void* weight = nullptr;
  void* weight_grad = nullptr;
  void* gate_grad = nullptr;  // in the type of the sums
  void* partial = nullptr;    // scratch: slices × gates in the type of the sums
  int64_t slices = 1, area = 1;
};
int64_t kronecker_slices(int64_t entries);
cudaError_t run_kronecker_grad(Element element, const KroneckerGradProblem& problem, cudaStream_t stream);

// ---- the chain of pointwise stages, see chain.cuh --------------------------------------------------

constexpr int most_stages = 8;
struct ChainProblem {
  struct Stage {
    // The channels between two stages are the most that there can be; finds_outputs but for the last.
    PlanProblem partition;
    const void* weight = nullptr;
  };
  Image<const void> input, grad;  // grad: of the output, for the backward pass
  Image<void> output;             // or the input's gradient; data == nullptr: not wanted
  const void* bias = nullptr;
  Activation activation = Activation::none;
  int count = 0;
  Stage stages[most_stages];
  int64_t entries = 0;      // of all stages
  void* partial = nullptr;  // scratch: blocks × entries in the type of the sums; null: no weight gradient
  int64_t blocks = 1;       // of the backward pass
  int64_t* plans = nullptr;
};
int64_t chain_plan_words(const ChainProblem& problem, bool backward);
int64_t chain_blocks(int64_t pixels, int64_t entries);
cudaError_t run_chain(Element element, const ChainProblem& problem, cudaStream_t stream);
cudaError_t run_chain_grad(Element element, const ChainProblem& problem, void* weight_grad,
                           cudaStream_t stream);

}  // namespace groupconv::cuda
