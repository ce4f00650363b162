// Behind the input gradient of a convolution with a prologue, x' = act(x · scale + shift): one pass over x and
// G = ∂L/∂x', which takes G to ∂L/∂x in place and sums the rest on the way.
//
//   g = G where x' > 0 or there is no ReLU, else 0     x' is computed again as the forward pass did it
//   ∂L/∂x = g · scale     ∂L/∂scale[c] = Σ g · x     ∂L/∂shift[c] = Σ g
//
// Two loads and a store for each element, nothing else from memory. NCHW: lanes are pixels, a channel's two
// sums are registers. channels_last: lanes are channels, the sums of two vectors of channels are registers
// while a row of pixels passes. How the work is cut does not depend on the threads, so neither do the sums.
#pragma once

#include "cpu/staging/prologue.h"
#include "cpu/staging/stage.h"
#include "cpu/staging/workspace.h"

namespace groupconv::cpu {
namespace {

template <class T>
struct PrologueSums {
  Vec<T> scale, shift;
};

template <class T>
GROUPCONV_INLINE Vec<T> prologue_grad_step(const Affine<T>& affine, bool relu, Vec<T> x, Vec<T> grad,
                                           PrologueSums<T>& sums) {
  if (relu) grad = where_positive(multiply_add(x, affine.scale, affine.shift), grad);
  sums.scale = multiply_add(grad, x, sums.scale);
  sums.shift = sums.shift + grad;
  return grad * affine.scale;
}

template <class Stored>
class PrologueGrad {
  using T = compute_t<Stored>;
  using V_ = Vec<T>;
  static constexpr int lanes = V_::lanes;
  static constexpr bool computes_as_stored = __is_same(Stored, T);
  static constexpr int64_t run_length =
      512;  // elements that are copied where they cannot be used as they lie

 public:
  explicit PrologueGrad(const PrologueGradProblem<Stored>& problem) : p_(problem) {}

  void run() const {
    if (p_.grad.stride_c == 1 && p_.grad.channels > 1) return run_pixels();
    constexpr int64_t channels_per_item = 16;
    const int64_t chunks = divide_up(p_.grad.channels, channels_per_item);
    for_each_item(p_.threads, p_.slices * chunks, [&](int64_t item) {
      const int64_t first = item % chunks * channels_per_item;
      run_rows(item / chunks, first, smaller(first + channels_per_item, p_.grad.channels));
    });
  }

 private:
  // ---- lanes are pixels -----------------------------------------------------------------------------

  void run_rows(int64_t slice, int64_t first, int64_t end) const {
    const bool flat = p_.input.flat() && p_.grad.flat();
    const Image<const Stored> input = flat ? p_.input.as_row() : p_.input;
    const Image<Stored> grad = flat ? p_.grad.as_row() : p_.grad;
    const int64_t slice_end = grad.batch * (slice + 1) / p_.slices;
    for (int64_t n = grad.batch * slice / p_.slices; n < slice_end; ++n) {
      for (int64_t c = first; c < end; ++c) {
        PrologueSums<T> sums{zero<T>(), zero<T>()};
        const Affine<T> affine = affine_of(p_.prologue, c);
        for (int64_t y = 0; y < grad.height; ++y) {
          run_row(affine, input.at(n, c, y, 0), input.stride_w, grad.at(n, c, y, 0), grad.width, sums);
        }
        p_.scale_grad[slice * grad.channels + c] += sums.scale.sum();
        p_.shift_grad[slice * grad.channels + c] += sums.shift.sum();
      }
    }
  }

  void run_row(const Affine<T>& affine, const Stored* x, int64_t x_stride, Stored* grad, int64_t count,
               PrologueSums<T>& sums) const {
    const auto run = [&](const T* source, T* dest, int64_t length) GROUPCONV_INLINE_LAMBDA {
      const bool relu = p_.prologue.relu;
      PrologueSums<T> some = sums;
      for_each_vector<T>(length, [&](int64_t i, auto mask) GROUPCONV_INLINE_LAMBDA {
        prologue_grad_step(affine, relu, V_::load(source + i, mask), V_::load(dest + i, mask), some)
            .store(dest + i, mask);
      });
      sums = some;
    };
    if constexpr (computes_as_stored) {
      if (x_stride == 1) return run(x, grad, count);
    }
    T source[run_length], dest[run_length];
    for (int64_t done = 0; done < count; done += run_length) {
      const int64_t length = smaller(run_length, count - done);
      widen_row(x + done * x_stride, x_stride, source, length);
      widen_row(grad + done, 1, dest, length);
      run(source, dest, length);
      for (int64_t i = 0; i < length; ++i) narrow(dest[i], grad[done + i]);
    }
  }

