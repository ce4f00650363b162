// The driver of a sweep: forward pass and input gradient, for every layout and every partition.
//
// For each image and tile: source rows (the image itself where it can be used as it lies, else staged),
// then multiply_rows for every group, then the destination (written directly where it is made of rows,
// else unstaged). What is decided once per call:
//   source   direct | staged per group (NCHW) | staged whole (channels_last: all channels of a pixel at once)
//   dest     direct | sums per group          | sums whole (channels_last, or channels written by two groups)
// If neither side is whole, groups are work items of their own.
#pragma once

#include "cpu/convolve_pixels.h"
#include "cpu/depthwise_channels.h"
#include "cpu/depthwise_rows.h"
#include "cpu/multiply.h"
#include "cpu/workspace.h"

namespace groupconv::cpu {
namespace {

template <class Stored>
class Convolution {
  using T = compute_t<Stored>;
  static constexpr bool computes_as_stored = __is_same(Stored, T);

 public:
  explicit Convolution(const ConvolveProblem<Stored>& problem)
      : p_(problem),
        sweep_(*problem.sweep),
        sources_(p_.transposed ? p_.partition->outputs : p_.partition->inputs),
        dests_(p_.transposed ? p_.partition->inputs : p_.partition->outputs),
        planes_(sweep_),
        groups_(p_.partition->groups),
        taps_(static_cast<int64_t>(sweep_.taps.size())),
        finish_(p_.activation) {
    accumulate_ = p_.transposed && p_.partition->inputs_overlap;
    source_direct_ = computes_as_stored && is_one_row(sweep_, p_.source);
    source_whole_ = p_.source.channels_last();
    dest_whole_ = p_.dest.channels_last() || accumulate_;
    dest_direct_ = computes_as_stored && !dest_whole_ && p_.dest.stride_w == 1 && p_.dest.flat() &&
                   sweep_.halo_cols == 0 && sweep_.dest_step_h == 1 && sweep_.dest_step_w == 1 &&
                   is_clamp(p_.activation);
    clear_sums_ = dest_whole_ && p_.transposed && (accumulate_ || !p_.partition->inputs_complete);
    for (int64_t g = 0; g < groups_; ++g) {
      most_sources_ = larger(most_sources_, sources_.count(g));
      most_dests_ = larger(most_dests_, dests_.count(g));
    }
    shared_ = p_.restriction ? groups_ : 0;
    // The first level is done before the second, and both read what is staged once.
    source_whole_ = source_whole_ || (shared_ > 0 && !source_direct_);
    staged_ = source_direct_ ? 0 : source_whole_ ? p_.source.channels : most_sources_;
    summed_ = dest_direct_ ? 0 : dest_whole_ ? p_.dest.channels : most_dests_;
  }

  void run() const {
    const int64_t groups_at_once = source_whole_ || dest_whole_ || shared_ > 0 ? groups_ : 1;
    const int64_t units = p_.dest.batch * groups_ / groups_at_once;
    const int64_t wanted = p_.threads.run ? divide_up(pieces_for_threads, units) : 1;
    const Tiling tiling(sweep_, staged_ * planes_.count, summed_ + shared_, sizeof(T), wanted);
    for_each_item(p_.threads, units * tiling.count, [&](int64_t item) {
      const int64_t first = item / tiling.count * groups_at_once;
      run_tile(first / groups_, tiling.tile(sweep_, item % tiling.count), first % groups_, groups_at_once);
    });
  }

