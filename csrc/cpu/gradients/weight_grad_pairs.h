// The driver of the weight gradient of bfloat16 in pairs of pixels, by matrix registers (correlate_registers.h) or vectors
// (correlate_pairs_vector.h), whichever `Products` are.
//
// Left operands are rows of the gradient's pixels, right ones pairs of pixels of 16 inputs, transposed from the
// input's rows. A tap of a window reads the same pairs so many places further on; where that is an odd number, the
// gradient's rows are read one place further on as well, from a copy that has them there.
//
// Both sides are rows in scratch, and small images follow each other there. What is between the rows of a
// window's images is zero in the gradient, and in the input it is what its neighbours read. Were that
// infinite, the sum would be none: then all is done again another way, which skips these places.
//
// A tile of the images fits in L2; of it so many places are multiplied at once that their pairs stay in L1
// while the gradient's rows of all outputs pass over them.
#pragma once

#include "cpu/gradients/correlate_pairs.h"
#include "cpu/gradients/pair_grad_sums.h"
#include "cpu/gradients/pair_sides.h"
#include "cpu/processor/caches.h"
#include "cpu/staging/pair_rows.h"
#include "cpu/staging/workspace.h"

namespace groupconv::cpu {
namespace {

template <class Products>
class PixelPairsGrad {
  using Operand = Pair<BFloat16>;

 public:
  static bool suits(const WeightGradProblem<BFloat16>& p) {
    if (p.prologue || !p.whole || p.sweep->taps.empty()) return false;
    for (const Image<const BFloat16>& image : {p.input, p.grad}) {
      if (image.channels_last() && image.channels < WantedChannels::at_once) return false;
    }
    const PartitionView& partition = *p.partition;
    int64_t possible = 0;
    for (int64_t g = 0; g < partition.groups; ++g) {
      possible += round_up(partition.inputs.count(g), block_cols) *
                  round_up(partition.outputs.count(g), int64_t{Products::outputs_at_once});
    }
    const int64_t quarters = Products::least_quarters(p.input.channels_last() || p.grad.channels_last());
    return 4 * partition.entries() >= quarters * possible &&
           p.grad.batch * p.sweep->rows * p.sweep->cols >= block_depth;
  }

  explicit PixelPairsGrad(const WeightGradProblem<BFloat16>& problem)
      : p_(problem),
        sweep_(*problem.sweep),
        inputs_(p_.partition->inputs),
        outputs_(p_.partition->outputs),
        planes_(sweep_),
        groups_(p_.partition->groups),
        taps_(static_cast<int64_t>(sweep_.taps.size())),
        most_inputs_(p_.partition->most_inputs),
        most_outputs_(p_.partition->most_outputs),
        sides_(p_, planes_, most_inputs_, most_outputs_) {
    for (const Tap& tap : sweep_.taps) any_odd_ |= tap.col % 2 != 0;
    blocks_at_once_ = larger(int64_t{1}, smaller(blocks(most_inputs_), most_blocks / taps_));
  }

  // False, and the gradient zero as it was, where some sum is not finite.
  bool run() const {
    const bool whole = sides_.input_whole || sides_.grad_whole;
    const int64_t group_items = whole ? 1 : groups_, groups_at_once = groups_ / group_items;
    // One group's inputs can be cut without changing any sum.
    const bool cut = groups_ == 1 && p_.slices == 1 && p_.threads.count > 1;
    const int64_t cuts = cut ? smaller(blocks(most_inputs_), 4 * p_.threads.count) : 1;
    const Tiling tiling = cut_into_tiles();
    const PairGradSums sums(p_);
    bool finite = true;
    for_each_round(p_.threads, p_.slices, [&](int64_t first, int64_t end) {
      for_each_item(p_.threads, (end - first) * group_items * cuts, [&](int64_t item) {
        const int64_t part = item % cuts, group = item / cuts % group_items * groups_at_once;
        const int64_t slice = item / cuts / group_items;
        Item here{first + slice, slice, group, group + groups_at_once};
        if (cut) {
          here.first_input = blocks(most_inputs_) * part / cuts * block_cols;
          here.end_input = blocks(most_inputs_) * (part + 1) / cuts * block_cols;
        }
        run_item(here, tiling, sums);
      });
      for_each_item(p_.threads, groups_, [&](int64_t group) {
        if (!sums.store(group, end - first, first > 0)) __atomic_store_n(&finite, false, __ATOMIC_RELAXED);
      });
    });
    if (!finite) fill_zero(p_.weight_grad, p_.partition->entries() * p_.window_area);
    return finite;
  }

