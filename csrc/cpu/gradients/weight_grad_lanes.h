// The driver of the weight gradient of a window between NCHW images, with lanes over output channels, or over input
// channels where that takes fewer multiply-adds (correlate_pixels.h).
//
// correlate_rows (weight_grad.h) reads rows of pixels as they lie, but loads 10 vectors for 24 multiply-adds, works
// through the gaps between padded rows, and adds up lanes. Here what a group reads of a tile is transposed to pixels
// of channels: neighbouring taps of a window's row then are neighbours in memory, and together one row of sources
// that the window's next pixel reads one pixel further. A sum belongs to one lane, and no pixel is visited but those
// of the gradient. A transposed element is used once for each tap and each channel of the other side.
//
// Work is cut into groups and slices of the batch's tiles, each with sums of its own, and every piece adds in a fixed
// order. The only slice's sums of a group are in cache when they are added to the gradient; those of several slices are
// kept until then.
#pragma once

#include "cpu/products/correlate_pixels.h"
#include "cpu/staging/pixels.h"
#include "cpu/staging/slices.h"
#include "cpu/staging/workspace.h"
#include "cpu/vector/transpose.h"

namespace groupconv::cpu {
namespace {

// Pixels that are neighbours in memory, of some channels, to pixels of channels: to[place(i) + c].
template <class Stored, class T, class Place>
void transpose_pixels(const Image<const Stored>& image, int64_t n, ChannelSet channels, int64_t y, int64_t x,
                      int64_t count, T* to, const Place& place) {
  constexpr int lanes = Vec<T>::lanes;
  for (int64_t first = 0; first < channels.count; first += lanes) {
    const int64_t present = smaller<int64_t>(lanes, channels.count - first);
    const auto mask = Vec<T>::first(present);
    const Stored* rows[lanes];
    for (int64_t c = 0; c < lanes; ++c)
      rows[c] = image.at(n, channels[first + smaller(c, present - 1)], y, x);
    int64_t at = 0;
    for (; at + lanes <= count; at += lanes) {
      Vec<T> block[lanes];
      load_square([&](int c) GROUPCONV_INLINE_LAMBDA { return rows[c] + at; }, block);
#pragma GCC unroll 16
      for (int i = 0; i < lanes; ++i) block[i].store(to + place(at + i) + first, mask);
    }
    if (at == count) continue;
    Vec<T> block[lanes];
    T rest[lanes * lanes];
    for (int c = 0; c < lanes; ++c) load_widened<T>(rows[c] + at, count - at).store(rest + c * lanes);
    load_square([&](int c) GROUPCONV_INLINE_LAMBDA { return rest + c * lanes; }, block);
    for (int i = 0; at < count; ++i, ++at) block[i].store(to + place(at) + first, mask);
  }
}

template <class Stored>
class LaneWeightGrad {
  using T = compute_t<Stored>;
  static constexpr int64_t lanes = Vec<T>::lanes;

  // Taps that are neighbours in a row of the window.
  struct Run {
    Shift first;
    int64_t taps, begin;  // `begin`: taps of the runs before
  };

 public:
  static bool suits(const WeightGradProblem<Stored>& p) {
    // Transposing a vector takes six instructions on either side.
    constexpr int64_t least_depth = 16;
    if constexpr (lanes == 1 || multiplies_stored<Stored>) return false;
    if (p.input.channels_last() || p.grad.channels_last()) return false;
    if (p.input.stride_w != 1 || p.grad.stride_w != 1) return false;
    if (p.sweep->taps.size() < 2 || p.sweep->far_taps) return false;
    const PartitionView& partition = *p.partition;
    const int64_t groups = partition.groups;
    const bool over_inputs = prefers_inputs(partition);
    const int64_t products = partition.entries() * static_cast<int64_t>(p.sweep->taps.size());
    const auto transposes = [&](const ChannelLists& lanes_over) {
      return products >= least_depth * lanes_over.offsets[groups] && fills_lanes<T>(lanes_over, groups);
    };
    return transposes(over_inputs ? partition.inputs : partition.outputs);
  }

