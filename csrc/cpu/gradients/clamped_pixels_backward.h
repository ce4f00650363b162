// Backward of a pointwise convolution under a clamp, of pixels in channels_last: a part of the pixels after another, so
// that the clamp is undone in scratch and what both gradients read of it comes from a cache. They are made by the
// kernels of single gradients.
//
// Without a clamp these take no longer by themselves: what they read of the output's gradient is fetched ahead.
#pragma once

#include "cpu/entry.h"
#include "cpu/staging/slices.h"

namespace groupconv::cpu {
namespace {

template <class T>
class ClampedPixelsBackward {
 public:
  explicit ClampedPixelsBackward(const PointwiseBackwardProblem<T>& problem) : p_(problem) {}

  void run() const {
    add_slices(p_.threads, p_.slices, 1, p_.weight_grad, p_.partition->entries(),
               [&](int64_t slice, int64_t, T* weight_grad) { run_slice(slice, weight_grad); });
  }

 private:
  void run_slice(int64_t slice, T* weight_grad) const {
    const int64_t channels = p_.grad.channels, pixels = p_.grad.width, at_once = p_.part->cols;
    const int64_t parts = divide_up(pixels, at_once);
    Workspace space;
    space.plan<T>(at_once * channels);
    space.open();
    T* unclamped = space.take<T>(at_once * channels);
    for (int64_t part = parts * slice / p_.slices; part < parts * (slice + 1) / p_.slices; ++part) {
      const int64_t first = part * at_once, count = smaller(at_once, pixels - first);
      const Image<T> grad{unclamped, 1, channels, 1, count, 0, 1, 0, channels};
      const Sweep& sweep = count == at_once ? *p_.part : *p_.last_part;
      unclamp(slice, first, grad);
      make_input_grad(first, grad, sweep);
      add_weight_grad(first, grad, sweep, weight_grad);
    }
  }

  void unclamp(int64_t slice, int64_t first, const Image<T>& to) const {
    EpilogueGradProblem<T> clamp;
    clamp.grad = p_.grad.crop(0, first, 1, to.width);
    clamp.output = p_.output.crop(0, first, 1, to.width);
    clamp.unclamped = to;
    clamp.activation = p_.activation;
    if (p_.bias_grad) clamp.bias_grad = p_.bias_grad + slice * to.channels;
    GROUPCONV_ISA::Kernels<T>::epilogue_grad(clamp);
  }

  void make_input_grad(int64_t first, const Image<T>& grad, const Sweep& sweep) const {
    ConvolveProblem<T> product;
    product.source = read_only(grad);
    product.dest = p_.input_grad.crop(0, first, 1, grad.width);
    product.weight = p_.weight;
    product.partition = p_.partition;
    product.transposed = true;
    product.sweep = &sweep;
    GROUPCONV_ISA::Kernels<T>::convolve(product);
  }

  void add_weight_grad(int64_t first, const Image<T>& grad, const Sweep& sweep, T* weight_grad) const {
    WeightGradProblem<T> product;
    product.input = p_.input.crop(0, first, 1, grad.width);
    product.grad = read_only(grad);
    product.weight_grad = weight_grad;
    product.partition = p_.partition;
    product.sweep = &sweep;
    product.whole = false;
    GROUPCONV_ISA::Kernels<T>::weight_grad(product);
  }

  static Image<const T> read_only(const Image<T>& image) {
    return {image.data,     image.batch,    image.channels, image.height,  image.width,
            image.stride_n, image.stride_c, image.stride_h, image.stride_w};
  }

  const PointwiseBackwardProblem<T>& p_;
};

}  // namespace
}  // namespace groupconv::cpu