 private:
  // Blocks of inputs whose pairs are made together, of a convolution with one tap.
  static constexpr int64_t most_blocks = 4;
  // Of so many places the sums are worth being loaded and stored.
  static constexpr int64_t least_places = 4 * block_depth;
  // Between two runs of so many places memory is asked for some lines.
  static constexpr int64_t places_of_run = 32;

  static int64_t blocks(int64_t channels) { return divide_up(channels, block_cols); }

  // Groups of a slice of the batch, and which of their inputs.
  struct Item {
    int64_t slice, sums;  // which, and which of those whose sums are kept
    int64_t first_group, end_group;
    int64_t first_input = 0, end_input = INT64_MAX;

    int64_t inputs_end(int64_t count) const { return smaller(end_input, count); }
  };

  // Rows, and what they are as operands.
  struct Scratch : PairRows {
    BFloat16* odd_grads;
    Operand* pairs;  // [16 inputs][plane][pair][input]
    int64_t pairs_distance;
    RightOperand* rights;
    PlaceRun* runs;
  };

  // Whole images where all that is staged of one fits half of L2; some, of one group, in less.
  Tiling cut_into_tiles() const {
    // Of what is read 768 KiB; 960 with the gradient's rows one place further on.
    const int64_t inputs = sides_.input_rows * planes_.count, grads = sides_.grad_rows;
    const int64_t all = inputs + grads + block_rows + (any_odd_ ? round_up(most_outputs_, block_rows) : 0);
    Tiling tiling(sweep_, inputs, larger(grads, all * 4 / 5 - inputs), 1, 1);
    if (sweep_.rows > 1) return tiling;
    // Few tiles, and all but the last whole products.
    tiling.across = divide_up(sweep_.cols, larger(most_staged() / bytes_of_place(), block_depth));
    tiling.tile_cols = round_up(divide_up(sweep_.cols, tiling.across), block_depth);
    tiling.count = tiling.across = divide_up(sweep_.cols, tiling.tile_cols);
    return tiling;
  }
  int64_t most_staged() const {
    return sides_.input_whole || sides_.grad_whole ? caches().own / 2 : tile_bytes;
  }
  int64_t bytes_of_place() const {
    return larger(sides_.input_rows * planes_.count + sides_.grad_rows, int64_t{1}) *
           static_cast<int64_t>(sizeof(BFloat16));
  }

  int64_t images_at_once(const Tiling& tiling, int64_t units) const {
    if (tiling.count > 1) return 1;
    const int64_t places = RowPlaces::most(sweep_, tiling.tile(sweep_, 0), 1).size;
    return larger(int64_t{1}, smaller(units, most_staged() / (bytes_of_place() * places)));
  }

  // As many places as have their pairs, and those that taps reach from there, in most of L1.
  int64_t fit_l1() const {
    const int64_t place =
        blocks_at_once_ * block_cols * planes_.count * static_cast<int64_t>(sizeof(BFloat16));
    return caches().nearest * 2 / 5 / place;
  }
  int64_t places_at_once(const RowPlaces& places) const {
    const int64_t fit = larger(fit_l1() - places.reach, least_places);
    return round_up(divide_up(places.padded, divide_up(places.padded, fit)), block_depth);
  }
  int64_t most_pairs(const RowPlaces& most) const {
    const int64_t places = larger(fit_l1(), least_places + most.reach) + block_depth;
    return planes_.count * places / 2;
  }

