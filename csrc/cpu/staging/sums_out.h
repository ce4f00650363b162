// Sums of pixels in the groups' order on their way to a channels_last image: brought into the order of its channels,
// finished, and stored.
#pragma once

#include "cpu/kernels.h"
#include "cpu/staging/channel_order.h"
#include "cpu/staging/unstage.h"
#include "cpu/staging/workspace.h"
#include "cpu/vector/fetched_lines.h"
#include "cpu/vector/vec.h"

namespace groupconv::cpu {
namespace {

template <class Stored>
class SumsOut {
  using T = compute_t<Stored>;
  using V_ = Vec<T>;

 public:
  // A pixel has `sums` of them.
  SumsOut(const ConvolveProblem<Stored>& problem, int64_t sums)
      : p_(problem), sums_(sums), finish_(p_.activation) {}

  void plan(Workspace& shared) const {
    shared.plan<int32_t>(p_.dest.channels);
    ChannelOrder<T>::plan(shared, p_.dest.channels, sums_);
  }
  void open(Workspace& shared) {
    places_ = shared.take<int32_t>(p_.dest.channels);
    for (int64_t c = 0; c < p_.dest.channels; ++c) places_[c] = no_channel;
  }

  // Where each destination channel is found among a pixel's sums: nowhere, until somebody says otherwise.
  int32_t* places() const { return places_; }
  // When all have said.
  void prepare(Workspace& shared) { order_.open(shared, places_, p_.dest.channels, sums_); }
  // From one pixel's sums to the next's.
  int64_t distance() const { return row_distance<T>(sums_); }
  const Finish<T>& finish() const { return finish_; }

  // Of pixels that are `dest_stride` apart. `line`: scratch of as many numbers as the image has channels.
  void permute(const T* sums, int64_t pixels, const Stored* residual, Stored* dest, int64_t dest_stride,
               T* line) const {
    if constexpr (in_vectors<Stored>) {
      if (is_clamp(p_.activation)) {
        const V_ low = V_::broadcast(finish_.range.low), high = V_::broadcast(finish_.range.high);
        const int64_t ahead = larger(fetched_ahead, ChannelOrder<T>::pixels_at_once * dest_stride);
        return order_.run(sums, distance(), pixels,
                          [&](int64_t p, const auto& places, V_ sum) GROUPCONV_INLINE_LAMBDA {
                            Stored* to = dest + p * dest_stride;
                            // Meanwhile memory brings the lines that are stored to next.
                            __builtin_prefetch(to + ahead + places.first, 1);
                            if (residual) sum = sum + places.load(residual + p * dest_stride);
                            places.store(clamp(low, high, sum), to);
                          });
      }
    }
    for (int64_t p = 0; p < pixels; ++p) {
      order_.run(sums + p * distance(), 0, 1,
                 [&](int64_t, const auto& places, V_ sum)
                     GROUPCONV_INLINE_LAMBDA { places.store(sum, line); });
      finish_run(finish_, line, 1, residual ? residual + p * dest_stride : nullptr, dest + p * dest_stride, 1,
                 p_.dest.channels);
    }
  }

 private:
  const ConvolveProblem<Stored>& p_;
  int64_t sums_;
  Finish<T> finish_;
  int32_t* places_ = nullptr;
  ChannelOrder<T> order_;
};

}  // namespace
}  // namespace groupconv::cpu
