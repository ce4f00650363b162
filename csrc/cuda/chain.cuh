// The chain of pointwise stages (IGCV2) in one pass: a block takes a tile of pixels through all of them in
// shared memory; device memory sees the input and the output. The backward pass computes what lies between the
// stages again, tile by tile, and takes the gradient back through them.
//
// How wide the stages are is only known here, so the block decides how many pixels its tile has: as many, up
// to 32, as its shared memory holds. Neighbouring threads take neighbouring pixels of one channel.
//
// Every block makes the weights' gradients of its own tiles, in float (of doubles in double), always adding
// the same numbers in the same order; add_slices sums them up.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/instructions.cuh"
#include "cuda/launch.h"
#include "cuda/product.cuh"

namespace groupconv::cuda {

constexpr int chain_threads = 256;
constexpr int most_chain_pixels = 32;

template <class T>
struct ChainArguments {
  struct Stage {
    Plan forward, transposed;
    const T* weight;
    int64_t first_entry;  // among the entries of all stages
  };
  Image<const T> input, grad;  // grad: of the output
  Image<T> output;             // or the input's gradient; data == nullptr: not wanted
  const T* bias;
  Activation activation;
  int count;
  Stage stages[most_stages];
  Sum<T>* partial;  // [blocks][entries], or null
  int64_t entries;
  int64_t shared_bytes;