  void run_item(const Item& item, const Tiling& tiling, const PairGradSums& sums) const {
    const int64_t units = p_.input.batch * tiling.count, end = units * (item.slice + 1) / p_.slices;
    int64_t unit = units * item.slice / p_.slices;
    if (unit == end) {  // fewer tiles than slices
      for (int64_t g = item.first_group; g < item.end_group; ++g) {
        fill_zero(sums.of(item.sums, g), sums.of_group(g));
      }
      return;
    }
    const int64_t at_once = images_at_once(tiling, end - unit);
    const RowPlaces most = RowPlaces::most(sweep_, tiling.tile(sweep_, 0), at_once);

    Scratch scratch{};
    Workspace space;
    scratch.pairs_distance = row_distance<Operand>(most_pairs(most) * block_cols);
    const int64_t odd_size = any_odd_ ? round_up(most_outputs_, block_rows) * sides_.grad_distance(most) : 0;
    sides_.plan(space, most);
    space.plan<BFloat16>(odd_size);
    space.plan<Operand>(blocks_at_once_ * scratch.pairs_distance);
    space.plan<RightOperand>(blocks_at_once_ * taps_);
    const int64_t rows =
        Products::takes_runs ? most.size / most.pitch * at_once + most.padded / places_of_run : 0;
    space.plan<PlaceRun>(rows);
    space.open();
    sides_.open(space, most, scratch);
    scratch.odd_grads = space.take<BFloat16>(odd_size);
    scratch.pairs = space.take<Operand>(blocks_at_once_ * scratch.pairs_distance);
    scratch.rights = space.take<RightOperand>(blocks_at_once_ * taps_);
    scratch.runs = space.take<PlaceRun>(rows);

    [[maybe_unused]] const typename Products::Registers registers;
    int64_t staged = 0;  // images that were, and had their zeros where these have them
    for (bool begins = true; unit < end; begins = false) {
      const Tile tile = tiling.tile(sweep_, unit % tiling.count);
      const int64_t images = smaller(at_once, end - unit);
      const RowPlaces places(sweep_, planes_, tile, images, p_.input.height, p_.input.width);
      const PairBlock block{unit / tiling.count, images, tile, places, places_at_once(places), begins};
      if (images != staged || tiling.count > 1) {
        sides_.clear(block, scratch);
        sides_.list_rows(block, scratch);
        staged = images;
      }
      unit += images;
      // Behind the last images the next group's first are read, since neighbouring items are mostly one thread's.
      const int64_t next = unit < end ? unit : units * item.slice / p_.slices;
      ReadsAhead ahead =
          ahead_of(item, block, unit < end ? item.first_group : item.end_group, next / tiling.count,
                   smaller(at_once, end - next), tiling.tile(sweep_, next % tiling.count));
      add_block(item, block, scratch, sums, ahead);
    }
  }

  // Of one group or of all a tile of the images from n on is read next.
  ReadsAhead ahead_of(const Item& item, const PairBlock& block, int64_t group, int64_t n, int64_t images,
                      const Tile& tile) const {
    ReadsAhead ahead{};
    if (!Products::takes_runs || group == groups_) return ahead;
    const bool one_group = item.end_group - item.first_group == 1;
    if (sides_.input_whole || one_group) {
      const Tile read{tile.row * sweep_.source_step_h, tile.col * sweep_.source_step_w,
                      tile.rows * sweep_.source_step_h, tile.cols * sweep_.source_step_w};
      ahead.input = {p_.input, n, images, {inputs_.of(group), inputs_.count(group)}, read};
    }
    if (sides_.grad_whole || one_group) {
      ahead.grad = {p_.grad, n, images, {outputs_.of(group), outputs_.count(group)}, tile};
    }
    int64_t tiles = 0;
    for (int64_t g = item.first_group; g < item.end_group; ++g) {
      tiles += divide_up(blocks(inputs_.count(g)) * taps_, int64_t{Products::most_right_operands}) *
               divide_up(outputs_.count(g), int64_t{Products::outputs_at_once});
    }
    ahead.share(tiles * divide_up(block.places.padded, places_of_run));
    return ahead;
  }

