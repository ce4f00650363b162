// Four neighbouring pixels channel by channel: the four numbers of a channel lie side by side, so that channels are taken
// in any order by transposing them back. With 16 lanes 64 numbers are 4 loads, 8 shuffles and 4 stores on the way in, 16
// loads of 4 numbers and 8 shuffles on the way out, where loading them one by one takes 64 loads and 48 insertions.
#pragma once

#include "cpu/staging/reorder.h"
#include "cpu/vector/transpose.h"
#include "cpu/vector/vec.h"

namespace groupconv::cpu {
namespace {

template <class T>
class TurnedPixels {
  static constexpr int lanes = Vec<T>::lanes;

 public:
  static constexpr int pixels = 4;
  static constexpr int64_t most_channels = 2048;  // those of an L1

#if defined(__AVX2__)
  static constexpr bool exist = __is_same(T, float);

  // Of fewer pixels the last stands for those that are missing.
  void fill(const T* from, int64_t stride, int64_t count, int64_t channels) {
    const T* pixel[pixels];
    for (int p = 0; p < pixels; ++p) pixel[p] = from + smaller<int64_t>(p, count - 1) * stride;
    zero<T>().store(numbers_);
    T* to = numbers_ + zeros;
    for_each_vector<T>(channels, [&](int64_t c, auto mask) GROUPCONV_INLINE_LAMBDA {
      LongRegister channel[pixels], column[columns_at_once];
#pragma GCC unroll 4
      for (int p = 0; p < pixels; ++p) channel[p] = Vec<T>::load(pixel[p] + c, mask).v;
      shuffle_parts(channel, column);
#pragma GCC unroll 4
      for (int i = 0; i < columns_at_once; ++i) store_lanes(to + i * lanes, column[i]);
      to += columns_at_once * lanes;
    });
  }

  // Where a channel's numbers begin, or as many zeros. Shuffles stay inside the 128-bit parts of a register, so four
  // channels of each part are a register apart.
  static int32_t place(int32_t channel) {
    if (channel == no_channel) return 0;
    const int32_t in_vector = channel % lanes;
    return zeros + (channel - in_vector) * pixels + in_vector % 4 * lanes + in_vector / 4 * 4;
  }

  // Lane i of x[p]: the number at places[i], of pixel p.
  GROUPCONV_INLINE void load(const int32_t* places, Vec<T> (&x)[pixels]) const {
    LongRegister pixel[pixels];
    load_columns([&](int i) GROUPCONV_INLINE_LAMBDA { return numbers_ + places[i]; }, pixel);
#pragma GCC unroll 4
    for (int p = 0; p < pixels; ++p) x[p].v = pixel[p];
  }

 private:
  static constexpr int32_t zeros = lanes;

  alignas(64) T numbers_[exist ? zeros + pixels * most_channels : 1];
#else
  static constexpr bool exist = false;
#endif
};

}  // namespace
}  // namespace groupconv::cpu
