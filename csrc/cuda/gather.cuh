// A tile of an image in shared memory, channels × pixels, for products of matrices: the channels are those of
// a list, the pixels any. Its rows are pixels where channels are neighbours in memory (channels_last), else
// channels; both have sixteen bytes more than they hold, so that eight rows lie in different banks.
//
// Sixteen bytes that are neighbours in memory too are copied by one asynchronous copy; others, one by one.
// float takes part as TF32: a matrix instruction then sums over eight elements, not sixteen.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/element.cuh"
#include "cuda/instructions.cuh"

namespace groupconv::cuda {

template <class T>
constexpr int run_length = 16 / sizeof(T);  // elements of an asynchronous copy
template <class T>
constexpr int row_padding = run_length<T>;
template <class T>
constexpr int mma_summed = 32 / sizeof(T);  // what one matrix instruction sums over

template <class T>
struct alignas(16) SixteenBytes {
  T values[run_length<T>];
};

// The first source pixel of a written one: the tap's shift is added.
struct Origin {
  int64_t offset;
  int32_t image, row, col;
};
constexpr int32_t nowhere = -(1 << 30);  // the row of a pixel that does not exist

template <class T>
struct GatherSource {
  Image<const T> image;
  Prologue<float> before;
  bool channels_last;
  bool flat;  // neighbours in the list of pixels are neighbours in memory, also from row to row
};

struct Shift {
  int32_t row, col;
};

// Which channels a tile has: those of a list, with the lengths of their runs (plan.h), or neighbours.
struct ListedChannels {
  const int32_t* list;
  const int32_t* runs;
  __device__ int64_t at(int c) const { return list[c]; }
  __device__ bool are_neighbours(int c, int count) const { return runs[c] >= count; }
};
struct NeighbouringChannels {
  int64_t first;
  __device__ int64_t at(int c) const { return first + c; }
  __device__ bool are_neighbours(int, int) const { return true; }
};

template <class T, int Channels, int Pixels>
struct GatheredTile {
  static constexpr int pixel_row = Channels + row_padding<T>, channel_row = Pixels + row_padding<T>;
  static constexpr int elements =
      Pixels * pixel_row > Channels* channel_row ? Pixels * pixel_row : Channels * channel_row;
  // Where sixteen bytes from a pixel and a channel on lie, of neighbouring channels or of neighbouring pixels.
  __device__ static int channels_at(int pixel, int channel) { return pixel * pixel_row + channel; }
  __device__ static int pixels_at(int channel, int pixel) { return channel * channel_row + pixel; }
};

template <class T>
__device__ bool exists(const Image<const T>& image, const Origin& origin, const Shift& shift) {
  const int32_t row = origin.row + shift.row, col = origin.col + shift.col;
  return row >= 0 && row < image.height && col >= 0 && col < image.width;
}

__device__ inline bool is_aligned(const void* address) {
  return reinterpret_cast<uintptr_t>(address) % 16 == 0;
}

// `list`: channels, of which `count` exist.
template <class T, int Channels, int Pixels, class Tile = GatheredTile<T, Channels, Pixels>, class List>
__device__ void gather(const GatherSource<T>& source, const List& list, int count, const Origin* origins,
                       const Shift& shift, T* to) {
  constexpr int run = run_length<T>;
  constexpr int units = Channels * Pixels / run;
  const Image<const T>& image = source.image;
  const int64_t shifted = shift.row * image.stride_h + shift.col * image.stride_w;
  const auto element = [&](int c, int p) {
    if (c >= count || !exists(image, origins[p], shift)) return T(0.0f);
    const T x = image.data[origins[p].offset + shifted + list.at(c) * image.stride_c];
    return source.before.scale == nullptr
               ? x
               : static_cast<T>(prepare(source.before, list.at(c), static_cast<float>(x)));
  };
  for (int unit = threadIdx.x; unit < units; unit += blockDim.x) {
    int c, p;  // where the sixteen bytes begin
    T* destination;
    bool together;  // they are neighbours in memory, or none of them exists
    if (source.channels_last) {
      c = unit % (Channels / run) * run;
      p = unit / (Channels / run);
      destination = to + Tile::channels_at(p, c);
      together = c >= count || (c + run <= count && list.are_neighbours(c, run)) ||
                 !exists(image, origins[p], shift);
    } else {
      p = unit % (Pixels / run) * run;
      c = unit / (Pixels / run);
      destination = to + Tile::pixels_at(c, p);
      const Origin& first = origins[p];
      const Origin& last = origins[p + run - 1];
      const bool one_row = first.image == last.image && first.row == last.row &&
                           last.col - first.col == run - 1 && image.stride_w == 1;
      const bool all_exist = exists(image, first, shift) && exists(image, last, shift);
      together = c >= count || (all_exist && (one_row || (source.flat && first.image == last.image)));
    }
    const bool is_there = c < count && exists(image, origins[p], shift);
    const T* from =
        is_there ? image.data + origins[p].offset + shifted + list.at(c) * image.stride_c : image.data;
    if (together && source.before.scale == nullptr && (!is_there || is_aligned(from))) {
      copy_16_async(destination, from, is_there);
      continue;
    }
    SixteenBytes<T> elements;
#pragma unroll
    for (int i = 0; i < run; ++i) {
      elements.values[i] = source.channels_last ? element(c + i, p) : element(c, p + i);
    }
    store_16(destination, elements);
  }
}
template <class T, int Channels, int Pixels, class Tile = GatheredTile<T, Channels, Pixels>>
__device__ void gather(const GatherSource<T>& source, const int32_t* list, const int32_t* runs, int count,
                       const Origin* origins, const Shift& shift, T* to) {
  gather<T, Channels, Pixels, Tile>(source, ListedChannels{list, runs}, count, origins, shift, to);
}

// A part of a gathered tile as the left factor: 16 lines from `line` on, and of what is summed over what one
// instruction takes, from `depth` on. `by_depth`: the tile's rows are what is summed over.
template <class T>
__device__ void load_left(unsigned (&to)[4], const T* tile, int row_length, bool by_depth, int line,
                          int depth) {
  const int lane = threadIdx.x % 32;
  const int near = lane % 8, second = lane / 8 % 2, fourth = lane / 16;
  if (!by_depth) {
    load_matrices(to, tile + (line + near + second * 8) * row_length + depth + fourth * run_length<T>);
  } else if constexpr (sizeof(T) == sizeof(uint16_t)) {
    load_matrices_transposed(to, tile + (depth + near + fourth * 8) * row_length + line + second * 8);
  } else {
    const T* const own = tile + (depth + lane % 4) * row_length + line + lane / 4;
    to[0] = bits_of(own[0]);
    to[1] = bits_of(own[8]);
    to[2] = bits_of(own[4 * row_length]);
    to[3] = bits_of(own[4 * row_length + 8]);
  }
}

// The same as the right factor: two neighbouring parts of eight lines.
template <class T>
__device__ void load_right(unsigned (&to)[4], const T* tile, int row_length, bool by_depth, int line,
                           int depth) {
  const int lane = threadIdx.x % 32;
  const int near = lane % 8, second = lane / 8 % 2, fourth = lane / 16;
  if (!by_depth) {
    load_matrices(to, tile + (line + near + fourth * 8) * row_length + depth + second * run_length<T>);
  } else if constexpr (sizeof(T) == sizeof(uint16_t)) {
    load_matrices_transposed(to, tile + (depth + near + second * 8) * row_length + line + fourth * 8);
  } else {
    const T* const own = tile + (depth + lane % 4) * row_length + line + lane / 4;
    to[0] = bits_of(own[0]);
    to[1] = bits_of(own[4 * row_length]);
    to[2] = bits_of(own[8]);
    to[3] = bits_of(own[4 * row_length + 8]);
  }
}

}  // namespace groupconv::cuda
