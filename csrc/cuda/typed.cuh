// From a problem that names its element type to one that is made of it. Each <op>_<type>.cu instantiates an
// op for one type; the files named after the op alone choose among them.
#pragma once

#include "cuda/element.cuh"
#include "cuda/launch.h"

namespace groupconv::cuda {

template <class T>
Image<T> typed(const Image<std::conditional_t<std::is_const_v<T>, const void, void>>& image) {
  return {static_cast<T*>(image.data),
          image.batch,
          image.channels,
          image.height,
          image.width,
          image.stride_n,
          image.stride_c,
          image.stride_h,
          image.stride_w};
}

template <class T>
Prologue<Sum<T>> typed(const Before& before) {
  return {static_cast<const Sum<T>*>(before.scale), static_cast<const Sum<T>*>(before.shift), before.relu};
}

// body(a value of the type)
template <class Body>
cudaError_t for_element(Element element, const Body& body) {
  switch (element) {
    case Element::f32: return body(float{});
    case Element::f64: return body(double{});
    case Element::f16: return body(__half{});
    case Element::bf16: return body(__nv_bfloat16{});
  }
  return cudaErrorInvalidValue;
}

}  // namespace groupconv::cuda
