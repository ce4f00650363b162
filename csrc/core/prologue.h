// What happens to an input before it is convolved: x' = activation(x · scale[c] + shift[c]), the normalisation
// and the ReLU of a pre-activation network. The padding comes after it: a padded pixel is 0, not relu(shift).
#pragma once

#include "core/inline.h"

namespace groupconv {

template <class T>
struct Prologue {
  const T* scale = nullptr;  // one per input channel, like shift; null: no prologue
  const T* shift = nullptr;
  bool relu = false;

  explicit GROUPCONV_INLINE operator bool() const { return scale != nullptr; }
};

}  // namespace groupconv
