// The driver of the weight gradient: the forward sweep once more, with correlate_rows in the place of
// multiply_rows. Each tile's rows of the input and of the output gradient are correlated and added to
// the packed gradient.
//
// Small images are staged side by side, several to a tile: they fill the vectors, and the horizontal sums
// at the end of a tile are paid once for all of them.
//
// Work is cut into slices of the batch's tiles, each with a gradient of its own, and (where no side is
// channels_last) into groups. The cut does not depend on the number of threads, and each piece adds in
// a fixed order, so results are the same bit for bit on any number of threads.
#pragma once

#include "cpu/entry.h"
#include "cpu/gradients/pointwise_grad.h"
#include "cpu/gradients/weight_grad_lanes.h"
#include "cpu/gradients/weight_grad_pixels.h"
#include "cpu/gradients/weight_grad_turned.h"
#include "cpu/products/correlate.h"
#include "cpu/staging/slices.h"
#include "cpu/staging/stage.h"
#include "cpu/staging/workspace.h"
#if defined(__AVX512BF16__)
#include "cpu/gradients/correlate_pairs_vector.h"
#include "cpu/gradients/weight_grad_pairs.h"
#endif

namespace groupconv::cpu {
namespace {

// T: what is multiplied.
template <class Stored, class T = compute_t<Stored>>
class WeightGrad {
  static constexpr bool computes_as_stored = __is_same(Stored, T);

 public:
  explicit WeightGrad(const WeightGradProblem<Stored>& problem)
      : p_(problem),
        sweep_(*problem.sweep),
        inputs_(p_.partition->inputs),
        outputs_(p_.partition->outputs),
        planes_(sweep_),
        groups_(p_.partition->groups),
        taps_(static_cast<int64_t>(sweep_.taps.size())),
        most_inputs_(p_.partition->most_inputs),
        most_outputs_(p_.partition->most_outputs) {
    // Below that many pixels the sums at the end of a tile weigh more than staging does.
    constexpr int64_t long_enough = 512;
    const bool alone = p_.input.batch <= p_.slices || sweep_.rows * sweep_.cols >= long_enough;
    input_direct_ = computes_as_stored && alone && !p_.prologue && is_one_row(sweep_, p_.input);
    input_whole_ = p_.input.channels_last();
    grad_direct_ = computes_as_stored && alone && !p_.grad.channels_last() && p_.grad.stride_w == 1 &&
                   p_.grad.flat() && sweep_.halo_cols == 0;
    grad_whole_ = p_.grad.channels_last();
    staged_inputs_ = input_direct_ ? 0 : input_whole_ ? p_.input.channels : most_inputs_;
    staged_grads_ = grad_direct_ ? 0 : grad_whole_ ? p_.grad.channels : most_outputs_;
  }

  void run() const {
    const int64_t groups_at_once = input_whole_ || grad_whole_ ? groups_ : 1;
    const int64_t group_items = groups_ / groups_at_once;
    const Tiling tiling(sweep_, staged_inputs_ * planes_.count, staged_grads_, sizeof(T), 1);
    add_slices(p_.threads, p_.slices, group_items, p_.weight_grad, p_.partition->entries() * p_.window_area,
               [&](int64_t slice, int64_t item, compute_t<Stored>* weight_grad) {
                 run_slice(slice, tiling, {weight_grad, item * groups_at_once, groups_at_once});
               });
  }

 private:
  // Of the gradient.
  struct Groups {
    compute_t<Stored>* weight_grad;  // of all groups
    int64_t first, count;
  };

  void run_slice(int64_t slice, const Tiling& tiling, const Groups& groups) const {
    const int64_t units = p_.input.batch * tiling.count;
    const int64_t end = units * (slice + 1) / p_.slices;
    int64_t unit = units * slice / p_.slices;
    while (unit < end) {
      const Tile tile = tiling.tile(sweep_, unit % tiling.count);
      const int64_t images = tiling.count > 1 ? 1 : smaller(images_at_once(tile), end - unit);
      run_tile(unit / tiling.count, images, tile, groups);
      unit += images;
    }
  }

  // As many as fit the cache with all that is staged of them (twice a tile of the other passes, because
  // correlate_rows walks it in blocks of its own); one where the rows are used as they lie.
  int64_t images_at_once(const Tile& tile) const {
    if (input_direct_ || grad_direct_) return 1;
    const int64_t image_bytes = (staged_inputs_ * planes_.count + staged_grads_) *
                                PlaneShape(sweep_, tile).size * static_cast<int64_t>(sizeof(T));
    return larger(int64_t{1}, 2 * tile_bytes / image_bytes);
  }