  // ---- lanes are channels ---------------------------------------------------------------------------

  void run_pixels() const {
    const bool flat = p_.input.flat() && p_.grad.flat();
    const Image<const Stored> input = flat ? p_.input.as_row() : p_.input;
    const Image<Stored> grad = flat ? p_.grad.as_row() : p_.grad;
    // Short enough that a run of all channels stays in cache from one vector of them to the next.
    constexpr int64_t pixels_at_once = 16;
    const int64_t across = divide_up(grad.width, pixels_at_once);
    const int64_t units = grad.batch * grad.height * across;
    for_each_item(p_.threads, p_.slices, [&](int64_t slice) {
      Workspace space;
      for (int i = 0; i < 4; ++i) space.plan<T>(grad.channels);
      space.open();
      T* scale_grad = space.take<T>(grad.channels);
      T* shift_grad = space.take<T>(grad.channels);
      T* source = space.take<T>(grad.channels);
      T* dest = space.take<T>(grad.channels);
      fill_zero(scale_grad, grad.channels);
      fill_zero(shift_grad, grad.channels);
      for (int64_t unit = units * slice / p_.slices; unit < units * (slice + 1) / p_.slices; ++unit) {
        const int64_t line = unit / across, first = unit % across * pixels_at_once;
        const int64_t n = line / grad.height, y = line % grad.height;
        const int64_t pixels = smaller(pixels_at_once, grad.width - first);
        const Stored* x = input.at(n, 0, y, first);
        Stored* g = grad.at(n, 0, y, first);
        if constexpr (computes_as_stored) {
          if (input.stride_c == 1) {
            run_channels(x, input.stride_w, g, grad.stride_w, pixels, scale_grad, shift_grad);
            continue;
          }
        }
        for (int64_t p = 0; p < pixels; ++p, x += input.stride_w, g += grad.stride_w) {
          widen_row(x, input.stride_c, source, grad.channels);
          widen_row(g, 1, dest, grad.channels);
          run_channels(source, 0, dest, 0, 1, scale_grad, shift_grad);
          for (int64_t c = 0; c < grad.channels; ++c) narrow(dest[c], g[c]);
        }
      }
      for (int64_t c = 0; c < grad.channels; ++c) {
        p_.scale_grad[slice * grad.channels + c] = scale_grad[c];
        p_.shift_grad[slice * grad.channels + c] = shift_grad[c];
      }
    });
  }

  void run_channels(const T* x, int64_t x_pixel, T* grad, int64_t grad_pixel, int64_t pixels, T* scale_grad,
                    T* shift_grad) const {
    const int64_t channels = p_.grad.channels;
    int64_t c = 0;
    for (; c + lanes < channels; c += 2 * lanes) {
      run_vectors<2>(c, V_::first(smaller<int64_t>(lanes, channels - c - lanes)), x, x_pixel, grad,
                     grad_pixel, pixels, scale_grad, shift_grad);
    }
    if (c < channels) {
      run_vectors<1>(c, V_::first(smaller<int64_t>(lanes, channels - c)), x, x_pixel, grad, grad_pixel,
                     pixels, scale_grad, shift_grad);
    }
  }

  template <int V>
  void run_vectors(int64_t channel, typename V_::Mask last, const T* x, int64_t x_pixel, T* grad,
                   int64_t grad_pixel, int64_t pixels, T* scale_grad, T* shift_grad) const {
    const bool relu = p_.prologue.relu;
    const auto mask = [&](int v) GROUPCONV_INLINE_LAMBDA { return v == V - 1 ? last : V_::first(lanes); };
    Affine<T> affine[V];
    PrologueSums<T> sums[V];
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) {
      const int64_t c = channel + v * lanes;
      affine[v] = affine_at(p_.prologue, c, mask(v));
      sums[v] = {V_::load(scale_grad + c, mask(v)), V_::load(shift_grad + c, mask(v))};
    }
    x += channel;
    grad += channel;
    for (int64_t p = 0; p < pixels; ++p, x += x_pixel, grad += grad_pixel) {
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) {
        prologue_grad_step(affine[v], relu, V_::load(x + v * lanes, mask(v)),
                           V_::load(grad + v * lanes, mask(v)), sums[v])
            .store(grad + v * lanes, mask(v));
      }
    }
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) {
      const int64_t c = channel + v * lanes;
      sums[v].scale.store(scale_grad + c, mask(v));
      sums[v].shift.store(shift_grad + c, mask(v));
    }
  }

  const PrologueGradProblem<Stored>& p_;
};

template <class Stored>
void prologue_grad(const PrologueGradProblem<Stored>& problem) {
  PrologueGrad<Stored>(problem).run();
}

}  // namespace
}  // namespace groupconv::cpu
