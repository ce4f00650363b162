// A pixel's channels in another order, a vector of places at a time: one permutation for each vector of the
// pixel that has some of them, merged into what the others gave.
#pragma once

#include "cpu/staging/workspace.h"
#include "cpu/vector/pair.h"

namespace groupconv::cpu {
namespace {

constexpr int32_t no_channel = -1;  // nothing belongs there: zero

template <class Stored>
class Reorder {
  struct Step {
    int32_t channel;          // first of the vector
    uint32_t present, taken;  // which of its channels the pixel has, and which places take one of them
  };

 public:
  static void plan(Workspace& shared, int64_t places, int64_t channels) {
    constexpr int64_t lanes = Vec<Stored>::lanes;
    const int64_t vectors = divide_up(places, lanes);
    shared.plan<uint16_t>(vectors * lanes);
    shared.plan<int32_t>(vectors);
    shared.plan<Step>(vectors * smaller(lanes, divide_up(channels, lanes)));
  }

  // order[place]: a channel of the pixel, or no_channel.
  void open(Workspace& shared, const int32_t* order, int64_t places, int64_t channels) {
    constexpr int64_t lanes = Vec<Stored>::lanes;
    vectors_ = divide_up(places, lanes);
    indices_ = shared.take<uint16_t>(vectors_ * lanes);
    step_counts_ = shared.take<int32_t>(vectors_);
    steps_ = shared.take<Step>(vectors_ * smaller(lanes, divide_up(channels, lanes)));
    Step* step = steps_;
    for (int64_t v = 0; v < vectors_; ++v) {
      const int32_t* from = order + v * lanes;
      const int64_t count = smaller(lanes, places - v * lanes);
      for (int64_t i = 0; i < lanes; ++i) {
        indices_[v * lanes + i] =
            static_cast<uint16_t>(i < count && from[i] != no_channel ? from[i] % lanes : 0);
      }
      step_counts_[v] = 0;
      for (int64_t first = 0; first < channels; first += lanes) {
        const uint64_t present = (uint64_t{1} << smaller(lanes, channels - first)) - 1;
        uint32_t taken = 0;
        for (int64_t i = 0; i < count; ++i) {
          if (from[i] >= first && from[i] < first + lanes) taken |= uint32_t{1} << i;
        }
        if (!taken) continue;
        *step++ = {static_cast<int32_t>(first), static_cast<uint32_t>(present), taken};
        ++step_counts_[v];
      }
    }
  }

  // Whole vectors are written.
  void run(const Stored* from, Stored* to) const {
    using V_ = Vec<Stored>;
    const Step* step = steps_;
    for (int64_t v = 0; v < vectors_; ++v, to += V_::lanes) {
      const V_ index = V_::load_index(indices_ + v * V_::lanes);
      V_ places = V_::nothing();
      for (const Step* end = step + step_counts_[v]; step < end; ++step) {
        const V_ channels = V_::load(from + step->channel, V_::from_bits(step->present));
        places = merge_permuted(places, V_::from_bits(step->taken), index, channels);
      }
      places.store(to, V_::first(V_::lanes));
    }
  }

 private:
  int64_t vectors_ = 0;
  uint16_t* indices_ = nullptr;
  int32_t* step_counts_ = nullptr;
  Step* steps_ = nullptr;
};

}  // namespace
}  // namespace groupconv::cpu
