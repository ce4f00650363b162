// Pixels with their channels in another order, float32 and float64: the gather of a partition's inputs, and of its
// outputs, where the channels of a pixel are neighbours.
//
// Three ways to fill a vector of places, whichever takes least:
//   by permutations  one for each vector of the pixel that has some of them, merged into what the others gave. A group's
//                    channels in ascending order lie in about as many vectors of the pixel as there are groups.
//   by gathers       the processor's own
//   by turning       four pixels channel by channel and back (turned_pixels.h), where gathers do not pay (gathers.h)
// Several pixels take turns, so that what is read about a vector of places is read once for all of them.
#pragma once

#include <type_traits>

#include "cpu/processor/caches.h"
#include "cpu/processor/gathers.h"
#include "cpu/staging/reorder.h"
#include "cpu/staging/turned_pixels.h"
#include "cpu/staging/workspace.h"
#include "cpu/vector/vec.h"

namespace groupconv::cpu {
namespace {

// Neighbouring places of a pixel: a vector of them, or fewer.
template <class T, bool Whole>
struct Places {
  int64_t first;
  typename Vec<T>::Mask mask;

  template <class Element>
  GROUPCONV_INLINE Vec<T> load(const Element* pixel) const {
    return Whole ? Vec<T>::load(pixel + first) : Vec<T>::load(pixel + first, mask);
  }
  template <class Element>
  GROUPCONV_INLINE void store(Vec<T> x, Element* pixel) const {
    Whole ? x.store(pixel + first) : x.store(pixel + first, mask);
  }
};

template <class T>
class ChannelOrder {
  using V_ = Vec<T>;
  static constexpr int lanes = V_::lanes;
  static constexpr bool has_permutations = has_permute<T> && has_mask_registers;
  using Turned = TurnedPixels<T>;

  enum class Way { permutations, gathers, turning };

  struct Step {
    int32_t channel;          // first of the pixel's vector
    uint16_t present, taken;  // which of its channels the pixel has, and which places take one of them
  };

 public:
  static constexpr int pixels_at_once = 4;

  // Up to so many neighbouring pixels.
  struct FewPixels {
    const T* first;
    int64_t stride, count;
    const Turned* turned;  // filled where some order wants it
  };

  static void plan(Workspace& shared, int64_t places, int64_t channels) {
    const int64_t vectors = divide_up(places, lanes);
    shared.plan<int32_t>(vectors * lanes);
    shared.plan<uint32_t>(vectors);
    shared.plan<int32_t>(vectors);
    shared.plan<Step>(most_steps(vectors, channels));
  }

  // order[place]: a channel of the pixel, or no_channel.
  void open(Workspace& shared, const int32_t* order, int64_t places, int64_t channels) {
    const int64_t vectors = divide_up(places, lanes);
    places_ = places;
    few_ = pixels_at_once * (places + channels) * static_cast<int64_t>(sizeof(T)) <= caches().nearest / 2;
    index_ = shared.take<int32_t>(vectors * lanes);
    taken_ = shared.take<uint32_t>(vectors);
    step_counts_ = shared.take<int32_t>(vectors);
    steps_ = shared.take<Step>(most_steps(vectors, channels));
    way_ = can_turn(channels) ? Way::turning : Way::gathers;
    if (list_steps(order, channels)) way_ = Way::permutations;
    channels_ = channels;
    for (int64_t i = 0; i < vectors * lanes; ++i) {
      const bool exists = i < places && order[i] != no_channel;
      const uint32_t bit = exists ? uint32_t{1} << i % lanes : 0;
      taken_[i / lanes] = i % lanes == 0 ? bit : taken_[i / lanes] | bit;
      index_[i] = exists ? index_of(order[i]) : 0;
    }
  }

  bool wants_turned() const { return way_ == Way::turning; }
  // body(index of the first, FewPixels), for orders of the same pixels of which one wants them turned, or none.
  template <class Body>
  static GROUPCONV_INLINE void for_few(const T* from, int64_t stride, int64_t pixels, int64_t channels,
                                       bool turned, const Body& body) {
    Turned memory;
    for (int64_t first = 0; first < pixels; first += pixels_at_once, from += pixels_at_once * stride) {
      const int64_t count = smaller<int64_t>(pixels_at_once, pixels - first);
      if constexpr (Turned::exist) {
        if (turned) memory.fill(from, stride, count, channels);
      }
      body(first, FewPixels{from, stride, count, &memory});
    }
  }

  // store(pixel, its Places, Vec) of all places of every pixel.
  template <class Store>
  void run(const T* from, int64_t stride, int64_t pixels, const Store& store) const {
    for_few(from, stride, pixels, channels_, wants_turned(),
            [&](int64_t first, const FewPixels& few) GROUPCONV_INLINE_LAMBDA {
              fill(few, [&](int64_t p, const auto& places, V_ x)
                            GROUPCONV_INLINE_LAMBDA { store(first + p, places, x); });
            });
  }
  template <class Store>
  GROUPCONV_INLINE void fill(const FewPixels& few, const Store& store) const {
    if constexpr (Turned::exist) {
      if (way_ == Way::turning) return load_turned(few, store);
    }
    int64_t first = 0;
    const auto fill_some = [&](auto count) GROUPCONV_INLINE_LAMBDA {
      constexpr int some = decltype(count)::value;
      for (; first + some <= few.count; first += some) {
        fill_pixels<some>(few.first + first * few.stride, few.stride,
                          [&](int64_t pixel, const auto& places, V_ x)
                              GROUPCONV_INLINE_LAMBDA { store(first + pixel, places, x); });
      }
    };
    if (few_) fill_some(Count<pixels_at_once>{});
    fill_some(Count<2>{});
    fill_some(Count<1>{});
  }

