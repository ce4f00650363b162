// Neighbouring lattice pixels that a kernel with lanes over channels takes, and how their sums leave.
#pragma once

#include "cpu/vector/pair.h"
#include "cpu/vector/vec.h"

namespace groupconv::cpu {
namespace {

template <class X, class Out = sum_t<X>>
struct PixelRun {
  const X* source;
  int64_t pixel_stride, pixels;
  Out* dest;
  int64_t dest_stride;
  const Out* residual;  // at dest's strides, or null
  bool clamped;
  sum_t<X> low, high;
};

// The same of some channels, as part of what describes a tile of registers.
template <class Sum, class Out = Sum>
struct PixelDest {
  Out* dest;
  int64_t dest_stride;
  const Out* residual;
  bool clamped;
  Sum low, high;

  // One by one: whoever copied what has just been written so by vectors would have to wait for it.
  template <class X>
  GROUPCONV_INLINE void set_dest(const PixelRun<X, Out>& run, int64_t first_channel) {
    dest = run.dest + first_channel;
    dest_stride = run.dest_stride;
    residual = run.residual ? run.residual + first_channel : nullptr;
    clamped = run.clamped;
    low = run.low;
    high = run.high;
  }
};

// Residual, clamp and store of one pixel's vector.
template <class Sum>
GROUPCONV_INLINE void finish_pixel(const PixelDest<Sum>& tile, int64_t pixel, typename Vec<Sum>::Mask mask,
                                   Vec<Sum> low, Vec<Sum> high, Vec<Sum> sum) {
  if (tile.residual) sum = sum + Vec<Sum>::load(tile.residual + pixel * tile.dest_stride, mask);
  if (tile.clamped) sum = clamp(low, high, sum);
  sum.store(tile.dest + pixel * tile.dest_stride, mask);
}

}  // namespace
}  // namespace groupconv::cpu