  explicit LaneWeightGrad(const WeightGradProblem<Stored>& problem)
      : p_(problem),
        sweep_(*problem.sweep),
        inputs_(p_.partition->inputs),
        outputs_(p_.partition->outputs),
        groups_(p_.partition->groups),
        taps_(static_cast<int64_t>(sweep_.taps.size())),
        reach_(sweep_),
        over_inputs_(prefers_inputs(*p_.partition)),
        most_inputs_(p_.partition->most_inputs),
        most_outputs_(p_.partition->most_outputs) {}

  void run() const {
    // A group's pixels of a tile stay in L1 as far as its height allows.
    constexpr int64_t l1_share = 32 << 10;
    const int64_t width = over_inputs_ ? most_outputs_ : in_lanes(most_outputs_);
    const int64_t pixels = larger(
        l1_share / static_cast<int64_t>(sizeof(T)) / larger(most_inputs_ + width, int64_t{1}), int64_t{16});
    const Tiling tiling(sweep_, most_inputs_ * sweep_.source_step_h * sweep_.source_step_w, width, sizeof(T),
                        divide_up(sweep_.rows * sweep_.cols, pixels));
    const int64_t units = p_.input.batch * tiling.count;
    const int64_t size = p_.slices == 1 ? 0 : sums_before(groups_);
    const int64_t at_once = slices_at_once(p_.threads, p_.slices);
    const SharedScratch memory(static_cast<size_t>(at_once * size) * sizeof(T));
    T* kept = static_cast<T*>(memory.memory());
    for_each_round(p_.threads, p_.slices, [&](int64_t first, int64_t end) {
      for_each_item(p_.threads, (end - first) * groups_, [&](int64_t item) {
        const int64_t i = item / groups_, group = item % groups_, slice = first + i;
        run_slice(group, tiling, units * slice / p_.slices, units * (slice + 1) / p_.slices,
                  p_.slices == 1 ? nullptr : kept + i * size + sums_before(group));
      });
      for_each_item(p_.threads, p_.slices == 1 ? 0 : groups_, [&](int64_t group) {
        Workspace space;
        space.plan<int64_t>(taps_);
        space.open();
        int64_t* positions = space.take<int64_t>(taps_);
        const T* sums = kept + sums_before(group);
        for (int64_t slice = first; slice < end; ++slice, sums += size)
          add_sums(sums, group, positions, slice == 0);
      });
    });
  }

 private:
  static int64_t in_lanes(int64_t channels) { return divide_up(channels, lanes) * lanes; }

  static bool prefers_inputs(const PartitionView& partition) {
    int64_t by_outputs = 0, by_inputs = 0;
    for (int64_t g = 0; g < partition.groups; ++g) {
      const int64_t ins = partition.inputs.count(g), outs = partition.outputs.count(g);
      by_outputs += ins * in_lanes(outs);
      by_inputs += outs * in_lanes(ins);
    }
    return by_inputs < by_outputs;
  }

  // Of all groups before one.
  int64_t sums_before(int64_t group) const {
    int64_t count = 0;
    for (int64_t g = 0; g < group; ++g) count += sums_size(g);
    return count;
  }
  int64_t sums_size(int64_t group) const {
    const int64_t ins = inputs_.count(group), outs = outputs_.count(group);
    return taps_ * (over_inputs_ ? in_lanes(ins) * outs : in_lanes(outs) * ins);
  }

  int64_t source_rows(const Tile& tile) const {
    return (tile.rows - 1) * sweep_.source_step_h + reach_.rows();
  }
  int64_t source_cols(const Tile& tile) const {
    return (tile.cols - 1) * sweep_.source_step_w + reach_.cols();
  }