 private:
  template <int N>
  using Count = std::integral_constant<int, N>;

  // Of a vector of places, on average: what takes no longer than another way.
  static int64_t worth() { return gathers_pay() ? 4 : 3; }
  static int64_t most_steps(int64_t vectors, int64_t channels) {
    return has_permutations ? vectors * smaller(worth(), divide_up(channels, lanes)) : 0;
  }

  static bool can_turn(int64_t channels) {
    return Turned::exist && !gathers_pay() && channels <= Turned::most_channels;
  }
  int32_t index_of(int32_t channel) const {
    if constexpr (Turned::exist) {
      if (way_ == Way::turning) return Turned::place(channel);
    }
    return way_ == Way::permutations ? channel % lanes : channel;
  }

  // False where there are too many.
  bool list_steps(const int32_t* order, int64_t channels) {
    if (!has_permutations) return false;
    const int64_t vectors = divide_up(places_, lanes);
    Step *step = steps_, *const end = steps_ + most_steps(vectors, channels);
    for (int64_t v = 0; v < vectors; ++v) {
      Step* const first = step;
      for (int64_t i = v * lanes; i < smaller((v + 1) * lanes, places_); ++i) {
        if (order[i] == no_channel) continue;
        const int32_t channel = order[i] / lanes * lanes;
        Step* same = first;
        while (same < step && same->channel != channel) ++same;
        if (same == end) return false;
        if (same == step) {
          const int64_t there = smaller<int64_t>(lanes, channels - channel);
          *step++ = {channel, static_cast<uint16_t>((uint32_t{1} << there) - 1), 0};
        }
        same->taken = static_cast<uint16_t>(same->taken | uint32_t{1} << i % lanes);
      }
      step_counts_[v] = static_cast<int32_t>(step - first);
    }
    return true;
  }

  template <int P, class Store>
  GROUPCONV_INLINE void fill_pixels(const T* from, int64_t stride, const Store& store) const {
    if (way_ == Way::permutations) return permute_pixels<P>(from, stride, store);
    for_each_places([&](int64_t v, const auto& places) GROUPCONV_INLINE_LAMBDA {
      const int32_t* index = index_ + v * lanes;
      const auto taken = V_::from_bits(taken_[v]);
#pragma GCC unroll 4
      for (int p = 0; p < P; ++p) store(p, places, V_::gather(from + p * stride, index, taken));
    });
  }

  // body(index of a vector, its Places)
  template <class Body>
  GROUPCONV_INLINE void for_each_places(const Body& body) const {
    const int64_t whole = places_ / lanes;
    for (int64_t v = 0; v < whole; ++v) body(v, Places<T, true>{v * lanes, V_::first(lanes)});
    if (const int64_t rest = places_ % lanes) {
      body(whole, Places<T, false>{whole * lanes, V_::first(rest)});
    }
  }

  template <int P, class Store>
  GROUPCONV_INLINE void permute_pixels([[maybe_unused]] const T* from, [[maybe_unused]] int64_t stride,
                                       [[maybe_unused]] const Store& store) const {
#if defined(__AVX512F__)
    if constexpr (has_permutations) {
      const Step* step = steps_;
      for_each_places([&](int64_t v, const auto& places) GROUPCONV_INLINE_LAMBDA {
        const auto index = V_::load_index(index_ + v * lanes);
        V_ x[P];
#pragma GCC unroll 4
        for (int p = 0; p < P; ++p) x[p] = zero<T>();
        for (const Step* end = step + step_counts_[v]; step < end; ++step) {
          const auto present = V_::from_bits(step->present), taken = V_::from_bits(step->taken);
#pragma GCC unroll 4
          for (int p = 0; p < P; ++p) {
            const V_ some = V_::load(from + p * stride + step->channel, present);
            x[p] = {_mm512_mask_permutexvar_ps(x[p].v, taken, index, some.v)};
          }
        }
#pragma GCC unroll 4
        for (int p = 0; p < P; ++p) store(p, places, x[p]);
      });
    }
#endif
  }

  template <class Store>
  GROUPCONV_INLINE void load_turned(const FewPixels& few, const Store& store) const {
    for_each_places([&](int64_t v, const auto& places) GROUPCONV_INLINE_LAMBDA {
      V_ x[Turned::pixels];
      few.turned->load(index_ + v * lanes, x);
#pragma GCC unroll 4
      for (int p = 0; p < Turned::pixels; ++p) {
        if (p < few.count) store(p, places, x[p]);
      }
    });
  }

  int64_t places_ = 0, channels_ = 0;
  bool few_ = true;  // channels: those of several pixels stay in L1
  Way way_ = Way::gathers;
  int32_t* index_ = nullptr;   // of the channel, of its lane, or where it is turned
  uint32_t* taken_ = nullptr;  // bits of the places that a channel belongs to
  int32_t* step_counts_ = nullptr;
  Step* steps_ = nullptr;
};

}  // namespace
}  // namespace groupconv::cpu
