// 1×1 convolutions and their input gradients on tensor cores where both images are channels_last, whatever the
// groups: a block takes whole pixels through all groups, so that memory is read and written in whole rows and
// each once. Where product_mma.cuh gathers an uneven group out of memory, it reads a sector again for every
// group that has a channel in it.
//
// A block makes one run of pixels after another. Whole pixels arrive in a ring of stages by asynchronous copies
// of sixteen bytes. A warp takes 32 pixels through one tile of rows: it picks its sources out of the pixels in
// shared memory, element by element and each once for all rows of the tile, and puts its sums where their
// channels belong in a tile of written pixels; those leave as whole rows. A residual arrives in the place of the
// sums that will be added to it.
//
// Before, lay_out_weights puts the weights of all tiles in the order of the matrix instruction's lanes. They
// stay in shared memory as far as they fit, and are read from L2 otherwise. Small groups share a tile; a column
// of eight rows skips the steps that only others take part in.
//
//   tile    pixels × rows   sums of a lane   loads for 16 × 8 × 16 products and the same of the next pixels
//   wide    32 × 64         64               1 of weights; 16 two-byte loads of pixels for all columns
//   narrow  32 × 32         32               the same
//
// Shared memory: (stages + 1) runs of pixels, 32 … 128 each, and the weights; see whole_pixels.h.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

#include "cuda/gather.cuh"
#include "cuda/product.cuh"
#include "cuda/whole_pixels.h"

namespace groupconv::cuda {

// Elements of a fragment are rows of what is summed over: a lane's own, for line l / 4, lie together.
template <class T>
constexpr int fragment_elements = fragment_rows * mma_summed<T>;
template <class T>
constexpr int lane_sources = mma_summed<T> / 4;
template <class T>
struct alignas(sizeof(uint16_t) * lane_sources<T>) SourcesOfLane {
  uint16_t channels[lane_sources<T>];
};
struct alignas(8) TwoWords {
  unsigned values[2];
};
static_assert(fragment_elements<float> * sizeof(float) == fragment_bytes);

template <class T, int Columns>
__global__ void __launch_bounds__(whole_pixel_threads)
    lay_out_weights(ProductArguments<T> a, Plan plan, WholePixelLayout layout) {
  constexpr int tile_rows = Columns * fragment_rows, summed = mma_summed<T>;
  __shared__ Row rows[tile_rows];
  __shared__ int ranges[Columns][2];
  __shared__ WholePixelTile tile;
  if (!plan.valid()) return;
  const int source_items = plan.source_offsets[plan.groups()];
  for (int64_t index = blockIdx.x; index < plan.tiles(); index += gridDim.x) {
    const ProductTile cut(a, plan, index, tile_rows, a.positions());
    __syncthreads();  // the last tile is done with what these take the place of
    for (int r = threadIdx.x; r < cut.rows; r += whole_pixel_threads) {
      rows[r] = row_of(plan, a.layout, cut.first_row + r);
    }
    int first = source_items, last = 0;
    SourceRange columns[Columns];
#pragma unroll
    for (int j = 0; j < Columns; ++j) {
      const int64_t left = cut.rows - j * fragment_rows;
      columns[j] =
          sources_of(plan, rows + j * fragment_rows, left < fragment_rows ? left : fragment_rows, ranges[j]);
      if (columns[j].first >= columns[j].last) continue;
      if (columns[j].first < first) first = columns[j].first;
      if (columns[j].last > last) last = columns[j].last;
    }
    if (threadIdx.x == 0) {
      tile.first_row = static_cast<int32_t>(cut.first_row);
      tile.rows = static_cast<int32_t>(cut.rows);
      tile.first_item = first / source_alignment * source_alignment;
      tile.steps = last > first ? (last - tile.first_item + summed - 1) / summed : 0;
      tile.fragment_count = 0;
#pragma unroll
      for (int j = 0; j < WholePixelTile::most_columns; ++j) {
        tile.range[j] = 0;
        if (j >= Columns || columns[j].first >= columns[j].last) continue;
        const int begin = (columns[j].first - tile.first_item) / summed;
        const int end = (columns[j].last - tile.first_item + summed - 1) / summed;
        tile.range[j] = begin | end << 16;
        tile.fragment_count += end - begin;
      }
      // Where a tile's weights lie differs from call to call; what is computed from them does not.
      tile.first_fragment = atomicAdd(plan.counter(), tile.fragment_count);
    }
    __syncthreads();
    bool neighbours = true;
    const int end = tile.first_item + tile.steps * summed;
    for (int i = tile.first_item + threadIdx.x * source_alignment; i < end;
         i += whole_pixel_threads * source_alignment) {
      neighbours &= i >= source_items ||
                    (plan.source_runs[i] >= source_alignment && plan.source_list[i] % source_alignment == 0);
    }
    neighbours = __syncthreads_and(neighbours);
    if (threadIdx.x == 0) {
      layout.tiles[index] = tile;
      layout.tiles[index].sources_are_neighbours = neighbours;
    }
    T* const fragments = reinterpret_cast<T*>(layout.fragments + tile.first_fragment * fragment_bytes);
#pragma unroll 1
    for (int j = 0; j < Columns; ++j) {
      const int begin = WholePixelTile::begin(tile.range[j]) * fragment_elements<T>;
      const int end = WholePixelTile::end(tile.range[j]) * fragment_elements<T>;
      for (int i = begin + threadIdx.x; i < end; i += whole_pixel_threads) {
        const int row = j * fragment_rows + i % fragment_elements<T> / summed;
        const int item = tile.first_item + i / fragment_elements<T> * summed + i % summed;
        const bool is_there = row < tile.rows && item < source_items;
        const int64_t at = is_there ? weight_of(plan, a.layout, rows[row], item) : -1;
        T* const own = fragments + tile.fragment_of(j, i / fragment_elements<T>) * fragment_elements<T>;
        own[i % fragment_elements<T>] = at < 0 ? T(0.0f) : a.weight[at];
      }
    }
  }
}

// A block's shared memory and what it works on.
template <class T>
struct WholePixels {
  const ProductArguments<T>& a;
  const Plan& plan;
  const WholePixelLayout& layout;
  const WholePixelMemory& memory;
  const WholePixelCut& cut;
  char* shared;