  __device__ bool valid(bool backward) const {
    bool all = true;
    for (int s = 0; s < count; ++s) {
      all = all && stages[s].forward.valid() && (!backward || stages[s].transposed.valid());
    }
    return all;
  }
  __device__ int64_t widest() const {
    int64_t most = stages[0].forward.in_channels();
    for (int s = 0; s < count; ++s) {
      const int64_t outputs = stages[s].forward.out_channels();
      most = outputs > most ? outputs : most;
    }
    return most;
  }
  // Channels of all tensors from the input to that before the last stage.
  __device__ int64_t all_inputs() const {
    int64_t sum = 0;
    for (int s = 0; s < count; ++s) sum += stages[s].forward.in_channels();
    return sum;
  }
};

// A row of a tile's channels: one more than it holds, so that a column lies in different banks.
__device__ inline int tile_row(int pixels) { return pixels + 1; }

// 0 where not even one pixel fits.
__device__ inline int pixels_that_fit(int64_t channels, int64_t element_bytes, int64_t shared_bytes) {
  int pixels = most_chain_pixels;
  while (pixels > 0 && channels * tile_row(pixels) * element_bytes > shared_bytes) pixels /= 2;
  return pixels;
}

// visit(channel, pixel of the tile, offset in the image), neighbouring threads with neighbours in memory.
template <class T, class Visit>
__device__ void for_each_of_tile(const Image<T>& image, int64_t first_pixel, int pixels, Visit visit) {
  const int64_t all = image.batch * image.height * image.width;
  const int count = static_cast<int>(all - first_pixel < pixels ? all - first_pixel : pixels);
  const bool across = image.stride_c == 1;
  for (int64_t i = threadIdx.x; i < image.channels * count; i += chain_threads) {
    const int64_t channel = across ? i % image.channels : i / count;
    const int p = static_cast<int>(across ? i / image.channels : i % count);
    const int64_t line = (first_pixel + p) / image.width, n = line / image.height;
    visit(channel, p,
          offset_of(image, n, channel, line - n * image.height, first_pixel + p - line * image.width));
  }
}

template <class T>
__device__ void load_tile(const Image<const T>& image, int64_t first_pixel, int pixels, Sum<T>* to) {
  // Pixels beyond the last are zero: they add nothing to a weight's gradient.
  for (int64_t i = threadIdx.x; i < image.channels * tile_row(pixels); i += chain_threads) to[i] = 0;
  __syncthreads();
  for_each_of_tile(image, first_pixel, pixels, [&](int64_t channel, int p, int64_t offset) {
    to[channel * tile_row(pixels) + p] = static_cast<Sum<T>>(image.data[offset]);
  });
  __syncthreads();
}

// One stage, or its input gradient, from one tile in shared memory to another.
template <class T>
__device__ void run_stage(const Plan& plan, const T* weight, bool transposed, int64_t rows, int pixels,
                          const Sum<T>* from, Sum<T>* to) {
  const WeightLayout layout{transposed, 0};
  for (int64_t i = threadIdx.x; i < rows * pixels; i += chain_threads) {
    const int64_t row = i / pixels;
    const int p = static_cast<int>(i % pixels);
    Sum<T> sum = 0;
    for (int32_t reader = plan.reader_first[row]; reader < plan.reader_last[row]; ++reader) {
      const int32_t item = plan.readers[reader];
      const int group = plan.row_groups[item];
      const T* weights = weight + first_weight(plan, layout, item);
      for (int32_t s = plan.source_offsets[group]; s < plan.source_offsets[group + 1]; ++s) {
        sum += static_cast<Sum<T>>(weights[skipped_weights(plan, layout, group, s)]) *
               from[plan.source_list[s] * tile_row(pixels) + p];
      }
    }
    to[plan.rows[row] * tile_row(pixels) + p] = sum;
  }
  __syncthreads();
}

template <class T>
__global__ void __launch_bounds__(chain_threads, 2) chain_forward(ChainArguments<T> a) {
  const Image<T>& output = a.output;
  const int64_t all = output.batch * output.height * output.width;
  const bool valid = a.valid(false);
  const int pixels = valid ? pixels_that_fit(2 * a.widest(), sizeof(Sum<T>), a.shared_bytes) : 0;
  if (pixels == 0) {
    fill_with_nan(output.data, all * output.channels);
    return;
  }
  Sum<T>* from = reinterpret_cast<Sum<T>*>(dynamic_shared());
  Sum<T>* to = from + a.widest() * tile_row(pixels);
  for (int64_t tile = blockIdx.x; tile * pixels < all; tile += gridDim.x) {
    load_tile(a.input, tile * pixels, pixels, from);
    for (int s = 0; s < a.count; ++s) {
      const Plan& plan = a.stages[s].forward;
      run_stage(plan, a.stages[s].weight, false, plan.out_channels(), pixels, from, to);
      Sum<T>* const swapped = from;
      from = to;
      to = swapped;
    }
    for_each_of_tile(output, tile * pixels, pixels, [&](int64_t channel, int p, int64_t offset) {
      Sum<T> sum = from[channel * tile_row(pixels) + p];
      if (a.bias) sum += static_cast<Sum<T>>(a.bias[channel]);
      output.data[offset] = static_cast<T>(activate(a.activation, sum));
    });
    __syncthreads();
  }
}

// Adds to, or for a block's first tile sets, its gradients of one stage's weights.
template <class T>
__device__ void add_weight_grads(const Plan& plan, int pixels, const Sum<T>* inputs, const Sum<T>* grads,
                                 bool is_first, Sum<T>* partial) {
  const int64_t groups = plan.groups();
  for (int64_t entry = threadIdx.x; entry < plan.weight_offsets[groups]; entry += chain_threads) {
    int64_t low = 0, high = groups;
    while (high - low > 1) {
      const int64_t middle = (low + high) / 2;
      (plan.weight_offsets[middle] <= entry ? low : high) = middle;
    }
    const int64_t columns = plan.source_offsets[low + 1] - plan.source_offsets[low];
    const int64_t within = entry - plan.weight_offsets[low];
    const Sum<T>* grad = grads + plan.row_list[plan.row_offsets[low] + within / columns] * tile_row(pixels);
    const Sum<T>* input =
        inputs + plan.source_list[plan.source_offsets[low] + within % columns] * tile_row(pixels);
    Sum<T> sum = is_first ? Sum<T>(0) : partial[entry];
    for (int p = 0; p < pixels; ++p) sum += grad[p] * input[p];
    partial[entry] = sum;
  }
}

template <class T>
__global__ void __launch_bounds__(chain_threads, 2) chain_backward(ChainArguments<T> a) {
  const int64_t all = a.input.batch * a.input.height * a.input.width;
  const bool valid = a.valid(true);
  const int pixels =
      valid ? pixels_that_fit(a.all_inputs() + 2 * a.widest(), sizeof(Sum<T>), a.shared_bytes) : 0;
  Sum<T>* const partial = a.partial ? a.partial + blockIdx.x * a.entries : nullptr;
  if (pixels == 0) {
    if (a.output.data) fill_with_nan(a.output.data, all * a.output.channels);
    for (int64_t i = threadIdx.x; partial && i < a.entries; i += chain_threads)
      partial[i] = not_a_number<Sum<T>>();
    return;
  }
  Sum<T>* const hidden = reinterpret_cast<Sum<T>*>(dynamic_shared());
  Sum<T>* grad = hidden + a.all_inputs() * tile_row(pixels);
  Sum<T>* next = grad + a.widest() * tile_row(pixels);
  bool is_first = true;
  for (int64_t tile = blockIdx.x; tile * pixels < all; tile += gridDim.x) {
    load_tile(a.input, tile * pixels, pixels, hidden);
    Sum<T>* inputs = hidden;
    for (int s = 0; s + 1 < a.count; ++s) {
      const Plan& plan = a.stages[s].forward;
      Sum<T>* const outputs = inputs + plan.in_channels() * tile_row(pixels);
      run_stage(plan, a.stages[s].weight, false, plan.out_channels(), pixels, inputs, outputs);
      inputs = outputs;
    }
    load_tile(a.grad, tile * pixels, pixels, grad);
    for (int s = a.count - 1; s >= 0; --s) {
      const auto& stage = a.stages[s];
      if (partial) {
        add_weight_grads<T>(stage.forward, pixels, inputs, grad, is_first, partial + stage.first_entry);
      }
      if (s > 0 || a.output.data) {
        run_stage(stage.transposed, stage.weight, true, stage.transposed.in_channels(), pixels, grad, next);
        Sum<T>* const swapped = grad;
        grad = next;
        next = swapped;
      }
      if (s > 0) inputs -= a.stages[s - 1].forward.in_channels() * tile_row(pixels);
    }
    if (a.output.data) {
      for_each_of_tile(a.output, tile * pixels, pixels, [&](int64_t channel, int p, int64_t offset) {
        a.output.data[offset] = static_cast<T>(grad[channel * tile_row(pixels) + p]);
      });
    }
    is_first = false;
    __syncthreads();
  }
  // A block without a tile has nothing to add.
  for (int64_t i = threadIdx.x; is_first && partial && i < a.entries; i += chain_threads) partial[i] = 0;
}

}  // namespace groupconv::cuda
