// Depthwise convolution in NCHW over maps of a few pixels: through a copy with the channels last. It pays where
// rows fill no vector, and tiles of rows take longer to set up than to compute, or where the window is large.
//
// Some groups at a time, so that both copies stay in L1 and the images are read and written once: what is between
// makes no way to L2 and back. In the copies channels lie in the groups' order, whatever it is in the images,
// since either way a channel is a row by pointer: a permutation costs nothing.
#pragma once

#include "cpu/depthwise/channels.h"
#include "cpu/depthwise/grad_channels.h"
#include "cpu/staging/slices.h"

namespace groupconv::cpu {
namespace {

template <class Stored>
class SmallMaps {
  using T = compute_t<Stored>;
  static constexpr int64_t most_pixels = 256;
  static constexpr int64_t least_channels = 2 * Vec<T>::lanes;

 public:
  template <class Element>
  static bool suits(const Image<Element>& image) {
    return image.height * image.width <= most_pixels && image.channels >= least_channels &&
           image.stride_w == 1 && image.stride_h == image.width;
  }
  static bool pays(int64_t width, int64_t window_area) { return width <= 8 || window_area >= 25; }

  // One image, [pixel][channel].
  template <class Element, class Like>
  static Image<Element> copy_of(const Image<Like>& like, Element* memory, int64_t channels) {
    return {memory, 1, channels, like.height, like.width, 0, 1, like.width * channels, channels};
  }
  static void copy_in(const Image<const Stored>& images, int64_t n, const int32_t* channels, int64_t count,
                      T* memory) {
    transpose_rows([&](int64_t i) GROUPCONV_INLINE_LAMBDA { return images.at(n, channels[i], 0, 0); }, count,
                   images.height * images.width,
                   [&](int64_t p) GROUPCONV_INLINE_LAMBDA { return memory + p * count; });
  }
  static void copy_out(const T* memory, const Image<Stored>& images, int64_t n, const int32_t* channels,
                       int64_t count) {
    transpose_rows([&](int64_t p) GROUPCONV_INLINE_LAMBDA { return memory + p * count; },
                   images.height * images.width, count,
                   [&](int64_t i) GROUPCONV_INLINE_LAMBDA { return images.at(n, channels[i], 0, 0); });
  }
};

// How groups are cut so that the copies of one image fit L1.
struct GroupCut {
  int64_t at_once, count;

  GroupCut(const PartitionView& partition, int64_t lanes, int64_t bytes_per_input, int64_t bytes_per_output) {
    constexpr int64_t l1_share = 28 << 10;
    const int64_t groups = partition.groups;
    const int64_t bytes =
        larger((groups * bytes_per_input + partition.out_channels * bytes_per_output) / groups, int64_t{1});
    at_once = larger(l1_share / bytes / lanes, int64_t{1}) * lanes;
    count = divide_up(groups, at_once);
  }
};

template <class Stored>
class DepthwiseSmallMaps {
  using T = compute_t<Stored>;
  using Maps = SmallMaps<Stored>;

 public:
  explicit DepthwiseSmallMaps(const ConvolveProblem<Stored>& problem)
      : p_(problem),
        source_pixels_(p_.source.height * p_.source.width),
        dest_pixels_(p_.dest.height * p_.dest.width),
        cut_(*p_.partition, Vec<T>::lanes, (p_.transposed ? dest_pixels_ : source_pixels_) * size,
             (p_.transposed ? source_pixels_ : dest_pixels_) * size) {}

  static bool suits(const ConvolveProblem<Stored>& p, const Depthwise& depthwise) {
    const Sweep& sweep = *p.sweep;
    if (p.residual.data || sweep.dest_step_h != 1 || sweep.dest_step_w != 1) return false;
    if (sweep.rows != p.dest.height || sweep.cols != p.dest.width) return false;
    if (!Maps::suits(p.source) || !Maps::suits(p.dest)) return false;
    if (!Maps::pays(p.dest.width, p.window_area)) return false;
    ConvolveProblem<Stored> part = p;
    part.source.stride_c = part.dest.stride_c = 1;
    return DepthwiseChannels<Stored>::suits(part, depthwise);
  }

  void run() const {
    constexpr int64_t items_for_a_thread = 4;
    const int64_t units = cut_.count * p_.dest.batch;
    const int64_t items =
        p_.threads.count > 1 ? smaller(units, items_for_a_thread * p_.threads.count) : int64_t{1};
    for_each_item(p_.threads, items, [&](int64_t item) {
      GroupRange groups(*p_.partition, cut_.at_once);
      for (int64_t unit = units * item / items; unit < units * (item + 1) / items; ++unit) {
        const int64_t first = unit / p_.dest.batch * cut_.at_once;
        groups.take(first, smaller(first + cut_.at_once, p_.partition->groups));
        run_groups(unit % p_.dest.batch, groups);
      }
    });
  }

 private:
  static constexpr int64_t size = sizeof(T);

