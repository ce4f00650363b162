// What all kernels of the convolution and of its input gradient share: the arguments, the order of the work,
// a tile's rows and pixels, the weight of a row and a source, the sum of one pixel, and what is stored.
//
// Both are one product: a written channel is a row of weights times the pixels of the sources. The plan says
// which sources a row has, an Axis which pixels meet (plan.h, axis.h).
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/axis.h"
#include "cuda/element.cuh"
#include "cuda/plan.h"

namespace groupconv::cuda {

template <class T>
struct ProductArguments {
  Image<const T> source;
  Image<T> dest;
  Image<const T> residual;  // data == nullptr: none
  Image<const T> coarse;    // of the pixels that are written; data == nullptr: none, and no channels
  const T* weight;
  const T* coarse_weight;  // [written channels][coarse channels]
  const T* bias;           // by written channel, or null
  Axis vertical, horizontal;
  Prologue<Sum<T>> before;  // of the sources
  Activation activation;
  WeightLayout layout;

  __host__ __device__ int64_t area() const { return vertical.kernel * horizontal.kernel; }
  __host__ __device__ int64_t phases() const { return vertical.phases() * horizontal.phases(); }
  // Pixels of the largest phase, all images.
  __host__ __device__ int64_t positions() const {
    return dest.batch * vertical.positions(0) * horizontal.positions(0);
  }
};

struct Phase {
  int64_t row, col;
};

// A pixel of the written image, and where its window begins in the one that is read.
struct Place {
  int64_t image, row, col;
  int64_t source_row, source_col;
};

template <class T>
__device__ bool find_place(const ProductArguments<T>& a, const Phase& phase, int64_t index, Place& place) {
  const int64_t rows = a.vertical.positions(phase.row), cols = a.horizontal.positions(phase.col);
  if (index >= a.dest.batch * rows * cols) return false;
  const int64_t line = index / cols;
  const int64_t row = line % rows, col = index - line * cols;
  place = {line / rows, a.vertical.pixel(phase.row, row), a.horizontal.pixel(phase.col, col),
           a.vertical.origin(row), a.horizontal.origin(col)};
  return true;
}

// The weight of an item of row_list and its group's first source (dense: the first channel), in units of one
// window.
__device__ inline int64_t first_weight(const Plan& plan, const WeightLayout& layout, int32_t item) {
  if (layout.is_dense()) {
    return plan.row_list[item] * (layout.transposed ? 1 : layout.dense_columns);
  }
  const int group = plan.row_groups[item];
  const int64_t sources = plan.source_offsets[group + 1] - plan.source_offsets[group];
  return plan.weight_offsets[group] + (item - plan.row_offsets[group]) * (layout.transposed ? 1 : sources);
}

// How far from there that of a source of the group lies.
__device__ inline int64_t skipped_weights(const Plan& plan, const WeightLayout& layout, int group,
                                          int64_t source) {
  if (layout.is_dense()) {
    return plan.source_list[source] * (layout.transposed ? layout.dense_columns : 1);
  }
  const int64_t rows = plan.row_offsets[group + 1] - plan.row_offsets[group];
  return (source - plan.source_offsets[group]) * (layout.transposed ? rows : 1);
}

struct Row {
  int32_t channel, first, last;  // its readers
  int32_t group;                 // of the first reader
  int64_t weight;                // the first reader's first weight
};

__device__ inline Row row_of(const Plan& plan, const WeightLayout& layout, int64_t row) {
  Row found{plan.rows[row], plan.reader_first[row], plan.reader_last[row], -1, 0};
  if (found.first < found.last) {
    const int32_t item = plan.readers[found.first];
    found.group = plan.row_groups[item];
    found.weight = first_weight(plan, layout, item);
  }
  return found;
}

// The weight of a row and a source, in units of one window; −1 where they share no group.
__device__ inline int64_t weight_of(const Plan& plan, const WeightLayout& layout, const Row& row,
                                    int64_t source) {
  const int group = plan.source_groups[source];
  if (row.group == group) return row.weight + skipped_weights(plan, layout, group, source);
  for (int32_t reader = row.first + 1; reader < row.last; ++reader) {
    const int32_t item = plan.readers[reader];
    if (plan.row_groups[item] == group) {
      return first_weight(plan, layout, item) + skipped_weights(plan, layout, group, source);
    }
  }
  return -1;
}

// Pixels below each other of one row: `Count` positions of the phase from `place` on, of which `there` exist.
// Only products that exist are added up: where a padded pixel or a source of another group meets an infinite
// factor, a tile's zeros would make a NaN of it.
template <int Count, class T>
__device__ void add_products(const ProductArguments<T>& a, const Plan& plan, const Row& row,
                             const Phase& phase, const Place& place, int there, Sum<T> (&sums)[Count]) {
  const int64_t area = a.area(), step = a.vertical.origin(1);
  for (int32_t reader = row.first; reader < row.last; ++reader) {
    const int32_t item = plan.readers[reader];
    const int group = plan.row_groups[item];
    const int64_t first = first_weight(plan, a.layout, item);
    for (int64_t tap_h = 0; tap_h < a.vertical.kernel; ++tap_h) {
      if (!a.vertical.tap_meets(phase.row, tap_h)) continue;
      const int64_t h = place.source_row + a.vertical.tap_shift(phase.row, tap_h);
      for (int64_t tap_w = 0; tap_w < a.horizontal.kernel; ++tap_w) {
        if (!a.horizontal.tap_meets(phase.col, tap_w)) continue;
        const int64_t w = place.source_col + a.horizontal.tap_shift(phase.col, tap_w);
        if (!a.horizontal.has_source(w)) continue;
        const T* pixel = a.source.data + offset_of(a.source, place.image, 0, h, w);
        const T* weights = a.weight + tap_h * a.horizontal.kernel + tap_w;
        for (int32_t s = plan.source_offsets[group]; s < plan.source_offsets[group + 1]; ++s) {
          const int32_t channel = plan.source_list[s];
          const T* from = pixel + channel * a.source.stride_c;
          const auto weight =
              static_cast<Sum<T>>(weights[(first + skipped_weights(plan, a.layout, group, s)) * area]);
#pragma unroll
          for (int i = 0; i < Count; ++i) {
            if (i >= there || !a.vertical.has_source(h + i * step)) continue;
            const auto x = static_cast<Sum<T>>(from[i * step * a.source.stride_h]);
            sums[i] += weight * prepare(a.before, channel, x);
          }
        }
      }
    }
  }
}

// One pixel of one row.
template <bool HasCoarse, class T>
__device__ Sum<T> sum_of_products(const ProductArguments<T>& a, const Plan& plan, const Row& row,
                                  const Phase& phase, const Place& place) {
  Sum<T> sums[1] = {};
  add_products(a, plan, row, phase, place, 1, sums);
  if constexpr (HasCoarse) {
    const T* const weights = a.coarse_weight + row.channel * a.coarse.channels;
    const T* const pixel = a.coarse.data + offset_of(a.coarse, place.image, 0, place.row, place.col);
    for (int64_t c = 0; c < a.coarse.channels; ++c) {
      sums[0] += static_cast<Sum<T>>(weights[c]) * static_cast<Sum<T>>(pixel[c * a.coarse.stride_c]);
    }
  }
  return sums[0];
}

// What becomes of a sum.
template <class T>
__device__ T finish(const ProductArguments<T>& a, const Place& place, int32_t channel, Sum<T> sum) {
  if (a.bias) sum += static_cast<Sum<T>>(a.bias[channel]);
  if (a.residual.data) {
    sum += static_cast<Sum<T>>(
        a.residual.data[offset_of(a.residual, place.image, channel, place.row, place.col)]);
  }
  return static_cast<T>(activate(a.activation, sum));
}

template <class T>
__device__ void store(const ProductArguments<T>& a, const Place& place, int32_t channel, Sum<T> sum) {
  a.dest.data[offset_of(a.dest, place.image, channel, place.row, place.col)] = finish(a, place, channel, sum);
}

// One tile of the product: rows of one slot × pixels of one phase. Blocks that run at the same time share
// their pixels and differ in rows: in channels_last the sectors that one group leaves half used are still in
// L2 for the next.
struct ProductTile {
  Phase phase;
  int64_t first_pixel, first_row, rows;

