// Depthwise convolution in NCHW over maps of a few pixels: through a copy with the channels last. Transposing
// costs some 40 cycles for 64 numbers, on the way in and out. It pays where rows fill no vector, and tiles of
// rows take longer to set up than to compute, or where the window is large.
#pragma once

#include "cpu/depthwise_channels.h"
#include "cpu/depthwise_grad_channels.h"

namespace groupconv::cpu {
namespace {

template <class T>
class SmallMaps {
  static constexpr int64_t most_pixels = 256;
  static constexpr int64_t least_channels = 2 * Vec<T>::lanes;
  static constexpr int64_t copy_bytes = 256 << 10;  // of several images at once, to set up once for them

 public:
  template <class Element>
  static bool suits(const Image<Element>& image) {
    return image.height * image.width <= most_pixels && image.channels >= least_channels &&
           image.stride_w == 1 && image.stride_h == image.width;
  }
  static bool pays(int64_t width, int64_t window_area) { return width <= 8 || window_area >= 25; }

  // Images of these sizes are copied together.
  SmallMaps(const Image<const T>& first, int64_t second_size, int64_t batch) {
    const int64_t bytes = (size(first) + second_size) * static_cast<int64_t>(sizeof(T));
    at_once_ = smaller(larger(copy_bytes / larger(bytes, int64_t{1}), int64_t{1}), batch);
  }
  int64_t at_once() const { return at_once_; }

  template <class Element>
  static int64_t size(const Image<Element>& image) {
    return image.channels * image.height * image.width;
  }
  // [image][pixel][channel]
  template <class Element>
  static Image<Element> channels_last(const Image<Element>& like, Element* memory, int64_t batch) {
    const int64_t c = like.channels;
    return {memory, batch, c, like.height, like.width, size(like), 1, like.width * c, c};
  }
  template <class Element>
  static Image<Element> some_of(const Image<Element>& images, int64_t first, int64_t count) {
    Image<Element> some = images;
    some.data = images.at(first, 0, 0, 0);
    some.batch = count;
    return some;
  }
  static Image<const T> copy_in(const Image<const T>& images, T* memory) {
    const int64_t pixels = images.height * images.width;
    for (int64_t n = 0; n < images.batch; ++n) {
      transpose_in(images.at(n, 0, 0, 0), images.stride_c, images.channels, pixels, memory + n * size(images),
                   images.channels);
    }
    return channels_last<const T>(images, memory, images.batch);
  }
  static void copy_out(const T* memory, const Image<T>& images) {
    const int64_t pixels = images.height * images.width;
    for (int64_t n = 0; n < images.batch; ++n) {
      transpose_in(memory + n * size(images), images.channels, pixels, images.channels, images.at(n, 0, 0, 0),
                   images.stride_c);
    }
  }

 private:
  int64_t at_once_;
};

template <class T>
class DepthwiseSmallMaps {
  using Maps = SmallMaps<T>;

 public:
  DepthwiseSmallMaps(const ConvolveProblem<T>& problem, const Depthwise& depthwise)
      : p_(problem),
        depthwise_(depthwise),
        maps_(problem.source, Maps::size(problem.dest), problem.dest.batch) {}

  static bool suits(const ConvolveProblem<T>& p, const Depthwise& depthwise) {
    const Sweep& sweep = *p.sweep;
    if (p.residual.data || sweep.dest_step_h != 1 || sweep.dest_step_w != 1) return false;
    if (sweep.rows != p.dest.height || sweep.cols != p.dest.width) return false;
    if (!Maps::suits(p.source) || !Maps::suits(p.dest)) return false;
    if (!Maps::pays(p.dest.width, p.window_area)) return false;
    return DepthwiseChannels<T>::suits(transposed(p, nullptr, nullptr, 1), depthwise);
  }

  void run() const {
    const int64_t items = divide_up(p_.dest.batch, maps_.at_once());
    for_each_item(p_.threads, items, [&](int64_t item) {
      const int64_t n = item * maps_.at_once(), count = smaller(maps_.at_once(), p_.dest.batch - n);
      Workspace space;
      space.plan<T>(count * Maps::size(p_.source));
      space.plan<T>(count * Maps::size(p_.dest));
      space.open();
      T* source = space.take<T>(count * Maps::size(p_.source));
      T* dest = space.take<T>(count * Maps::size(p_.dest));
      Maps::copy_in(Maps::some_of(p_.source, n, count), source);
      const ConvolveProblem<T> part = transposed(p_, source, dest, count);
      DepthwiseChannels<T>(part, depthwise_).run();
      Maps::copy_out(dest, Maps::some_of(p_.dest, n, count));
    });
  }

 private:
  static ConvolveProblem<T> transposed(const ConvolveProblem<T>& p, const T* source, T* dest, int64_t count) {
    ConvolveProblem<T> part = p;
    part.source = Maps::channels_last(p.source, source, count);
    part.dest = Maps::channels_last(p.dest, dest, count);
    part.threads = {};
    return part;
  }

  const ConvolveProblem<T>& p_;
  const Depthwise& depthwise_;
  Maps maps_;
};

template <class T>
class DepthwiseGradSmallMaps {
  using Maps = SmallMaps<T>;

 public:
  DepthwiseGradSmallMaps(const WeightGradProblem<T>& problem, const Depthwise& depthwise)
      : p_(problem),
        depthwise_(depthwise),
        maps_(problem.input, Maps::size(problem.grad), problem.input.batch) {}

  static bool suits(const WeightGradProblem<T>& p, const Depthwise& depthwise) {
    if (!Maps::suits(p.input) || !Maps::suits(p.grad)) return false;
    if (!Maps::pays(p.grad.width, p.window_area)) return false;
    return DepthwiseGradChannels<T>::suits(transposed(p, nullptr, nullptr, 1), depthwise);
  }

  void run() const {
    for_each_item(p_.threads, p_.slices, [&](int64_t slice) {
      const int64_t batch = p_.input.batch;
      const int64_t end = batch * (slice + 1) / p_.slices;
      Workspace space;
      space.plan<T>(maps_.at_once() * Maps::size(p_.input));
      space.plan<T>(maps_.at_once() * Maps::size(p_.grad));
      space.open();
      T* input = space.take<T>(maps_.at_once() * Maps::size(p_.input));
      T* grad = space.take<T>(maps_.at_once() * Maps::size(p_.grad));
      for (int64_t n = batch * slice / p_.slices; n < end; n += maps_.at_once()) {
        const int64_t count = smaller(maps_.at_once(), end - n);
        Maps::copy_in(Maps::some_of(p_.input, n, count), input);
        Maps::copy_in(Maps::some_of(p_.grad, n, count), grad);
        WeightGradProblem<T> part = transposed(p_, input, grad, count);
        part.weight_grad += slice * p_.partition->entries() * p_.window_area;
        DepthwiseGradChannels<T>(part, depthwise_).run();
      }
    });
  }

 private:
  static WeightGradProblem<T> transposed(const WeightGradProblem<T>& p, const T* input, const T* grad,
                                         int64_t count) {
    WeightGradProblem<T> part = p;
    part.input = Maps::channels_last(p.input, input, count);
    part.grad = Maps::channels_last(p.grad, grad, count);
    part.slices = 1;
    part.threads = {};
    return part;
  }

  const WeightGradProblem<T>& p_;
  const Depthwise& depthwise_;
  Maps maps_;
};

}  // namespace
}  // namespace groupconv::cpu
