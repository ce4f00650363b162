// One pass over an image with sums for every channel: what a clamp took is taken from the gradient and the
// bias gets its own; or the gradient of a prologue's output becomes that of its input, scale and shift.
//
// The pixels are cut into slices that only sizes decide; each makes sums of its own, which add_slices adds up
// in order. A block takes some channels of one slice: 32 where channels are neighbours in memory, else one.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/element.cuh"

namespace groupconv::cuda {

constexpr int pass_threads = 256;
constexpr int pass_lanes = 32;  // channels of a block in channels_last
constexpr int pass_sums = 2;

struct ChannelPass {
  int64_t batch, channels, height, width, slices;
  bool channels_last;
};

// Σ over the pixels p of [g, unused], where g = grad where the clamp passed its input on.
template <class T>
struct UndoClamp {
  Image<const T> grad, output;  // output.data == nullptr: no clamp
  Image<T> unclamped;
  Activation activation;

  __device__ void visit(int64_t n, int64_t c, int64_t h, int64_t w, Sum<T>* sums) const {
    const T given = grad.data[offset_of(grad, n, c, h, w)];
    Sum<T> g = static_cast<Sum<T>>(given);
    if (output.data) {
      if (!passed(activation, static_cast<Sum<T>>(output.data[offset_of(output, n, c, h, w)]))) g = 0;
      unclamped.data[offset_of(unclamped, n, c, h, w)] = static_cast<T>(g);
    }
    sums[0] += g;
  }
};

// Σ of [g · x, g], where g = grad where the ReLU passed; grad becomes g · scale in its place.
template <class T>
struct UndoPrologue {
  Image<const T> input;
  Image<T> grad;
  Prologue<Sum<T>> before;

  __device__ void visit(int64_t n, int64_t c, int64_t h, int64_t w, Sum<T>* sums) const {
    const auto x = static_cast<Sum<T>>(input.data[offset_of(input, n, c, h, w)]);
    T& at = grad.data[offset_of(grad, n, c, h, w)];
    Sum<T> g = static_cast<Sum<T>>(at);
    if (before.relu && x * before.scale[c] + before.shift[c] <= 0) g = 0;
    at = static_cast<T>(g * before.scale[c]);
    sums[0] += g * x;
    sums[1] += g;
  }
};

// partial: [slices][pass_sums][channels]
template <class T, class Visit>
__global__ void __launch_bounds__(pass_threads, 2)
    pass_channels(ChannelPass pass, Visit visit, Sum<T>* partial) {
  __shared__ Sum<T> shared[pass_sums][pass_threads];
  const int lanes = pass.channels_last ? pass_lanes : 1, strands = pass_threads / lanes;
  const int lane = threadIdx.x % lanes, strand = threadIdx.x / lanes;
  const int64_t pixels = pass.batch * pass.height * pass.width;
  const int64_t length = (pixels + pass.slices - 1) / pass.slices;
  const int64_t blocks = (pass.channels + lanes - 1) / lanes;
  for (int64_t item = blockIdx.x; item < blocks * pass.slices; item += gridDim.x) {
    const int64_t channel = item % blocks * lanes + lane, slice = item / blocks;
    const int64_t end = (slice + 1) * length < pixels ? (slice + 1) * length : pixels;
    Sum<T> sums[pass_sums] = {};
    if (channel < pass.channels) {
      for (int64_t p = slice * length + strand; p < end; p += strands) {
        const int64_t line = p / pass.width, image = line / pass.height;
        visit.visit(image, channel, line - image * pass.height, p - line * pass.width, sums);
      }
    }
    for (int i = 0; i < pass_sums; ++i) shared[i][threadIdx.x] = sums[i];
    __syncthreads();
    for (int half = strands / 2; half > 0; half /= 2) {
      if (strand < half) {
        for (int i = 0; i < pass_sums; ++i) shared[i][threadIdx.x] += shared[i][threadIdx.x + half * lanes];
      }
      __syncthreads();
    }
    if (partial && strand == 0 && channel < pass.channels) {
      for (int i = 0; i < pass_sums; ++i) {
        partial[(slice * pass_sums + i) * pass.channels + channel] = shared[i][threadIdx.x];
      }
    }
    __syncthreads();
  }
}

// total[i] = the sum of partial[slice · stride + i] over the slices, in order.
template <class From, class To>
__global__ void __launch_bounds__(pass_threads, 2)
    add_slices(const From* partial, int64_t slices, int64_t stride, To* total, int64_t count) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * pass_threads;
  int64_t i = static_cast<int64_t>(blockIdx.x) * pass_threads + threadIdx.x;
  for (; i < count; i += step) {
    From sum = 0;
    for (int64_t slice = 0; slice < slices; ++slice) sum += partial[slice * stride + i];
    total[i] = static_cast<To>(sum);
  }
}

}  // namespace groupconv::cuda
