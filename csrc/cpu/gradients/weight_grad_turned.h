// The driver of a pointwise weight gradient between channels_last images whose channels are permuted: through rows.
//
// Some pixels of both images are turned into a row for each channel (transpose.h), whose permutation is then a list of
// pointers; a group's rows are multiplied as those of an NCHW image (pointwise_grad.h). Three transpositions in cache
// take less than the gathering of both images would.
#pragma once

#include "cpu/gradients/pointwise_grad.h"
#include "cpu/staging/sides.h"
#include "cpu/staging/slices.h"
#include "cpu/staging/workspace.h"

namespace groupconv::cpu {
namespace {

template <class T>
class TurnedWeightGrad {
  using Products = PointwiseGrad<T>;
  using Pixels = typename Products::Pixels;
  static constexpr int64_t line = 64 / sizeof(T);

 public:
  static bool suits(const WeightGradProblem<T>& p) {
    constexpr int64_t least_pixels = 64, least_tile = 48, least_width = 8;
    const Sweep& sweep = *p.sweep;
    if (!p.input.channels_last() || !p.grad.channels_last() || p.prologue) return false;
    if (!sweep.pointwise() || sweep.rows != 1 || p.input.height != 1 || p.input.width != sweep.cols)
      return false;
    if (p.input.batch * sweep.cols < least_pixels) return false;
    const int64_t groups = p.partition->groups;
    if (in_order(p.partition->inputs, groups) && in_order(p.partition->outputs, groups)) return false;
    return Products::has_groups(*p.partition, least_width) && most_pixels(p) >= least_tile;
  }

  explicit TurnedWeightGrad(const WeightGradProblem<T>& problem)
      : p_(problem),
        inputs_(p_.partition->inputs),
        outputs_(p_.partition->outputs),
        groups_(p_.partition->groups),
        images_(p_.input.batch),
        pixels_(p_.sweep->cols) {
    if (images_follow(pixels_, p_.input, p_.grad)) {
      pixels_ *= images_;
      images_ = 1;
    }
    const int64_t most = most_pixels(p_);
    cut_ = divide_up(divide_up(pixels_, divide_up(pixels_, most)), line) * line;
  }

  void run() const {
    add_slices(p_.threads, p_.slices, 1, p_.weight_grad, p_.partition->entries(),
               [&](int64_t slice, int64_t, T* weight_grad) { run_slice(slice, weight_grad); });
  }

 private:
  // An odd number of lines, so that rows do not compete for a few sets of the L1.
  static int64_t most_pixels(const WeightGradProblem<T>& p) {
    const int64_t fit =
        most_tile_bytes / static_cast<int64_t>(sizeof(T)) / (p.input.channels + p.grad.channels);
    const int64_t lines = smaller(fit, Products::pixels_in(caches().nearest)) / line;
    return ((lines - 1) | 1) * line;
  }

  void run_slice(int64_t slice, T* weight_grad) const {
    const int64_t distance = row_distance<T>(cut_);
    // The rows as an image.
    WeightGradProblem<T> rows = p_;
    const auto in_rows = [&](Image<const T>& image) {
      image.stride_c = distance;
      image.stride_w = 1;
    };
    in_rows(rows.input);
    in_rows(rows.grad);
    const Products products(rows);
    const int64_t writes = outputs_.offsets[groups_];
    Workspace space;
    space.plan<T>(p_.input.channels * distance);
    space.plan<T>(p_.grad.channels * distance);
    space.plan<const T*>(writes);
    products.plan(space, 0);
    space.open();
    T* inputs = space.take<T>(p_.input.channels * distance);
    T* grads = space.take<T>(p_.grad.channels * distance);
    const T** grad_rows = space.take<const T*>(writes);
    const auto scratch = products.take(space, 0);
    rows.input.data = inputs;
    rows.grad.data = grads;
    for (int64_t r = 0; r < writes; ++r) grad_rows[r] = grads + outputs_.channels[r] * distance;

    const int64_t tiles = divide_up(pixels_, cut_), units = images_ * tiles;
    for (int64_t unit = units * slice / p_.slices; unit < units * (slice + 1) / p_.slices; ++unit) {
      const int64_t image = unit / tiles, tile = unit % tiles;
      const int64_t begin = tile * cut_, count = smaller(cut_, pixels_ - begin);
      transpose_in(p_.input.at(image, 0, 0, begin), p_.input.stride_w, count, p_.input.channels, inputs,
                   distance);
      transpose_in(p_.grad.at(image, 0, 0, begin), p_.grad.stride_w, count, p_.grad.channels, grads,
                   distance);
      const Pixels next{image, begin + count, smaller(cut_, pixels_ - begin - count)};
      typename Products::ReadsAhead later{Products::ahead(p_.input, next, nullptr, p_.input.channels),
                                          Products::ahead(p_.grad, next, nullptr, p_.grad.channels),
                                          products.tiles()};
      for (int64_t g = 0; g < groups_; ++g) {
        products.add(weight_grad, g, {0, 0, count}, grad_rows + outputs_.offsets[g], scratch, &later);
      }
    }
  }

  const WeightGradProblem<T>& p_;
  ChannelLists inputs_, outputs_;
  int64_t groups_, images_, pixels_;  // all images are one where they follow each other
  int64_t cut_;
};

}  // namespace
}  // namespace groupconv::cpu
