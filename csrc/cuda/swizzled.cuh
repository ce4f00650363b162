// Matrices in shared memory as Hopper's warp-group instructions read them, by a descriptor.
//
// A block is 64 × 64 elements of 16 bits: 64 rows of 128 bytes, one after another from a multiple of 1024 bytes
// on. Within a row, sixteen bytes that belong in place u lie in place u ^ (row % 8) (the "128-byte swizzle"), so
// that eight rows' parts of one column lie in different banks. The rows are lines of the product, with what is
// summed over next to each other, or the other way round; the same bytes serve as either.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace groupconv::cuda {

constexpr int swizzled_row = 64;  // elements
constexpr int swizzled_row_bytes = 128;
constexpr int swizzled_block = 64 * swizzled_row;  // elements
constexpr int swizzled_alignment = 1024;

// Where an element of a column of sixteen bytes lies, in elements.
__host__ __device__ constexpr int swizzled(int row, int column) {
  constexpr int unit = 8;
  return row * swizzled_row + ((column / unit) ^ (row % 8)) * unit + column % unit;
}

// Channels and pixels of an image, a multiple of 64 pixels: blocks of 64 pixels, with pixels or channels as rows.
template <int Channels, int Pixels>
struct SwizzledTile {
  static_assert(Channels == swizzled_row && Pixels % swizzled_row == 0);
  static constexpr int elements = Channels * Pixels;
  __device__ static int channels_at(int pixel, int channel) { return swizzled(pixel, channel); }
  __device__ static int pixels_at(int channel, int pixel) {
    return pixel / swizzled_row * swizzled_block + swizzled(channel, pixel % swizzled_row);
  }
};

// The descriptor of a matrix that begins at an address of shared memory: within rows, any multiple of 32 bytes
// from the beginning of one that is a multiple of 8; across rows, any such row. From eight rows to the next
// eight it is 1024 bytes; there is nothing to skip in the other direction, since an instruction takes no more
// than 128 bytes of it.
__host__ __device__ constexpr uint64_t describe_swizzled(unsigned address) {
  constexpr uint64_t unused_offset = 1, eight_rows = 8 * swizzled_row_bytes, mode_128_bytes = 1;
  return (address & 0x3ffff) >> 4 | unused_offset << 16 | eight_rows >> 4 << 32 | mode_128_bytes << 62;
}

}  // namespace groupconv::cuda
