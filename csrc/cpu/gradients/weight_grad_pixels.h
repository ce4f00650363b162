// The driver of the weight gradient between channels_last images, with lanes over output channels or over
// input channels, whichever takes fewer instructions (correlate_pixels.h).
//
// A tile of pixels is small enough that what one group reads of it stays in L1 while the group's sums pass
// over it. The sums of all groups are kept, lanes next to each other, until some slices of the batch are done, and are
// then transposed and added to the packed gradient, in order.
#pragma once

#include "cpu/products/correlate_pixels.h"
#include "cpu/staging/pixels.h"
#include "cpu/staging/slices.h"
#include "cpu/staging/workspace.h"

namespace groupconv::cpu {
namespace {

template <class Stored>
class PixelWeightGrad {
  using T = compute_t<Stored>;
  static constexpr int64_t lanes = Vec<T>::lanes;

 public:
  static bool suits(const WeightGradProblem<Stored>& p) {
    if constexpr (lanes == 1) return false;
    if (!p.input.channels_last() || !p.grad.channels_last()) return false;
    if (p.sweep->far_taps) return false;  // most of what would be staged is never read
    return fills_lanes<T>(p.partition->outputs, p.partition->groups) ||
           fills_lanes<T>(p.partition->inputs, p.partition->groups);
  }

  explicit PixelWeightGrad(const WeightGradProblem<Stored>& problem)
      : p_(problem),
        sweep_(*problem.sweep),
        lattice_(lattice_of(sweep_)),
        inputs_(p_.partition->inputs),
        outputs_(p_.partition->outputs),
        groups_(p_.partition->groups),
        taps_(static_cast<int64_t>(sweep_.taps.size())),
        over_inputs_(cost(inputs_, outputs_, groups_) < cost(outputs_, inputs_, groups_)),
        input_(p_.input, sweep_, inputs_, groups_, true, p_.prologue),
        grad_(p_.grad, lattice_, outputs_, groups_, true) {
    for (int64_t g = 0; g < groups_; ++g) {
      most_group_ = larger(most_group_, inputs_.count(g) + outputs_.count(g));
      for_each_block(g, [&](int64_t, int64_t, int64_t width) {
        sums_ += width * singles(g) * taps_;
        most_sums_ = larger(most_sums_, width * singles(g));
        ++blocks_;
      });
    }
  }

  void run() {
    Workspace shared;
    input_.plan(shared);
    grad_.plan(shared);
    const int64_t at_once = slices_at_once(p_.threads, p_.slices);
    shared.plan<T>(at_once * sums_);
    const SharedScratch memory(shared.bytes());
    shared.open(memory);
    input_.open(shared);
    grad_.open(shared);
    T* sums = shared.take<T>(at_once * sums_);

    // What one group reads of a tile stays in L1.
    constexpr int64_t l1_share = 24 << 10;
    const int64_t pixels =
        larger(l1_share / static_cast<int64_t>(sizeof(T)) / larger(most_group_, int64_t{1}), int64_t{16});
    const int64_t wanted = divide_up(sweep_.rows * sweep_.cols, pixels);
    const Tiling tiling(sweep_, input_.staged_per_pixel(), grad_.staged_per_pixel(), sizeof(T), wanted);
    input_.set_widest(tiling.tile_cols);
    grad_.set_widest(tiling.tile_cols);
    const int64_t tiles = p_.input.batch * tiling.count;
    const int64_t parts = p_.threads.count > 1 ? smaller(blocks_, 4 * p_.threads.count) : 1;
    for_each_round(p_.threads, p_.slices, [&](int64_t first, int64_t end) {
      for_each_item(p_.threads, end - first, [&](int64_t i) {
        const int64_t slice = first + i;
        run_slice(tiling, tiles * slice / p_.slices, tiles * (slice + 1) / p_.slices, sums + i * sums_);
      });
      for_each_item(p_.threads, parts, [&](int64_t part) { unpack(sums, first, end, part, parts); });
    });
  }

 private:
  // The output gradient's own pixels: each is read where it is.
  static Sweep lattice_of(const Sweep& sweep) {
    Sweep lattice;
    lattice.rows = sweep.rows;
    lattice.cols = sweep.cols;
    return lattice;
  }

  // Instructions a pixel takes with lanes over the first: a broadcast serves one or two vectors; with one it is
  // part of the multiply-add, but counts like an instruction of its own.
  static int64_t cost(const ChannelLists& vectors, const ChannelLists& singles, int64_t groups) {
    int64_t instructions = 0;
    for (int64_t g = 0; g < groups; ++g) {
      for_each_lane_block<T>(vectors.count(g), [&](int64_t, int64_t, int64_t width) {
        const int64_t v = width / lanes, tiles = divide_up(singles.count(g), tile_channels(width));
        instructions += (1 + v) * singles.count(g) + (4 + v) * tiles;
      });
    }
    return instructions;
  }
  static int64_t tile_channels(int64_t width) { return width > lanes ? most_channels(2) : most_channels(1); }