  // `kept`: memory for the sums, or null: they are added to the gradient.
  void run_slice(int64_t group, const Tiling& tiling, int64_t begin, int64_t end, T* kept) const {
    const Tile first = tiling.tile(sweep_, 0);  // no tile is larger
    const int64_t ins = inputs_.count(group), outs = outputs_.count(group);
    const int64_t width = over_inputs_ ? outs : in_lanes(outs);  // of the gradient's pixels
    const int64_t own = kept ? 0 : sums_size(group);
    if (ins == 0 || outs == 0) return;
    const int64_t source_size = source_rows(first) * source_cols(first);
    Workspace space;
    space.plan<T>(own);
    space.plan<T>(source_size * ins);
    space.plan<T>(first.rows * first.cols * width);
    space.plan<int32_t>(source_size);
    space.plan<Run>(taps_);
    space.plan<int64_t>(taps_);
    space.plan<T>(p_.prologue ? ins : 0);
    space.plan<T>(p_.prologue ? ins : 0);
    space.open();
    T* sums = space.take<T>(own);
    if (kept) sums = kept;
    T* source = space.take<T>(source_size * ins);
    T* grad = space.take<T>(first.rows * first.cols * width);
    int32_t* places = space.take<int32_t>(source_size);
    Run* runs = space.take<Run>(taps_);
    int64_t* positions = space.take<int64_t>(taps_);
    T* scale = space.take<T>(p_.prologue ? ins : 0);
    T* shift = space.take<T>(p_.prologue ? ins : 0);

    Prologue<T> prologue{};
    if (p_.prologue) {
      for (int64_t i = 0; i < ins; ++i) {
        scale[i] = p_.prologue.scale[inputs_.of(group)[i]];
        shift[i] = p_.prologue.shift[inputs_.of(group)[i]];
      }
      prologue = {scale, shift, p_.prologue.relu};
    }
    const int64_t run_count = list_runs(runs);
    fill_zero(sums, sums_size(group));
    for (int64_t unit = begin; unit < end; ++unit) {
      const Tile tile = tiling.tile(sweep_, unit % tiling.count);
      const int64_t n = unit / tiling.count;
      // Of images that are one tile each the padding is where it was.
      stage_source(n, tile, {inputs_.of(group), ins}, prologue, unit == begin || tiling.count > 1, places,
                   source);
      stage_grad(n, tile, {outputs_.of(group), outs}, width, grad);
      if (over_inputs_) {
        add_tile_over_inputs(tile, ins, outs, source, grad, sums);
      } else {
        add_tile(tile, runs, run_count, ins, outs, source, grad, sums);
      }
    }
    if (!kept) add_sums(sums, group, positions, true);
  }

  // `first`: nothing was added before.
  void add_sums(const T* sums, int64_t group, int64_t* positions, bool first) const {
    const int64_t ins = inputs_.count(group), outs = outputs_.count(group);
    T* weight_grad = p_.weight_grad + p_.partition->weight_offsets[group] * p_.window_area;
    if (over_inputs_) {
      unpack_over_inputs(sums, ins, outs, first && p_.whole, weight_grad);
    } else {
      unpack(sums, ins, outs, positions, weight_grad);
    }
  }

  int64_t list_runs(Run* runs) const {
    int64_t count = 0;
    for (int64_t t = 0; t < taps_; ++t) {
      const Shift shift = shift_of(sweep_, sweep_.taps[static_cast<size_t>(t)]);
      if (count > 0) {
        Run& last = runs[count - 1];
        if (shift.row == last.first.row && shift.col == last.first.col + last.taps) {
          ++last.taps;
          continue;
        }
      }
      runs[count++] = {shift, 1, t};
    }
    return count;
  }

