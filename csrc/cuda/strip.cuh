// What the kernels on tensor cores share: a block does a strip of pixel tiles one after another, each in steps
// of some sources under one tap.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/gather.cuh"
#include "cuda/product.cuh"

namespace groupconv::cuda {

// The taps of an axis that meet a phase are equally far apart, and so are the pixels that they shift to.
struct Taps {
  int first = 0, step = 1, count = 0;
  int32_t first_shift = 0, shift_step = 0;
  __device__ Taps(const Axis& axis, int64_t phase) {
    for (int tap = 0; tap < axis.kernel; ++tap) {
      if (!axis.tap_meets(phase, tap)) continue;
      const auto shift = static_cast<int32_t>(axis.tap_shift(phase, tap));
      if (count == 0) {
        first = tap;
        first_shift = shift;
      } else if (count == 1) {
        step = tap - first;
        shift_step = shift - first_shift;
      }
      ++count;
    }
  }
};

// What a strip's steps have in common: a step is one chunk of sources under one tap, for one tile of pixels.
template <int Depth>
struct StripSteps {
  Taps down, across;
  SourceRange sources;
  int chunks_of_sources, chunks;  // of one tap, of all
  bool empty;

  template <class T>
  __device__ StripSteps(const ProductArguments<T>& a, const Phase& phase, const SourceRange& range)
      : down(a.vertical, phase.row), across(a.horizontal, phase.col), sources(range) {
    const int count = range.last > range.first ? range.last - range.first : 0;
    chunks_of_sources = (count + Depth - 1) / Depth;
    chunks = down.count * across.count * chunks_of_sources;
    empty = chunks == 0;
    if (empty) chunks = chunks_of_sources = 1;
  }
  __device__ int64_t tap_h(int chunk) const { return down.first + meeting(chunk) / columns() * down.step; }
  __device__ int64_t tap_w(int chunk) const {
    return across.first + meeting(chunk) % columns() * across.step;
  }
  __device__ Shift shift(int chunk) const {
    const int tap = meeting(chunk);
    return {down.first_shift + tap / columns() * down.shift_step,
            across.first_shift + tap % columns() * across.shift_step};
  }
  __device__ int first_source(int chunk) const { return sources.first + chunk % chunks_of_sources * Depth; }
  __device__ int source_count(int chunk) const {
    if (empty) return 0;
    const int left = sources.last - first_source(chunk);
    return left < Depth ? left : Depth;
  }

 private:
  __device__ int meeting(int chunk) const { return chunk / chunks_of_sources; }
  __device__ int columns() const { return across.count > 0 ? across.count : 1; }
};

// Where a pixel of the phase, counted by `index`, meets its sources.
template <class T>
__device__ Origin origin_of(const ProductArguments<T>& a, const Phase& phase, int64_t index) {
  Place place;
  if (!find_place(a, phase, index, place)) return {0, 0, nowhere, 0};
  return {offset_of(a.source, place.image, 0, place.source_row, place.source_col),
          static_cast<int32_t>(place.image), static_cast<int32_t>(place.source_row),
          static_cast<int32_t>(place.source_col)};
}

template <class T>
struct alignas(2 * sizeof(T)) TwoElements {
  T values[2];
};

// Two rows of a pixel, in one piece where they are neighbours in memory.
template <class T>
__device__ void store_two(const ProductArguments<T>& a, const Place& place, const Row* rows, int64_t left,
                          float first, float second) {
  if (left > 1 && a.dest.stride_c == 1 && rows[1].channel == rows[0].channel + 1 && !a.residual.data) {
    T* to = a.dest.data + offset_of(a.dest, place.image, rows[0].channel, place.row, place.col);
    if (reinterpret_cast<uintptr_t>(to) % sizeof(TwoElements<T>) == 0) {
      if (a.bias) {
        first += static_cast<float>(a.bias[rows[0].channel]);
        second += static_cast<float>(a.bias[rows[1].channel]);
      }
      *reinterpret_cast<TwoElements<T>*>(to) = {static_cast<T>(activate(a.activation, first)),
                                                static_cast<T>(activate(a.activation, second))};
      return;
    }
  }
  if (left > 0) store(a, place, rows[0].channel, first);
  if (left > 1) store(a, place, rows[1].channel, second);
}

}  // namespace groupconv::cuda