  // Channels of a group that lanes run over, in blocks, and how many are broadcast.
  template <class Body>
  void for_each_block(int64_t group, const Body& body) const {
    for_each_lane_block<T>(over_inputs_ ? inputs_.count(group) : outputs_.count(group), body);
  }
  int64_t singles(int64_t group) const { return over_inputs_ ? outputs_.count(group) : inputs_.count(group); }

  void run_slice(const Tiling& tiling, int64_t begin, int64_t end, T* sums) const {
    const Tile first = tiling.tile(sweep_, 0);  // no tile is larger
    Workspace space;
    space.plan<T>(input_.staged_size(first));
    space.plan<T>(grad_.staged_size(first));
    space.open();
    T* staged_input = space.take<T>(input_.staged_size(first));
    T* staged_grad = space.take<T>(grad_.staged_size(first));
    fill_zero(sums, sums_);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t n = i / tiling.count;
      const Tile tile = tiling.tile(sweep_, i % tiling.count);
      add_tile(tile, input_.open_tile(n, tile, staged_input), grad_.open_tile(n, tile, staged_grad), sums);
    }
  }

  void add_tile(const Tile& tile, const T* input, const T* grad, T* sums) const {
    CorrelatePixelsJob<T> job{};
    job.rows = tile.rows;
    job.cols = tile.cols;
    const PixelOperand<T> inputs{input, input_.row_stride(), input_.pixel_stride()};
    const PixelOperand<T> grads{grad, grad_.row_stride(), grad_.pixel_stride()};
    int64_t read = 0, written = 0;
    for (int64_t g = 0; g < groups_; ++g) {
      const int64_t count = singles(g);
      for_each_block(g, [&](int64_t first, int64_t channels, int64_t width) {
        job.channels = channels;
        const int64_t step = count ? divide_up(count, divide_up(count, tile_channels(width))) : 1;
        for (const Tap& tap : sweep_.taps) {
          PixelOperand<T> of_input = inputs, of_grad = grads;
          of_input.data += input_.tap_offset(tap) + read;
          of_grad.data += written;
          job.singles = over_inputs_ ? of_grad : of_input;
          job.vectors = over_inputs_ ? of_input : of_grad;
          job.vectors.data += first;
          for (int64_t i = 0; i < count; i += step, job.singles.data += step) {
            job.sums = sums + i * width;
            if (width > lanes) {
              correlate_channels<T, 2>(job, smaller(step, count - i));
            } else {
              correlate_channels<T, 1>(job, smaller(step, count - i));
            }
          }
          sums += count * width;
        }
      });
      read += inputs_.count(g);
      written += outputs_.count(g);
    }
  }

  // Of every `parts`-th block of lanes, from `part` on.
  void unpack(const T* sums, int64_t first_slice, int64_t end_slice, int64_t part, int64_t parts) const {
    const int64_t area = p_.window_area;
    Workspace space;
    space.plan<T>(most_sums_);
    space.open();
    T* turned = space.take<T>(most_sums_);
    int64_t index = 0;
    for (int64_t g = 0; g < groups_; ++g) {
      const int64_t inputs = inputs_.count(g), count = singles(g);
      T* block = p_.weight_grad + p_.partition->weight_offsets[g] * area;
      // Distances in the packed gradient: of lanes, and of what is broadcast.
      const int64_t lane_step = over_inputs_ ? area : inputs * area;
      const int64_t single_step = over_inputs_ ? inputs * area : area;
      for_each_block(g, [&](int64_t first, int64_t channels, int64_t width) {
        const T* of_block = sums;
        sums += taps_ * count * width;
        if (index++ % parts != part) return;
        T* rows = block + first * lane_step;
        for (int64_t slice = first_slice; slice < end_slice; ++slice, of_block += sums_) {
          if (!over_inputs_ && area == 1 && taps_ == 1 && p_.whole) {
            transpose_in(of_block, width, count, channels, slice == 0 ? rows : turned, count);
            for (int64_t i = 0; slice > 0 && i < channels * count; ++i) rows[i] += turned[i];
            continue;
          }
          const T* from = of_block;
          for (const Tap& tap : sweep_.taps) {
            for (int64_t i = 0; i < count; ++i, from += width) {
              T* to = rows + i * single_step + tap.weight;
              for (int64_t r = 0; r < channels; ++r) to[r * lane_step] += from[r];
            }
          }
        }
      });
    }
  }

  const WeightGradProblem<Stored>& p_;
  const Sweep& sweep_;
  Sweep lattice_;
  ChannelLists inputs_, outputs_;
  int64_t groups_, taps_;
  bool over_inputs_;
  PixelSource<Stored> input_, grad_;
  int64_t most_group_ = 0;
  int64_t sums_ = 0, most_sums_ = 0;  // of a slice, of a tap of a block of lanes
  int64_t blocks_ = 0;
};

}  // namespace
}  // namespace groupconv::cpu