  template <class T>
  __device__ ProductTile(const ProductArguments<T>& a, const Plan& plan, int64_t item, int64_t tile_rows,
                         int64_t tile_pixels) {
    const int64_t tiles = plan.tiles(), tile = item % tiles, slots = plan.slots();
    const int64_t pixel_tiles = (a.positions() + tile_pixels - 1) / tile_pixels;
    const int64_t strip = item / tiles, phase_index = strip / pixel_tiles;
    phase = {phase_index / a.horizontal.phases(), phase_index % a.horizontal.phases()};
    first_pixel = strip % pixel_tiles * tile_pixels;
    const int slot = list_of(plan.tile_offsets, slots, tile);
    const SlotGroups groups(slot, slots, plan.groups(), plan.groups_in_slot());
    first_row = plan.row_begins[groups.begin] + (tile - plan.tile_offsets[slot]) * tile_rows;
    const int64_t left = plan.row_begins[groups.end] - first_row;
    rows = left < tile_rows ? left : tile_rows;
  }
};

template <class T>
__device__ int64_t product_tiles(const ProductArguments<T>& a, const Plan& plan, int64_t tile_pixels) {
  return plan.tiles() * a.phases() * ((a.positions() + tile_pixels - 1) / tile_pixels);
}

// The sources that some row of a tile reads lie between two items of source_list.
struct SourceRange {
  int first, last;
};

// For the whole block, after the rows are in shared memory and a barrier; ends with a barrier.
__device__ inline SourceRange sources_of(const Plan& plan, const Row* rows, int64_t count, int* shared) {
  if (threadIdx.x == 0) {
    shared[0] = 0x7fffffff;
    shared[1] = 0;
  }
  __syncthreads();
  for (int64_t r = threadIdx.x; r < count; r += blockDim.x) {
    if (rows[r].first == rows[r].last) continue;
    atomicMin(shared, plan.source_offsets[plan.row_groups[plan.readers[rows[r].first]]]);
    atomicMax(shared + 1, plan.source_offsets[plan.row_groups[plan.readers[rows[r].last - 1]] + 1]);
  }
  __syncthreads();
  return {shared[0], shared[1]};
}

// Once more, without products that do not exist, what came out of a tile as NaN or infinite.
template <bool HasCoarse = false, class T>
__device__ void repair_tile(const ProductArguments<T>& a, const Plan& plan, const ProductTile& tile,
                            const Row* rows, int64_t tile_pixels) {
  for (int64_t i = threadIdx.x; i < tile.rows * tile_pixels; i += blockDim.x) {
    const Row& row = rows[i / tile_pixels];
    Place place;
    if (!find_place(a, tile.phase, tile.first_pixel + i % tile_pixels, place)) continue;
    store(a, place, row.channel, sum_of_products<HasCoarse>(a, plan, row, tile.phase, place));
  }
}

}  // namespace groupconv::cuda