  void add_block(const Item& item, const PairBlock& block, const Scratch& scratch,
                 const PairGradSums& all_sums, ReadsAhead& ahead) const {
    if (sides_.input_whole) sides_.stage_input({nullptr, p_.input.channels}, block, scratch);
    if (sides_.grad_whole) sides_.stage_grad({nullptr, p_.grad.channels}, block, scratch);
    for (int64_t g = item.first_group; g < item.end_group; ++g) {
      const int64_t ins = item.inputs_end(inputs_.count(g)), outs = outputs_.count(g);
      if (ins == 0 || outs == 0) continue;
      if (!sides_.input_whole && !sides_.input_direct)
        sides_.stage_input({inputs_.of(g), inputs_.count(g)}, block, scratch);
      if (!sides_.grad_whole) sides_.stage_grad({outputs_.of(g), outs}, block, scratch);
      const int64_t sums_of_inputs = all_sums.of_inputs(g);
      const int64_t even = list_rights(block, scratch, sums_of_inputs);
      const BFloat16* grads =
          scratch.grads + (sides_.grad_whole ? outputs_.offsets[g] : 0) * scratch.grad_distance;
      if (any_odd_) shift_rows(grads, outs, block, scratch);
      float* sums = all_sums.of(item.sums, g) + item.first_input / block_cols * sums_of_inputs;
      for (int64_t i = item.first_input; i < ins; i += blocks_at_once_ * block_cols) {
        const int64_t count = smaller(blocks_at_once_ * block_cols, ins - i);
        for (int64_t at = 0; at < block.places.padded; at += block.at_once) {
          pair_pixels(g, i, count, block, at, scratch);
          multiply(block, scratch, grads, outs, at, 0, scratch.rights, even * blocks(count), sums,
                   all_sums.of_block(), ahead);
          multiply(block, scratch, scratch.odd_grads, outs, at, 1, scratch.rights + even * blocks_at_once_,
                   (taps_ - even) * blocks(count), sums, all_sums.of_block(), ahead);
        }
        sums += blocks(count) * sums_of_inputs;
      }
    }
  }

  // Of taps that read an even number of places further on, then of those that read an odd one, each once for
  // every block of inputs. Returns how many taps are even.
  int64_t list_rights(const PairBlock& block, const Scratch& scratch, int64_t sums_of_inputs) const {
    const RowPlaces& places = block.places;
    RightOperand* right = scratch.rights;
    int64_t even = 0;
    for (int64_t odd = 0; odd < 2; ++odd) {
      for (int64_t b = 0; b < blocks_at_once_; ++b) {
        for (int64_t t = 0; t < taps_; ++t) {
          const Tap& tap = sweep_.taps[static_cast<size_t>(t)];
          const int64_t shift = places.shift(tap);
          if (shift % 2 != odd) continue;
          const int64_t place = tap.plane * (block.at_once + places.reach) + shift - odd;
          *right++ = {b * scratch.pairs_distance + place / 2 * block_cols,
                      b * sums_of_inputs + t * block_sums};
        }
      }
      if (odd == 0) even = (right - scratch.rights) / blocks_at_once_;
    }
    return even;
  }

  // One place further on; the last place of each row is zero.
  static void shift_rows(const BFloat16* grads, int64_t rows, const PairBlock& block,
                         const Scratch& scratch) {
    using V_ = Vec<BFloat16>;
    const auto all_but_first = V_::from_bits(~uint32_t{1}), every = V_::first(V_::lanes);
    BFloat16* to = scratch.odd_grads;
    for (int64_t r = 0; r < rows; ++r, grads += scratch.grad_distance, to += scratch.grad_distance) {
      V_::load(grads - 1, all_but_first).store(to, every);
      for (int64_t at = V_::lanes; at < block.places.padded; at += V_::lanes) {
        V_::load(grads + at - 1).store(to + at, every);
      }
    }
  }