  __device__ T* source(int slot, int pixel) const {
    return reinterpret_cast<T*>(shared + memory.sources + slot * memory.source_stage +
                                pixel * memory.source_pitch);
  }
  __device__ T* dest(int slot, int pixel) const {
    return reinterpret_cast<T*>(shared + memory.dests + slot * memory.dest_stage + pixel * memory.dest_pitch);
  }
  __device__ int64_t& offset(int32_t of, int slot, int pixel) const {
    return reinterpret_cast<int64_t*>(shared + of)[slot * cut.pixels + pixel];
  }
  __device__ uint16_t* rows() const { return reinterpret_cast<uint16_t*>(shared + memory.rows); }
  __device__ uint16_t* items() const { return reinterpret_cast<uint16_t*>(shared + memory.items); }
  __device__ float* bias() const { return reinterpret_cast<float*>(shared + memory.bias); }

  __device__ int64_t runs_of_phase() const { return (a.positions() + cut.pixels - 1) / cut.pixels; }
  __device__ int64_t runs() const { return a.phases() * runs_of_phase(); }
  __device__ Phase phase_of(int64_t run) const {
    const int64_t phase = run / runs_of_phase();
    return {phase / a.horizontal.phases(), phase % a.horizontal.phases()};
  }
  __device__ bool place_of(int64_t run, int pixel, Place& place) const {
    return find_place(a, phase_of(run), run % runs_of_phase() * cut.pixels + pixel, place);
  }
};

// body(pixel, unit) for every sixteen bytes of the pixels that are the warp's own.
template <class Body>
__device__ void for_own_units(int pixels, int units_of_pixel, const Body& body) {
  const int warp = threadIdx.x / 32, units = pixels / whole_pixel_warps * units_of_pixel;
  for (int i = threadIdx.x % 32; i < units; i += 32) {
    body(warp + i / units_of_pixel * whole_pixel_warps, i % units_of_pixel);
  }
}

// What a block keeps for all runs: lists, bias, weights, and the zeros behind the channels of a source.
template <class T>
__device__ void load_tables(const WholePixels<T>& pixels) {
  const auto& [a, plan, layout, memory, cut, shared] = pixels;
  const int thread = threadIdx.x;
  for (int r = thread; r < a.dest.channels; r += whole_pixel_threads) {
    pixels.rows()[r] = static_cast<uint16_t>(plan.rows[r]);
    if (a.bias) pixels.bias()[r] = static_cast<float>(a.bias[plan.rows[r]]);
  }
  const int items = plan.source_offsets[plan.groups()];
  for (int i = thread; i < WholePixelMemory::padded_items(items); i += whole_pixel_threads) {
    pixels.items()[i] = static_cast<uint16_t>(i < items ? plan.source_list[i] : a.source.channels);
  }
  for (int pixel = thread; pixel < cut.pixels * cut.stages; pixel += whole_pixel_threads) {
    T* const behind = pixels.source(pixel / cut.pixels, pixel % cut.pixels) + a.source.channels;
    *reinterpret_cast<TwoWords*>(behind) = {};
  }
  const int taken = *plan.counter(), resident = taken < cut.resident ? taken : cut.resident;
  for (int unit = thread; unit < resident * (fragment_bytes / 16); unit += whole_pixel_threads) {
    copy_16_async(shared + memory.fragments + unit * 16, layout.fragments + unit * 16, true);
  }
}

// Begins to copy a run's pixels, and its residual's, into a slot of the ring.
template <class T>
__device__ void load_run(const WholePixels<T>& pixels, int64_t run, int slot) {
  const auto& [a, plan, layout, memory, cut, shared] = pixels;
  const int own = threadIdx.x % 32 * whole_pixel_warps + threadIdx.x / 32;
  if (own < cut.pixels) {
    Place place;
    int64_t source_at = -1, dest_at = -1;
    if (pixels.place_of(run, own, place)) {
      dest_at = offset_of(a.dest, place.image, 0, place.row, place.col);
      const Phase phase = pixels.phase_of(run);
      if (a.vertical.tap_meets(phase.row, 0) && a.horizontal.tap_meets(phase.col, 0)) {
        const int64_t row = place.source_row + a.vertical.tap_shift(phase.row, 0);
        const int64_t col = place.source_col + a.horizontal.tap_shift(phase.col, 0);
        if (a.vertical.has_source(row) && a.horizontal.has_source(col)) {
          source_at = offset_of(a.source, place.image, 0, row, col);
        }
      }
      if (a.residual.data) {
        pixels.offset(memory.residual_at, slot, own) =
            offset_of(a.residual, place.image, 0, place.row, place.col);
      }
    }
    pixels.offset(memory.source_at, slot, own) = source_at;
    pixels.offset(memory.dest_at, slot, own) = dest_at;
  }
  __syncwarp();
  constexpr int length = run_length<T>;
  for_own_units(cut.pixels, static_cast<int>(a.source.channels) / length, [&](int pixel, int unit) {
    const int64_t at = pixels.offset(memory.source_at, slot, pixel);
    const T* const from = at < 0 ? a.source.data : a.source.data + at + unit * length;
    copy_16_async(pixels.source(slot, pixel) + unit * length, from, at >= 0);
  });
  if (!a.residual.data) return;
  for_own_units(cut.pixels, static_cast<int>(a.dest.channels) / length, [&](int pixel, int unit) {
    if (pixels.offset(memory.dest_at, slot, pixel) < 0) return;
    const T* const from = a.residual.data + pixels.offset(memory.residual_at, slot, pixel) + unit * length;
    copy_16_async(pixels.dest(slot, pixel) + unit * length, from, true);
  });
}

// The prologue, in place. A pixel that does not exist stays zero.
template <class T>
__device__ void prepare_run(const WholePixels<T>& pixels, int slot) {
  const auto& [a, plan, layout, memory, cut, shared] = pixels;
  constexpr int length = run_length<T>;
  for_own_units(cut.pixels, static_cast<int>(a.source.channels) / length, [&](int pixel, int unit) {
    if (pixels.offset(memory.source_at, slot, pixel) < 0) return;
    auto& elements = *reinterpret_cast<SixteenBytes<T>*>(pixels.source(slot, pixel) + unit * length);
#pragma unroll
    for (int i = 0; i < length; ++i) {
      const auto x = static_cast<float>(elements.values[i]);
      elements.values[i] = static_cast<T>(prepare(a.before, unit * length + i, x));
    }
  });
}

// What a lane has of 16 pixels and one step's sources, for a matrix instruction. Which source is which of the
// instruction's sixteen does not matter, as long as the weights are in the same order: a lane's are neighbours in
// the list. Where they are neighbours in the pixel too, they are picked at once.
template <class T>
__device__ void pick_left(unsigned (&to)[4], const T* pixel, int pitch, const SourcesOfLane<T>& sources,
                          bool are_neighbours) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const auto* const line = reinterpret_cast<const char*>(pixel) + half * 8 * pitch;
    if (are_neighbours) {
      const auto both = *reinterpret_cast<const TwoWords*>(line + sources.channels[0] * sizeof(T));
      to[half] = both.values[0];
      to[half + 2] = both.values[1];
    } else if constexpr (sizeof(T) == sizeof(uint16_t)) {
      const auto* const elements = reinterpret_cast<const uint16_t*>(line);
      to[half] = elements[sources.channels[0]] | static_cast<unsigned>(elements[sources.channels[1]]) << 16;
      to[half + 2] = elements[sources.channels[2]] | static_cast<unsigned>(elements[sources.channels[3]])
                                                         << 16;
    } else {
      const auto* const elements = reinterpret_cast<const unsigned*>(line);
      to[half] = elements[sources.channels[0]];
      to[half + 2] = elements[sources.channels[1]];
    }
  }
}