  void run_tile(int64_t n, int64_t images, const Tile& tile, const Groups& groups) const {
    const PlaneShape shape(sweep_, tile);
    const int64_t length = (images - 1) * shape.size + tile_length(tile, shape.pitch);
    const int64_t plane_distance = images * shape.size;
    const int64_t source_distance = row_distance<T>(planes_.count * plane_distance);
    const int64_t grad_distance = row_distance<T>(plane_distance);
    const int64_t depth = most_inputs_ * taps_;
    const int64_t vectors = divide_up(length, Vec<T>::lanes);

    Workspace space;
    space.plan<T>(staged_inputs_ * source_distance);
    space.plan<T>(staged_grads_ * grad_distance);
    space.plan<const T*>(depth);
    space.plan<int64_t>(depth);
    space.plan<const T*>(most_outputs_);
    space.plan<uint32_t>(vectors);
    space.open();
    T* staged_inputs = space.take<T>(staged_inputs_ * source_distance);
    T* staged_grads = space.take<T>(staged_grads_ * grad_distance);
    const T** sources = space.take<const T*>(depth);
    int64_t* steps = space.take<int64_t>(depth);
    const T** grads = space.take<const T*>(most_outputs_);
    uint32_t* masks = space.take<uint32_t>(vectors);

    const auto stage_inputs = [&](ChannelSet channels) {
      for (int64_t i = 0; i < images; ++i) {
        stage(p_.input, n + i, channels, planes_, tile, shape, staged_inputs + i * shape.size,
              source_distance, plane_distance, p_.prologue);
      }
    };
    // With the pitch of the staged input, so that both count positions alike.
    const Phase origin{0, 0};
    const Planes lattice(origin);
    const auto stage_grads = [&](ChannelSet channels) {
      for (int64_t i = 0; i < images; ++i) {
        stage(p_.grad, n + i, channels, lattice, tile, shape, staged_grads + i * shape.size, grad_distance,
              plane_distance);
      }
    };
    if (input_whole_) stage_inputs({nullptr, staged_inputs_});
    if (grad_whole_) stage_grads({nullptr, staged_grads_});

    CorrelateJob<T> job{};
    job.grads = grads;
    job.sources = sources;
    job.steps = steps;
    job.length = length;
    if (shape.size != tile.rows * tile.cols) {
      mark_pixels(masks, vectors, images, shape, tile);
      job.lane_masks = masks;
    }

    for (int64_t g = groups.first; g < groups.first + groups.count; ++g) {
      const int32_t* from = inputs_.of(g);
      const int32_t* to = outputs_.of(g);
      job.rows = outputs_.count(g);
      job.depth = inputs_.count(g) * taps_;

      SourceRows<T> rows{staged_inputs, source_distance, plane_distance, shape.pitch};
      if (input_direct_) {
        rows = {direct(p_.input, n, tile), p_.input.stride_c, 0, 0};
      } else if (!input_whole_) {
        stage_inputs({from, inputs_.count(g)});
      }
      if (!grad_direct_ && !grad_whole_) stage_grads({to, job.rows});

      const bool by_channel = input_direct_ || input_whole_;
      for (int64_t i = 0, j = 0; i < inputs_.count(g); ++i) {
        for (const Tap& tap : sweep_.taps) {
          sources[j] = rows.row(by_channel ? from[i] : i, tap);
          steps[j++] = i * p_.window_area + tap.weight;
        }
      }
      for (int64_t r = 0; r < job.rows; ++r) {
        if (grad_direct_) {
          grads[r] = direct(p_.grad, n, tile) + to[r] * p_.grad.stride_c;
        } else {
          grads[r] = staged_grads + (grad_whole_ ? to[r] : r) * grad_distance;
        }
      }
      job.weight_grad = groups.weight_grad + p_.partition->weight_offsets[g] * p_.window_area;
      job.weight_row_stride = inputs_.count(g) * p_.window_area;
      correlate_rows(job);
    }
  }

  static void mark_pixels(uint32_t* masks, int64_t vectors, int64_t images, const PlaneShape& shape,
                          const Tile& tile) {
    constexpr int64_t lanes = Vec<T>::lanes;
    fill_zero(masks, vectors);
    for (int64_t row = 0; row < images * tile.rows; ++row) {
      int64_t at = row / tile.rows * shape.size + row % tile.rows * shape.pitch;
      for (const int64_t end = at + tile.cols; at < end;) {
        const int64_t lane = at % lanes, count = smaller(lanes - lane, end - at);
        masks[at / lanes] |= static_cast<uint32_t>(((uint64_t{1} << count) - 1) << lane);
        at += count;
      }
    }
  }

  template <class Element>
  static const T* direct(const Image<Element>& image, int64_t n, const Tile& tile) {
    if constexpr (computes_as_stored) {
      return image.at(n, 0, tile.row, tile.col);
    } else {
      return nullptr;
    }
  }

  const WeightGradProblem<Stored>& p_;
  const Sweep& sweep_;
  ChannelLists inputs_, outputs_;
  Planes planes_;
  int64_t groups_, taps_;
  bool input_direct_, input_whole_, grad_direct_, grad_whole_;
  int64_t most_inputs_, most_outputs_;
  int64_t staged_inputs_, staged_grads_;
};

template <class Stored>
void weight_grad(const WeightGradProblem<Stored>& problem) {
  if (GROUPCONV_ISA::Kernels<Stored>::depthwise_grad(problem)) return;
  if constexpr (multiplies_stored<Stored>) {
#if defined(__AVX512BF16__)
    using Pairs = PixelPairsGrad<VectorPairProducts>;
    if (Pairs::suits(problem) && Pairs(problem).run()) return;
#endif
  }
  if (PointwiseGrad<Stored>::suits(problem)) return PointwiseGrad<Stored>(problem).run();
  if constexpr (transposes_vectors<Stored>) {
    using Turned = TurnedWeightGrad<Stored>;
    if (Turned::suits(problem)) return Turned(problem).run();
  }
  if (PixelWeightGrad<Stored>::suits(problem)) return PixelWeightGrad<Stored>(problem).run();
  if (LaneWeightGrad<Stored>::suits(problem)) return LaneWeightGrad<Stored>(problem).run();
  if constexpr (multiplies_stored<Stored>) {
    // Neighbouring pixels of rows are pairs as they lie.
    if (!problem.prologue && !problem.input.channels_last() && !problem.grad.channels_last()) {
      return WeightGrad<Stored, Stored>(problem).run();
    }
  }
  WeightGrad<Stored>(problem).run();
}

}  // namespace
}  // namespace groupconv::cpu