  // Places from `at` on of some inputs of a group as right operands.
  void pair_pixels(int64_t group, int64_t first, int64_t count, const PairBlock& block, int64_t at,
                   const Scratch& scratch) const {
    const int32_t* channels = inputs_.of(group) + first;
    const RowPlaces& places = block.places;
    const int64_t end = smaller(at + block.at_once, places.padded);
    for (int64_t c = 0; c < count; c += block_cols) {
      Operand* to = scratch.pairs + c / block_cols * scratch.pairs_distance;
      const auto pair = [&](const auto& row, int64_t pixels, Operand* pairs) {
        const auto from = [&](int64_t r) GROUPCONV_INLINE_LAMBDA {
          return reinterpret_cast<const Operand*>(row(c + r));
        };
        transpose_between(from, smaller(block_cols, count - c), pixels / 2,
                          SpacedColumns<Operand>(pairs, block_cols));
      };
      if (sides_.input_direct) {
        int64_t place = at;
        for (int64_t i = at / places.size; i < block.images && place < end; ++i) {
          const int64_t col = place - i * places.size, pixels = smaller(end, (i + 1) * places.size) - place;
          pair([&](int64_t r) { return p_.input.at(block.n + i, channels[r], 0, block.tile.col + col); },
               pixels, to + (place - at) / 2 * block_cols);
          place += pixels;
        }
        fill_zero(to + (place - at) / 2 * block_cols, (end - place) / 2 * block_cols);
        continue;
      }
      for (int64_t plane = 0; plane < planes_.count; ++plane) {
        const BFloat16* rows = scratch.inputs + plane * places.plane + at;
        pair(
            [&](int64_t r) {
              return rows + (sides_.input_whole ? channels[r] : first + r) * scratch.input_distance;
            },
            end - at + places.reach, to + plane * (block.at_once + places.reach) / 2 * block_cols);
      }
    }
  }

  // The places of [at, at + at_once) that hold pixels of the gradient, which is `odd` places further on. Each is in one
  // run: where there are no zeros between two rows the last pixel of one comes to where the next begins.
  int64_t list_runs(const PairBlock& block, int64_t at, int64_t odd, PlaceRun* runs) const {
    const RowPlaces& places = block.places;
    const int64_t end = smaller(at + block.at_once, places.padded);
    const int64_t begin = larger(at - 2, int64_t{0});  // whose row may reach here
    int64_t done = at;
    PlaceRun* run = runs;
    for (int64_t image = begin / places.size; image < block.images; ++image) {
      const int64_t start = image * places.size;
      for (int64_t row = larger(begin - start, int64_t{0}) / places.pitch; row < block.tile.rows; ++row) {
        const int64_t place = start + row * places.pitch;
        if (place >= end) return run - runs;
        const int64_t last = smaller(place + round_up(block.tile.cols + odd, 2), end);
        for (done = larger(done, place); done < last;) {
          const int64_t count = smaller(places_of_run, last - done);
          *run++ = {done - at, count / 2};
          done += count;
        }
      }
    }
    return run - runs;
  }

  // What all outputs' rows from `at` on, moved by `odd`, and some right operands make of each other.
  void multiply(const PairBlock& block, const Scratch& scratch, const BFloat16* grads, int64_t outs,
                int64_t at, int64_t odd, const RightOperand* rights, int64_t count, float* sums,
                int64_t sums_of_outputs, ReadsAhead& ahead) const {
    if (count == 0) return;
    const int64_t step = divide_up(count, divide_up(count, int64_t{Products::most_right_operands}));
    CorrelatePairsJob job{};
    job.grad_distance = scratch.grad_distance;
    job.pairs = scratch.pairs;
    job.places = smaller(block.at_once, block.places.padded - at);
    job.begins = block.begins && at == 0;
    if constexpr (Products::takes_runs) {
      job.runs = scratch.runs;
      job.run_count = list_runs(block, at, odd, scratch.runs);
      job.ahead = &ahead;
    }
    for (int64_t r = 0; r < outs; r += block_rows, sums += sums_of_outputs) {
      job.grads = grads + r * scratch.grad_distance + at;
      job.outputs = smaller(block_rows, outs - r);
      job.sums = sums;
      for (int64_t i = 0; i < count; i += step) {
        Products::correlate(job, rights + i, smaller(step, count - i));
      }
    }
  }

  const WeightGradProblem<BFloat16>& p_;
  const Sweep& sweep_;
  ChannelLists inputs_, outputs_;
  Planes planes_;
  int64_t groups_, taps_;
  bool any_odd_ = false;  // some tap's neighbour is an odd number of places away
  int64_t most_inputs_, most_outputs_;
  PairSides sides_;
  int64_t blocks_at_once_;  // of 16 inputs
};

}  // namespace
}  // namespace groupconv::cpu