template <int Columns>
using TileSums = float[2][Columns][4];

// The sums of 32 pixels from `first_pixel` on and a tile's rows.
template <class T, int Columns>
__device__ void multiply_tile(const WholePixels<T>& pixels, const WholePixelTile& tile, int slot,
                              int first_pixel, TileSums<Columns>& sums) {
  const auto& [a, plan, layout, memory, cut, shared] = pixels;
  const int lane = threadIdx.x % 32;
  const T* const line = pixels.source(slot, first_pixel + lane / 4);
  const auto* items = reinterpret_cast<const SourcesOfLane<T>*>(pixels.items() + tile.first_item) + lane % 4;
  const bool is_resident = tile.first_fragment + tile.fragment_count <= cut.resident;
  const char* fragments = (is_resident ? shared + memory.fragments : layout.fragments) +
                          static_cast<int64_t>(tile.first_fragment) * fragment_bytes + lane * 8;
  uint32_t ranges[Columns];
#pragma unroll
  for (int j = 0; j < Columns; ++j) {
    ranges[j] = tile.range[j];
  }
  const int steps = tile.steps;
  const bool neighbours = tile.sources_are_neighbours;
#pragma unroll(Columns <= 4 ? 2 : 1)
  for (int step = 0; step < steps; ++step, items += 4) {
    const SourcesOfLane<T> own = *items;
    unsigned left[2][4];
    pick_left<T>(left[0], line, memory.source_pitch, own, neighbours);
    pick_left<T>(left[1], line + 16 * memory.source_pitch / sizeof(T), memory.source_pitch, own, neighbours);
#pragma unroll
    for (int j = 0; j < Columns; ++j) {
      if (!WholePixelTile::takes_part(ranges[j], step)) continue;
      const auto right = *reinterpret_cast<const TwoWords*>(fragments);
      fragments += fragment_bytes;
      multiply(sums[0][j], left[0], right.values[0], right.values[1], T());
      multiply(sums[1][j], left[1], right.values[0], right.values[1], T());
    }
  }
}

