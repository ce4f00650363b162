// The prologue on rows (one channel's pixels) and on pixels (neighbouring channels), on their way into scratch.
#pragma once

#include "core/prologue.h"
#include "cpu/vector/activation.h"
#include "cpu/vector/convert.h"
#include "cpu/vector/vec.h"

namespace groupconv::cpu {
namespace {

template <class T>
GROUPCONV_INLINE T lowest(const Prologue<T>& prologue) {
  return clamp_range<T>(prologue.relu ? Activation::relu : Activation::none).low;
}

// x · scale + shift, and no less than low. NaN passes through, as through torch.relu.
template <class T>
struct Affine {
  Vec<T> scale, shift, low;

  GROUPCONV_INLINE Vec<T> operator()(Vec<T> x) const { return at_least(low, multiply_add(x, scale, shift)); }
};

// Of all lanes: they are pixels of one channel.
template <class T>
GROUPCONV_INLINE Affine<T> affine_of(const Prologue<T>& prologue, int64_t channel) {
  return {Vec<T>::broadcast(prologue.scale[channel]), Vec<T>::broadcast(prologue.shift[channel]),
          Vec<T>::broadcast(lowest(prologue))};
}

// Of each lane its own: they are channels.
template <class T>
GROUPCONV_INLINE Affine<T> affine_at(const Prologue<T>& prologue, int64_t channel,
                                     typename Vec<T>::Mask mask) {
  return {Vec<T>::load(prologue.scale + channel, mask), Vec<T>::load(prologue.shift + channel, mask),
          Vec<T>::broadcast(lowest(prologue))};
}

// to[i] = x'(from[i]) for the pixels of a row; the two may be the same.
template <class T, class Stored>
GROUPCONV_INLINE void prepare_row(const Affine<T>& affine, const Stored* from, Stored* to, int64_t count) {
  for_each_vector<T>(count, [&](int64_t i, auto mask) GROUPCONV_INLINE_LAMBDA {
    affine(Vec<T>::load(from + i, mask)).store(to + i, mask);
  });
}

// to[c] = x'(from[c]) for channels from the prologue's first on; the two may be the same.
template <class T, class Stored>
GROUPCONV_INLINE void prepare_pixel(const Prologue<T>& prologue, const Stored* from, Stored* to,
                                    int64_t count) {
  for_each_vector<T>(count, [&](int64_t c, auto mask) GROUPCONV_INLINE_LAMBDA {
    affine_at(prologue, c, mask)(Vec<T>::load(from + c, mask)).store(to + c, mask);
  });
}

// A prologue of the channels from `first` on.
template <class T>
GROUPCONV_INLINE Prologue<T> from_channel(const Prologue<T>& prologue, int64_t first) {
  return {prologue.scale + first, prologue.shift + first, prologue.relu};
}

}  // namespace
}  // namespace groupconv::cpu