  // All that the taps read of a tile, the padding as zeros.
  void stage_source(int64_t n, const Tile& tile, ChannelSet channels, const Prologue<T>& prologue, bool fresh,
                    int32_t* places, T* source) const {
    const Image<const Stored>& image = p_.input;
    const int64_t top = tile.row * sweep_.source_step_h + reach_.top;
    const int64_t left = tile.col * sweep_.source_step_w + reach_.left;
    const int64_t cols = source_cols(tile);
    const Inside down(top, source_rows(tile), 1, 0, image.height), right(left, cols, 1, 0, image.width);
    const int64_t rows = down.end - down.begin, row_pixels = right.end - right.begin;
    if (fresh) {
      if (rows < source_rows(tile) || row_pixels < cols) {
        fill_zero(source, source_rows(tile) * cols * channels.count);
      }
      int32_t* place = places;
      for (int64_t row = down.begin; row < down.end; ++row) {
        for (int64_t col = right.begin; col < right.end; ++col)
          *place++ = static_cast<int32_t>((row * cols + col) * channels.count);
      }
    }
    // Whole rows follow each other in a flat image.
    const bool one_run = image.flat() && row_pixels == image.width;
    const int64_t run_pixels = one_run ? rows * row_pixels : row_pixels;
    for (int64_t row = 0; run_pixels > 0 && row < (one_run ? 1 : rows); ++row) {
      const int32_t* to = places + row * row_pixels;
      transpose_pixels(image, n, channels, top + down.begin + row, left + right.begin, run_pixels, source,
                       [&](int64_t i) GROUPCONV_INLINE_LAMBDA { return to[i]; });
    }
    for (int64_t i = 0; prologue && i < rows * row_pixels; ++i) {
      prepare_pixel(prologue, source + places[i], source + places[i], channels.count);
    }
  }

  void stage_grad(int64_t n, const Tile& tile, ChannelSet channels, int64_t width, T* grad) const {
    const bool one_run = p_.grad.flat() && tile.cols == p_.grad.width;
    const int64_t run_pixels = one_run ? tile.rows * tile.cols : tile.cols;
    for (int64_t row = 0; row < (one_run ? 1 : tile.rows); ++row, grad += run_pixels * width) {
      transpose_pixels(p_.grad, n, channels, tile.row + row, tile.col, run_pixels, grad,
                       [&](int64_t i) GROUPCONV_INLINE_LAMBDA { return i * width; });
    }
  }

  // sums: [tap][input][lanes of outputs], so that a run's taps and their inputs are one row of sources.
  void add_tile(const Tile& tile, const Run* runs, int64_t run_count, int64_t ins, int64_t outs,
                const T* source, const T* grad, T* sums) const {
    const int64_t width = in_lanes(outs), row = source_cols(tile) * ins;
    CorrelatePixelsJob<T> job{};
    job.rows = tile.rows;
    job.cols = tile.cols;
    job.singles = {source, sweep_.source_step_h * row, sweep_.source_step_w * ins};
    job.vectors = {grad, tile.cols * width, width};
    for (int64_t lane = 0; lane < width; lane += lanes) {
      job.channels = smaller(lanes, outs - lane);
      job.vectors.data = grad + lane;
      for (const Run* run = runs; run < runs + run_count; ++run) {
        const T* first = source + (run->first.row - reach_.top) * row + (run->first.col - reach_.left) * ins;
        const int64_t length = run->taps * ins;
        const int64_t step = divide_up(length, divide_up(length, int64_t{most_channels(1)}));
        for (int64_t j = 0; j < length; j += step) {
          job.singles.data = first + j;
          job.sums = sums + (lane * taps_ + run->begin * lanes) * ins + j * lanes;
          correlate_channels<T, 1>(job, smaller(step, length - j));
        }
      }
    }
  }