// Epilogue, and every sum into its channel's place; false where a sum was not finite.
template <class T, int Columns>
__device__ bool finish_tile(const WholePixels<T>& pixels, const WholePixelTile& tile, int slot,
                            int first_pixel, const TileSums<Columns>& sums) {
  const auto& [a, plan, layout, memory, cut, shared] = pixels;
  const int lane = threadIdx.x % 32, rows = tile.rows, first_row = tile.first_row;
  bool there[4], finite = true;  // pixels behind the last are in shared memory, but never leave it
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    there[i] = pixels.offset(memory.dest_at, slot, first_pixel + i * 8 + lane / 4) >= 0;
  }
#pragma unroll
  for (int j = 0; j < Columns; ++j) {
#pragma unroll
    for (int second = 0; second < 2; ++second) {
      const int row = j * fragment_rows + lane % 4 * 2 + second;
      if (row >= rows) continue;
      const int channel = pixels.rows()[first_row + row];
      const float bias = a.bias ? pixels.bias()[first_row + row] : 0;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float sum = sums[i / 2][j][i % 2 * 2 + second];
        finite &= is_finite(sum) || !there[i];
        T& to = pixels.dest(slot, first_pixel + i * 8 + lane / 4)[channel];
        if (a.bias) sum += bias;
        if (a.residual.data) sum += static_cast<float>(to);
        to = static_cast<T>(activate(a.activation, sum));
      }
    }
  }
  return finite;
}

