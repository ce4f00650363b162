// Sums of pixels in the groups' order on their way to a channels_last image: brought into the order of its channels,
// finished, and stored.
#pragma once

#include "cpu/kernels.h"
#include "cpu/staging.h"
#include "cpu/vec.h"
#include "cpu/workspace.h"

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

  void plan(Workspace& shared) const { shared.plan<int32_t>(p_.dest.channels); }
  void open(Workspace& shared) {
    places_ = shared.take<int32_t>(p_.dest.channels);
    for (int64_t c = 0; c < p_.dest.channels; ++c) places_[c] = static_cast<int32_t>(sums_);
  }

  // Where each destination channel is found among a pixel's sums: behind them, until somebody says otherwise.
  int32_t* places() const { return places_; }
  // From one pixel's sums to the next's; a zero follows each.
  int64_t distance() const { return row_distance<T>(sums_ + 1); }
  const Finish<T>& finish() const { return finish_; }

  // One pixel's. `line`: scratch of as many numbers as the image has channels.
  void permute(T* sums, const Stored* residual, Stored* dest, T* line) const {
    sums[sums_] = T(0);  // where channels that no group writes are found
    if constexpr (in_vectors<Stored>) {
      if (is_clamp(p_.activation)) {
        const V_ low = V_::broadcast(finish_.range.low), high = V_::broadcast(finish_.range.high);
        return for_each_vector<T>(p_.dest.channels, [&](int64_t c, auto mask) GROUPCONV_INLINE_LAMBDA {
          // While it gathers, memory brings the lines that are stored to next.
          __builtin_prefetch(dest + fetched_ahead + c, 1);
          V_ sum = V_::gather(sums, places_ + c, mask);
          if (residual) sum = sum + V_::load(residual + c, mask);
          clamp(low, high, sum).store(dest + c, mask);
        });
      }
    }
    for_each_vector<T>(p_.dest.channels, [&](int64_t c, auto mask) GROUPCONV_INLINE_LAMBDA {
      V_::gather(sums, places_ + c, mask).store(line + c, mask);
    });
    finish_run(finish_, line, 1, residual, dest, 1, p_.dest.channels);
  }

 private:
  const ConvolveProblem<Stored>& p_;
  int64_t sums_;
  Finish<T> finish_;
  int32_t* places_ = nullptr;
};

}  // namespace
}  // namespace groupconv::cpu