  void run_groups(int64_t n, const GroupRange& groups) const {
    const PartitionView& view = groups.view;
    const int64_t sources = p_.transposed ? view.out_channels : view.in_channels;
    const int64_t dests = p_.transposed ? view.in_channels : view.out_channels;
    const int32_t* from = p_.transposed ? groups.outputs : groups.inputs;
    const int32_t* to = p_.transposed ? groups.inputs : groups.outputs;
    Workspace space;
    space.plan<T>(sources * source_pixels_);
    space.plan<T>(dests * dest_pixels_);
    space.plan<T>(sources);
    space.plan<T>(sources);
    space.plan<T>(dests);
    space.open();
    T* source = space.take<T>(sources * source_pixels_);
    T* dest = space.take<T>(dests * dest_pixels_);
    T* scale = space.take<T>(sources);
    T* shift = space.take<T>(sources);
    T* bias = space.take<T>(dests);

    ConvolveProblem<T> part;
    part.source = Maps::template copy_of<const T>(p_.source, source, sources);
    part.dest = Maps::template copy_of<T>(p_.dest, dest, dests);
    part.weight = p_.weight + groups.first_weight * p_.window_area;
    part.partition = &view;
    part.transposed = p_.transposed;
    part.window_area = p_.window_area;
    part.sweep = p_.sweep;
    part.activation = p_.activation;
    if (p_.prologue) {
      for (int64_t i = 0; i < sources; ++i) {
        scale[i] = p_.prologue.scale[from[i]];
        shift[i] = p_.prologue.shift[from[i]];
      }
      part.prologue = {scale, shift, p_.prologue.relu};
    }
    if (p_.bias) {
      for (int64_t i = 0; i < dests; ++i) bias[i] = p_.bias[to[i]];
      part.bias = bias;
    }
    Maps::copy_in(p_.source, n, from, sources, source);
    DepthwiseChannels<T>(part, Depthwise(view)).run();
    Maps::copy_out(dest, p_.dest, n, to, dests);
  }

  const ConvolveProblem<Stored>& p_;
  int64_t source_pixels_, dest_pixels_;
  GroupCut cut_;
};

template <class Stored>
class DepthwiseGradSmallMaps {
  using T = compute_t<Stored>;
  using Maps = SmallMaps<Stored>;

 public:
  explicit DepthwiseGradSmallMaps(const WeightGradProblem<Stored>& problem)
      : p_(problem),
        input_pixels_(p_.input.height * p_.input.width),
        grad_pixels_(p_.grad.height * p_.grad.width),
        cut_(*p_.partition, Vec<T>::lanes, input_pixels_ * size, grad_pixels_ * size) {}

  static bool suits(const WeightGradProblem<Stored>& p, const Depthwise& depthwise) {
    if (!Maps::suits(p.input) || !Maps::suits(p.grad)) return false;
    if (!Maps::pays(p.grad.width, p.window_area)) return false;
    WeightGradProblem<Stored> part = p;
    part.input.stride_c = part.grad.stride_c = 1;
    return DepthwiseGradChannels<Stored>::suits(part, depthwise);
  }

  void run() const {
    const auto run = [&](int64_t slice, int64_t item, T* weight_grad) {
      const int64_t first = item * cut_.at_once;
      GroupRange groups(*p_.partition, cut_.at_once);
      groups.take(first, smaller(first + cut_.at_once, p_.partition->groups));
      for (int64_t n = p_.input.batch * slice / p_.slices; n < p_.input.batch * (slice + 1) / p_.slices;
           ++n) {
        add_image(n, groups, weight_grad + groups.first_weight * p_.window_area);
      }
    };
    add_slices(p_.threads, p_.slices, cut_.count, p_.weight_grad, p_.partition->entries() * p_.window_area,
               run);
  }

 private:
  static constexpr int64_t size = sizeof(T);

  void add_image(int64_t n, const GroupRange& groups, T* weight_grad) const {
    const PartitionView& view = groups.view;
    Workspace space;
    space.plan<T>(view.in_channels * input_pixels_);
    space.plan<T>(view.out_channels * grad_pixels_);
    space.plan<T>(view.in_channels);
    space.plan<T>(view.in_channels);
    space.open();
    T* input = space.take<T>(view.in_channels * input_pixels_);
    T* grad = space.take<T>(view.out_channels * grad_pixels_);
    T* scale = space.take<T>(view.in_channels);
    T* shift = space.take<T>(view.in_channels);

    WeightGradProblem<T> part;
    part.input = Maps::template copy_of<const T>(p_.input, input, view.in_channels);
    part.grad = Maps::template copy_of<const T>(p_.grad, grad, view.out_channels);
    part.weight_grad = weight_grad;
    part.partition = &view;
    part.window_area = p_.window_area;
    part.sweep = p_.sweep;
    part.whole = p_.whole;
    if (p_.prologue) {
      for (int64_t i = 0; i < view.in_channels; ++i) {
        scale[i] = p_.prologue.scale[groups.inputs[i]];
        shift[i] = p_.prologue.shift[groups.inputs[i]];
      }
      part.prologue = {scale, shift, p_.prologue.relu};
    }
    Maps::copy_in(p_.input, n, groups.inputs, view.in_channels, input);
    Maps::copy_in(p_.grad, n, groups.outputs, view.out_channels, grad);
    DepthwiseGradChannels<T>(part, Depthwise(view)).run();
  }

  const WeightGradProblem<Stored>& p_;
  int64_t input_pixels_, grad_pixels_;
  GroupCut cut_;
};

}  // namespace
}  // namespace groupconv::cpu