 private:
  void run_tile(int64_t n, const Tile& tile, int64_t first_group, int64_t group_count) const {
    const PlaneShape shape(sweep_, tile);
    const int64_t length = tile_length(tile, shape.pitch);
    const int64_t source_distance = row_distance<T>(planes_.count * shape.size);
    const int64_t sum_distance = row_distance<T>(length);
    const int64_t depth = most_sources_ * taps_ + shared_;

    Workspace space;
    space.plan<T>(staged_ * source_distance);
    space.plan<T>(shared_ * sum_distance);
    space.plan<T>(summed_ * sum_distance);
    space.plan<const T*>(depth);
    space.plan<int64_t>(depth);
    space.plan<T>(depth);
    space.plan<T*>(most_dests_ + 1);
    space.plan<const T*>(most_dests_);
    space.plan<T>(most_dests_);
    space.open();
    T* staged = space.take<T>(staged_ * source_distance);
    T* shared = space.take<T>(shared_ * sum_distance);
    T* sums = space.take<T>(summed_ * sum_distance);
    const T** sources = space.take<const T*>(depth);
    int64_t* steps = space.take<int64_t>(depth);
    T* column = space.take<T>(depth);
    T** dests = space.take<T*>(most_dests_ + 1);
    const T** residuals = space.take<const T*>(most_dests_);
    T* bias = space.take<T>(most_dests_);

    if (source_whole_)
      stage(p_.source, n, {nullptr, staged_}, planes_, tile, shape, staged, source_distance, shape.size);
    if (clear_sums_) fill_zero(sums, summed_ * sum_distance);

    MultiplyJob<T> job{};
    job.sources = sources;
    job.steps = steps;
    job.column = column;
    job.dests = dests;
    job.length = length;
    job.accumulate = accumulate_;
    if (dest_direct_) {
      job.clamped = p_.activation != Activation::none;
      job.low = finish_.range.low;
      job.high = finish_.range.high;
    }

    // Fills `sources` and `steps` with the taps of a group's channels; returns how many there are.
    const auto list_taps = [&](int64_t g) {
      SourceRows<T> rows{staged, source_distance, shape.size, shape.pitch};
      if (source_direct_) rows = {direct(p_.source, n, tile), p_.source.stride_c, 0, 0};
      const bool by_channel = source_direct_ || source_whole_;
      const int64_t channel_step = p_.window_area * (p_.transposed ? p_.partition->inputs.count(g) : 1);
      int64_t j = 0;
      for (int64_t i = 0; i < sources_.count(g); ++i) {
        for (const Tap& tap : sweep_.taps) {
          sources[j] = rows.row(by_channel ? sources_.of(g)[i] : i, tap);
          steps[j++] = i * channel_step + tap.weight;
        }
      }
      return j;
    };

    if (shared_ > 0) {
      MultiplyJob<T> restrict_job = job;
      restrict_job.rows = 1;
      restrict_job.accumulate = restrict_job.clamped = false;
      for (int64_t g = 0; g < groups_; ++g) {
        restrict_job.depth = list_taps(g);
        restrict_job.weight = p_.restriction + sources_.offsets[g] * p_.window_area;
        restrict_job.weight_row_stride = sources_.count(g) * p_.window_area;
        dests[0] = shared + g * sum_distance;
        // Each loaded value meets one weight only, so the taps of a channel have to find it in L1.
        constexpr int64_t narrow = 4 * Vec<T>::lanes;
        for (int64_t pixel = 0; pixel < length; pixel += narrow) {
          multiply_span<T, 1>(restrict_job, 0, pixel, narrow);
        }
      }
      unstage(shared, sum_distance, shape.pitch, {nullptr, shared_}, sweep_, tile,
              Finish<T>(Activation::none), Image<const Stored>{}, p_.shared, n);
    }

    for (int64_t g = first_group; g < first_group + group_count; ++g) {
      const int32_t* to = dests_.of(g);
      job.rows = dests_.count(g);
      if (!source_direct_ && !source_whole_) {
        stage(p_.source, n, {sources_.of(g), sources_.count(g)}, planes_, tile, shape, staged,
              source_distance, shape.size);
      }
      const int64_t reads = p_.partition->inputs.count(g);
      job.depth = list_taps(g);
      for (int64_t i = 0; i < shared_; ++i) {
        sources[job.depth] = shared + i * sum_distance;
        steps[job.depth++] = reads * p_.window_area + i;
      }
      job.weight = p_.weight + p_.partition->weight_offsets[g] * p_.window_area +
                   p_.partition->outputs.offsets[g] * shared_;
      job.weight_row_stride = p_.window_area * (p_.transposed ? 1 : reads) + shared_;

      for (int64_t r = 0; r < job.rows; ++r) {
        if (dest_direct_) {
          dests[r] = direct(p_.dest, n, tile) + to[r] * p_.dest.stride_c;
        } else {
          dests[r] = sums + (dest_whole_ ? to[r] : r) * sum_distance;
        }
      }
      if (p_.bias) {
        for (int64_t r = 0; r < job.rows; ++r) bias[r] = p_.bias[to[r]];
        job.bias = bias;
      }
      if (dest_direct_ && p_.residual.data) {
        for (int64_t r = 0; r < job.rows; ++r) {
          residuals[r] = direct(p_.residual, n, tile) + to[r] * p_.residual.stride_c;
        }
        job.residuals = residuals;
      }

      multiply_rows(job);

      if (!dest_direct_ && !dest_whole_) {
        unstage(sums, sum_distance, shape.pitch, {to, job.rows}, sweep_, tile, finish_, p_.residual, p_.dest,
                n);
      }
    }
    if (dest_whole_) {
      unstage(sums, sum_distance, shape.pitch, {nullptr, summed_}, sweep_, tile, finish_, p_.residual,
              p_.dest, n);
    }
  }

  // Only asked for where images are stored in the type that is computed in.
  template <class Element>
  static auto direct(const Image<Element>& image, int64_t n, const Tile& tile) {
    if constexpr (computes_as_stored) {
      return image.at(n, 0, tile.row, tile.col);
    } else {
      return static_cast<T*>(nullptr);
    }
  }

  const ConvolveProblem<Stored>& p_;
  const Sweep& sweep_;
  ChannelLists sources_, dests_;
  Planes planes_;
  int64_t groups_, taps_;
  Finish<T> finish_;
  bool source_direct_, source_whole_, dest_direct_, dest_whole_, accumulate_, clear_sums_;
  int64_t most_sources_ = 0, most_dests_ = 0;
  int64_t staged_, summed_;  // channels that a tile keeps in scratch
  int64_t shared_;           // channels that every group makes one of and reads all of
};

template <class Stored>
void convolve(const ConvolveProblem<Stored>& problem) {
  if (problem.restriction) return Convolution<Stored>(problem).run();
  if (const Depthwise depthwise(*problem.partition); depthwise.suits) {
    if (DepthwiseChannels<Stored>::suits(problem, depthwise)) {
      return DepthwiseChannels<Stored>(problem, depthwise).run();
    }
    if constexpr (__is_same(Stored, compute_t<Stored>)) {
      if (DepthwiseRows<Stored>::suits(problem)) return DepthwiseRows<Stored>(problem).run();
    }
  }
  if (convolve_pixels(problem)) return;
  Convolution<Stored>(problem).run();
}

}  // namespace
}  // namespace groupconv::cpu
