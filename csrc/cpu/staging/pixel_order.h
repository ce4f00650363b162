// Pixels with their channels in another order, for bfloat16: the gather of a partition's inputs and the scatter of its
// outputs where the channels of a pixel are neighbours.
//
// Two ways, whichever takes fewer shuffles:
//   by bytes  one permutation for each vector of a pixel that some vector of places takes channels from
//             (byte_order.h): as many as there are vectors, at most, for each of them
//   by rows   16 pixels are transposed to rows of a channel each, and rows in the new order back again
//             (pixel_rows.h): six shuffles for each vector, however many channels there are
#pragma once

#include "cpu/staging/byte_order.h"
#include "cpu/staging/pixel_rows.h"
#include "cpu/staging/workspace.h"

namespace groupconv::cpu {
namespace {

class PixelOrder {
 public:
  static void plan(Workspace& shared, int64_t places, int64_t channels) {
    shared.plan<int32_t>(2 * places);
    ByteOrder::plan(shared, 2 * places, 2 * channels);
    shared.plan<int32_t>(padded(places));
  }

  // order[place]: a channel of the pixel, or no_channel.
  void open(Workspace& shared, const int32_t* order, int64_t places, int64_t channels) {
    constexpr int64_t worth = 6;  // permutations
    places_ = places;
    rows_ = PixelRows(channels);
    by_rows_ = permutations(order) > worth * divide_up(places, lanes);
    if (by_rows_) {
      at_ = shared.take<int32_t>(padded(places));
      for (int64_t i = 0; i < padded(places); ++i) at_[i] = i < places ? rows_[order[i]] : 0;
      return;
    }
    int32_t* bytes = shared.take<int32_t>(2 * places);
    for (int64_t i = 0; i < 2 * places; ++i) {
      const int32_t c = order[i / 2];
      bytes[i] = c == no_channel ? no_channel : static_cast<int32_t>(2 * c + i % 2);
    }
    by_bytes_.open(shared, bytes, 2 * places, 2 * channels);
  }

  int64_t scratch_bytes() const { return by_rows_ ? rows_.bytes() : 0; }

  // Writes all places of every pixel.
  void run(const BFloat16* from, int64_t from_stride, BFloat16* to, int64_t to_stride, int64_t pixels,
           char* scratch) const {
    if (!by_rows_) {
      constexpr int64_t size = sizeof(BFloat16);
      return by_bytes_.run(reinterpret_cast<const uint8_t*>(from), size * from_stride,
                           reinterpret_cast<uint8_t*>(to), size * to_stride, pixels);
    }
    rows_.clear_zero_row(scratch);
    for (; pixels > 0; pixels -= pixels_of_rows) {
      rows_.fill(from, from_stride, pixels, scratch);
      rows_to_pixels(scratch, at_, places_, to, to_stride, pixels);
      from += pixels_of_rows * from_stride;
      to += pixels_of_rows * to_stride;
    }
  }

 private:
  static constexpr int64_t lanes = 32;

  static int64_t padded(int64_t places) { return divide_up(places, int64_t{16}) * 16; }

  // That by_bytes_ would make; beyond 64 vectors perhaps too few.
  int64_t permutations(const int32_t* order) const {
    int64_t count = 0;
    for (int64_t first = 0; first < places_; first += lanes) {
      uint64_t vectors = 0;
      for (int64_t i = first; i < smaller(first + lanes, places_); ++i) {
        if (order[i] != no_channel) vectors |= uint64_t{1} << (order[i] / lanes % 64);
      }
      count += __builtin_popcountll(vectors);
    }
    return count;
  }

  int64_t places_ = 0;
  bool by_rows_ = false;
  ByteOrder by_bytes_;
  PixelRows rows_;
  int32_t* at_ = nullptr;  // rows of the places
};

}  // namespace
}  // namespace groupconv::cpu
