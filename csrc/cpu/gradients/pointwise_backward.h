// Backward of a pointwise convolution over rows of pixels: the gradients of input, weight and bias while a
// tile of the output's gradient is in L2, so that it comes from memory once, and its clamp is undone on the
// way. A group is a work item: the rows that it needs of both gradients and of the input fit the L2 together.
// Rows are read where they lie, but for those whose clamp has to be undone. The weight's gradient of groups that are
// wide enough is a sum of outer products, which read less from L2; of others it is made by correlate_rows.
#pragma once

#include "cpu/gradients/clamped_pixels_backward.h"
#include "cpu/gradients/epilogue_grad.h"
#include "cpu/gradients/pointwise_grad.h"
#include "cpu/products/correlate.h"
#include "cpu/products/multiply.h"
#include "cpu/staging/slices.h"
#include "cpu/staging/workspace.h"

namespace groupconv::cpu {
namespace {

template <class T>
class PointwiseBackward {
 public:
  explicit PointwiseBackward(const PointwiseBackwardProblem<T>& problem)
      : p_(problem),
        inputs_(p_.partition->inputs),
        outputs_(p_.partition->outputs),
        pixels_(p_.grad.width),
        clamp_(p_.activation),
        stores_(
            stores_to(p_.input_grad, p_.partition->entries() / larger(p_.input_grad.channels, int64_t{1}))),
        adds_products_(PointwiseGrad<T>::suits_rows(*p_.partition, p_.input, p_.grad)),
        weight_problem_(of_weight(p_)),
        products_(weight_problem_) {}

  void run() const {
    add_slices(p_.threads, p_.slices, p_.partition->groups, p_.weight_grad, p_.partition->entries(),
               [&](int64_t slice, int64_t group, T* weight_grad) { run_group(slice, group, weight_grad); });
  }

 private:
  // Neighbouring pixels of an image.
  struct Tile {
    int64_t image, pixel, pixels;
  };

  static WeightGradProblem<T> of_weight(const PointwiseBackwardProblem<T>& problem) {
    WeightGradProblem<T> weight;
    weight.input = problem.input;
    weight.grad = problem.grad;
    weight.partition = problem.partition;
    return weight;
  }

  void run_group(int64_t slice, int64_t group, T* weight_grad) const {
    constexpr int64_t unit = tile_vectors(max_tile_rows) * Vec<T>::lanes;
    // Of the two gradients and the input; twice a tile of the other passes, as there are no sums besides.
    const int64_t per_pixel = larger(2 * inputs_.count(group) + outputs_.count(group), int64_t{1});
    const int64_t fit = larger(2 * tile_bytes / (per_pixel * static_cast<int64_t>(sizeof(T))), unit);
    const int64_t cut = divide_up(divide_up(pixels_, divide_up(pixels_, fit)), unit) * unit;
    const int64_t end = p_.grad.batch * (slice + 1) / p_.slices;
    for (int64_t n = p_.grad.batch * slice / p_.slices; n < end; ++n) {
      for (int64_t pixel = 0; pixel < pixels_; pixel += cut) {
        run_tile(slice, group, {n, pixel, smaller(cut, pixels_ - pixel)}, weight_grad);
      }
    }
  }

  void run_tile(int64_t slice, int64_t group, const Tile& tile, T* weight_grad) const {
    const int64_t ins = inputs_.count(group), outs = outputs_.count(group);
    const int64_t distance = p_.output.data ? row_distance<T>(tile.pixels) : 0;
    Workspace space;
    space.plan<T>(outs * distance);
    space.plan<const T*>(ins);
    space.plan<const T*>(outs);
    space.plan<int64_t>(ins);
    space.plan<int64_t>(outs);
    space.plan<T>(most_columns<T> * outs);
    space.plan<T*>(ins);
    if (adds_products_) products_.plan(space, group);
    space.open();
    T* unclamped = space.take<T>(outs * distance);
    const T** inputs = space.take<const T*>(ins);
    const T** grads = space.take<const T*>(outs);
    int64_t* input_steps = space.take<int64_t>(ins);
    int64_t* grad_steps = space.take<int64_t>(outs);
    T* columns = space.take<T>(most_columns<T> * outs);
    T** dests = space.take<T*>(ins);

    for (int64_t r = 0; r < outs; ++r) {
      grads[r] = read_grad(slice, outputs_.of(group)[r], tile, unclamped + r * distance);
      grad_steps[r] = r * ins;
    }
    for (int64_t i = 0; i < ins; ++i) {
      inputs[i] = at(p_.input, inputs_.of(group)[i], tile);
      dests[i] = at(p_.input_grad, inputs_.of(group)[i], tile);
      input_steps[i] = i;
    }

    if (adds_products_) {
      products_.add(weight_grad, group, {tile.image, tile.pixel, tile.pixels}, grads,
                    products_.take(space, group));
    } else {
      correlate(weight_grad, group, grads, inputs, input_steps, tile.pixels);
    }

    MultiplyJob<T> to_input{};
    to_input.sources = grads;
    to_input.steps = grad_steps;
    to_input.depth = outs;
    to_input.weight = p_.weight + p_.partition->weight_offsets[group];
    to_input.weight_row_stride = 1;
    to_input.columns = columns;
    to_input.dests = dests;
    to_input.rows = ins;
    to_input.length = tile.pixels;
    to_input.stores = stores_;
    multiply_rows(to_input);
    finish_stores(stores_);
  }

  void correlate(T* weight_grad, int64_t group, const T* const* grads, const T* const* inputs,
                 const int64_t* steps, int64_t pixels) const {
    CorrelateJob<T> to_weight{};
    to_weight.grads = grads;
    to_weight.sources = inputs;
    to_weight.steps = steps;
    to_weight.weight_grad = weight_grad + p_.partition->weight_offsets[group];
    to_weight.weight_row_stride = inputs_.count(group);
    to_weight.rows = outputs_.count(group);
    to_weight.depth = inputs_.count(group);
    to_weight.length = pixels;
    correlate_rows(to_weight);
  }

  // One channel of the gradient under the clamp, and its part of the bias's gradient.
  const T* read_grad(int64_t slice, int64_t channel, const Tile& tile, T* scratch) const {
    const T* grad = at(p_.grad, channel, tile);
    const T* output = p_.output.data ? at(p_.output, channel, tile) : nullptr;
    T* unclamped = output ? scratch : nullptr;
    if (output || p_.bias_grad) {
      const T sum = unclamp_row(clamp_, grad, output, unclamped, tile.pixels);
      if (p_.bias_grad) p_.bias_grad[slice * p_.grad.channels + channel] += sum;
    }
    return output ? unclamped : grad;
  }

  template <class Element>
  static Element* at(const Image<Element>& image, int64_t channel, const Tile& tile) {
    return image.at(tile.image, channel, 0, tile.pixel);
  }

  const PointwiseBackwardProblem<T>& p_;
  ChannelLists inputs_, outputs_;
  int64_t pixels_;
  ClampGrad<T> clamp_;
  Stores stores_;
  bool adds_products_;
  WeightGradProblem<T> weight_problem_;
  PointwiseGrad<T> products_;
};

// Only of what is stored in the type that is computed in: rows are read where they lie.
template <class Stored>
void pointwise_backward(const PointwiseBackwardProblem<Stored>& problem) {
  if constexpr (__is_same(Stored, compute_t<Stored>)) {
    if (problem.part) return ClampedPixelsBackward<Stored>(problem).run();
    PointwiseBackward<Stored>(problem).run();
  }
}

}  // namespace
}  // namespace groupconv::cpu