  // sums: [lanes of inputs][tap][output][lane].
  void add_tile_over_inputs(const Tile& tile, int64_t ins, int64_t outs, const T* source, const T* grad,
                            T* sums) const {
    const int64_t row = source_cols(tile) * ins;
    CorrelatePixelsJob<T> job{};
    job.rows = tile.rows;
    job.cols = tile.cols;
    job.singles = {grad, tile.cols * outs, outs};
    job.vectors = {source, sweep_.source_step_h * row, sweep_.source_step_w * ins};
    for_each_lane_block<T>(ins, [&](int64_t first, int64_t channels, int64_t width) {
      job.channels = channels;
      const int64_t most = most_channels(static_cast<int>(width / lanes));
      const int64_t step = divide_up(outs, divide_up(outs, most));
      for (const Tap& tap : sweep_.taps) {
        const Shift shift = shift_of(sweep_, tap);
        job.vectors.data = source + (shift.row - reach_.top) * row + (shift.col - reach_.left) * ins + first;
        for (int64_t r = 0; r < outs; r += step) {
          job.singles.data = grad + r;
          job.sums = sums + r * width;
          if (width > lanes) {
            correlate_channels<T, 2>(job, smaller(step, outs - r));
          } else {
            correlate_channels<T, 1>(job, smaller(step, outs - r));
          }
        }
        sums += outs * width;
      }
    });
  }

  // [lanes of inputs][tap][output][lane] to [output][input][tap].
  void unpack_over_inputs(const T* sums, int64_t ins, int64_t outs, bool overwrites, T* weight_grad) const {
    const int64_t area = p_.window_area;
    bool in_order = taps_ == area;
    for (int64_t t = 0; t < taps_; ++t)
      in_order = in_order && sweep_.taps[static_cast<size_t>(t)].weight == t;
    for_each_lane_block<T>(ins, [&](int64_t first, int64_t channels, int64_t width) {
      const int64_t tap_distance = outs * width;
      for (int64_t r = 0; r < outs; ++r) {
        const T* from = sums + r * width;
        T* to = weight_grad + (r * ins + first) * area;
        if (in_order && overwrites) {
          transpose_in(from, tap_distance, taps_, channels, to, area);
          continue;
        }
        for (const Tap& tap : sweep_.taps) {
          for (int64_t i = 0; i < channels; ++i) to[i * area + tap.weight] += from[i];
          from += tap_distance;
        }
      }
      sums += taps_ * tap_distance;
    });
  }

  // [lanes of outputs][tap][input][lane] to [output][input][tap].
  void unpack(const T* sums, int64_t ins, int64_t outs, int64_t* positions, T* weight_grad) const {
    const int64_t area = p_.window_area, entries = ins * area;
    if (taps_ < area) {
      for (int64_t r = 0; r < outs; ++r) {
        const T* from = sums + r / lanes * lanes * taps_ * ins + r % lanes;
        for (const Tap& tap : sweep_.taps) {
          for (int64_t i = 0; i < ins; ++i, from += lanes)
            weight_grad[r * entries + i * area + tap.weight] += *from;
        }
      }
      return;
    }
    for (int64_t t = 0; t < taps_; ++t)
      positions[sweep_.taps[static_cast<size_t>(t)].weight] = t * ins * lanes;
    for (int64_t first = 0; first < outs; first += lanes, sums += taps_ * ins * lanes) {
      const int64_t present = smaller(lanes, outs - first);
      int64_t input = 0, tap = 0;
      for (int64_t e = 0; e < entries; e += lanes) {
        const T* of_entry[lanes];
        for (int64_t i = 0; i < lanes; ++i) {
          of_entry[i] = e + i < entries ? sums + positions[tap] + input * lanes : sums;
          tap = tap + 1 < area ? tap + 1 : 0;
          input += tap == 0;
        }
        Vec<T> block[lanes];
        load_square([&](int i) GROUPCONV_INLINE_LAMBDA { return of_entry[i]; }, block);
        const auto mask = Vec<T>::first(smaller(lanes, entries - e));
        for (int64_t r = 0; r < present; ++r) {
          T* to = weight_grad + (first + r) * entries + e;
          (Vec<T>::load(to, mask) + block[r]).store(to, mask);
        }
      }
    }
  }

  const WeightGradProblem<Stored>& p_;
  const Sweep& sweep_;
  ChannelLists inputs_, outputs_;
  int64_t groups_, taps_;
  Reach reach_;
  bool over_inputs_;
  int64_t most_inputs_, most_outputs_;
};

}  // namespace
}  // namespace groupconv::cpu