// Once more, without products that do not exist, what this lane has of a tile.
template <class T, int Columns>
__device__ void repair_tile(const WholePixels<T>& pixels, const WholePixelTile& tile, int64_t run, int slot,
                            int first_pixel) {
  const auto& [a, plan, layout, memory, cut, shared] = pixels;
  const int lane = threadIdx.x % 32;
  const Phase phase = pixels.phase_of(run);
#pragma unroll 1
  for (int i = 0; i < 4; ++i) {
    const int pixel = first_pixel + i * 8 + lane / 4;
    Place place;
    if (!pixels.place_of(run, pixel, place)) continue;
#pragma unroll 1
    for (int r = 0; r < Columns * 2; ++r) {
      const int index = r / 2 * fragment_rows + lane % 4 * 2 + r % 2;
      if (index >= tile.rows) continue;
      const Row row = row_of(plan, a.layout, tile.first_row + index);
      const float sum = sum_of_products<false>(a, plan, row, phase, place);
      pixels.dest(slot, pixel)[row.channel] = finish(a, place, row.channel, sum);
    }
  }
}

// Whole pixels leave.
template <class T>
__device__ void store_run(const WholePixels<T>& pixels, int slot) {
  const auto& [a, plan, layout, memory, cut, shared] = pixels;
  constexpr int length = run_length<T>;
  for_own_units(cut.pixels, static_cast<int>(a.dest.channels) / length, [&](int pixel, int unit) {
    const int64_t at = pixels.offset(memory.dest_at, slot, pixel);
    if (at < 0) return;
    *reinterpret_cast<SixteenBytes<T>*>(a.dest.data + at + unit * length) =
        *reinterpret_cast<const SixteenBytes<T>*>(pixels.dest(slot, pixel) + unit * length);
  });
}

template <class T, int Columns>
__global__ void __launch_bounds__(whole_pixel_threads, 2)
    whole_pixels(ProductArguments<T> a, Plan plan, WholePixelLayout layout, WholePixelMemory memory,
                 WholePixelCut cut) {
  if (!plan.valid()) {
    fill_with_nan(a.dest.data, a.dest.batch * a.dest.channels * a.dest.height * a.dest.width);
    return;
  }
  const WholePixels<T> pixels{a, plan, layout, memory, cut, dynamic_shared()};
  load_tables(pixels);
  const int64_t runs = pixels.runs();
  const auto begin_run = [&](int64_t run, int slot) {
    if (run < runs) load_run(pixels, run, slot);
    commit_copies();
  };
  for (int ahead = 0; ahead < cut.stages - 1; ++ahead) {
    begin_run(blockIdx.x + static_cast<int64_t>(ahead) * gridDim.x, ahead);
  }
  const int lines = cut.pixels / line_pixels, units = static_cast<int>(plan.tiles()) * lines;
  int slot = 0;
  for (int64_t run = blockIdx.x; run < runs; run += gridDim.x) {
    if (cut.stages == 2) {
      wait_copies<0>();
    } else {
      wait_copies<1>();
    }
    __syncthreads();  // the run is there, and the one before has left
    const int before = slot == 0 ? cut.stages - 1 : slot - 1;
    begin_run(run + static_cast<int64_t>(cut.stages - 1) * gridDim.x, before);
    if (a.before.scale) {
      prepare_run(pixels, slot);
      __syncthreads();
    }
    for (int unit = threadIdx.x / 32; unit < units; unit += whole_pixel_warps) {
      const WholePixelTile& tile = layout.tiles[unit / lines];
      const int first_pixel = unit % lines * line_pixels;
      TileSums<Columns> sums = {};
      multiply_tile<T, Columns>(pixels, tile, slot, first_pixel, sums);
      if (!finish_tile<T, Columns>(pixels, tile, slot, first_pixel, sums)) {
        repair_tile<T, Columns>(pixels, tile, run, slot, first_pixel);
      }
    }
    __syncthreads();
    store_run(pixels, slot);
    slot = slot + 1 == cut.stages ? 0 : slot + 1;
  }
}

}  // namespace groupconv::cuda
