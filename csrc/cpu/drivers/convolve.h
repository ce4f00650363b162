// The driver of a sweep: forward pass and input gradient, for every layout and every partition.
//
// For each image and tile: source rows (the image itself where it can be used as it lies, else staged),
// then multiply_rows for every group, then the destination (written directly where it is made of rows,
// else unstaged). What is decided once per call:
//   source   direct | staged per group (NCHW) | staged whole (channels_last: all channels of a pixel at once)
//   dest     direct, gaps between a tile's rows left out | sums per group
//            | sums whole (channels_last, or channels written by two groups)
// If neither side is whole, groups are work items of their own.
#pragma once

#include "cpu/entry.h"
#include "cpu/products/multiply.h"
#include "cpu/staging/stage.h"
#include "cpu/staging/unstage.h"
#include "cpu/staging/weights.h"
#include "cpu/staging/workspace.h"

namespace groupconv::cpu {
namespace {

template <class Stored, class Operand = compute_t<Stored>>
class Convolution {
  using T = compute_t<Stored>;
  static constexpr bool computes_as_stored = __is_same(Stored, T);
  static constexpr bool in_pairs = channels_in<Operand> == 2;
  using Out = std::conditional_t<in_vectors<Stored>, Stored, T>;  // what registers are stored as to an image

 public:
  explicit Convolution(const ConvolveProblem<Stored>& problem)
      : p_(problem),
        sweep_(*problem.sweep),
        sources_(p_.transposed ? p_.partition->outputs : p_.partition->inputs),
        dests_(p_.transposed ? p_.partition->inputs : p_.partition->outputs),
        planes_(sweep_),
        groups_(p_.partition->groups),
        taps_(static_cast<int64_t>(sweep_.taps.size())),
        finish_(p_.activation),
        most_sources_(p_.transposed ? p_.partition->most_outputs : p_.partition->most_inputs),
        most_dests_(p_.transposed ? p_.partition->most_inputs : p_.partition->most_outputs) {
    accumulate_ = p_.transposed && p_.partition->inputs_overlap;
    source_direct_ = computes_as_stored && !p_.prologue && is_one_row(sweep_, p_.source);
    source_whole_ = p_.source.channels_last();
    dest_whole_ = p_.dest.channels_last() || accumulate_;
    const bool writes_stored = computes_as_stored || (__is_same(Out, Stored) && !p_.coarse);
    const bool dest_flat = writes_stored && !dest_whole_ && p_.dest.stride_w == 1 && p_.dest.flat() &&
                           sweep_.dest_step_h == 1 && sweep_.dest_step_w == 1 && is_clamp(p_.activation);
    dest_direct_ = dest_flat && (sweep_.halo_cols == 0 || sweep_.rows == 1);
    clear_sums_ = dest_whole_ && p_.transposed && (accumulate_ || !p_.partition->inputs_complete);
    shared_ = p_.coarse ? groups_ : 0;
    const int64_t read = p_.source.batch * p_.source.channels * p_.source.height * p_.source.width;
    fetches_next_ = source_direct_ && 2 * read * static_cast<int64_t>(sizeof(Stored)) >= caches().own;
    const int64_t depth = p_.partition->entries() * taps_ / larger(p_.dest.channels, int64_t{1});
    if (dest_direct_ && shared_ == 0) stores_ = stores_to(p_.dest, depth);
    staged_ = source_direct_ ? 0 : operands_for<Operand>(source_whole_ ? p_.source.channels : most_sources_);
    dest_gaps_ = has_compress && dest_flat && !dest_direct_ && tiling(0, 1).across == 1;
    dest_direct_ = dest_direct_ || dest_gaps_;
    // The second level is added when the first is done for all groups.
    dest_whole_ = dest_whole_ || (shared_ > 0 && !dest_direct_);
    summed_ = dest_direct_ ? 0 : (dest_whole_ ? p_.dest.channels : most_dests_) + shared_;
    source_flat_ = !source_direct_ && sweep_.rows > 1 && tiling(summed_, 1).across == 1 &&
                   stages_vectors<Stored, Operand>(p_.source, planes_, sweep_.cols + sweep_.halo_cols);
  }

  void run() const {
    const int64_t groups_at_once = source_whole_ || dest_whole_ || shared_ > 0 ? groups_ : 1;
    const int64_t units = p_.dest.batch * groups_ / groups_at_once;
    const Tiling tiles = tiling(
        summed_, larger(p_.threads.run ? divide_up(pieces_for_threads, units) : int64_t{1}, least_tiles()));
    const Sides<Stored> sides(p_);
    const Weights<Stored, Operand> weights(sides, true);
    const Gaps gaps(*this, tiles.tile(sweep_, 0));
    for_each_item(p_.threads, units * tiles.count, [&](int64_t item) {
      const int64_t first = item / tiles.count * groups_at_once;
      const Tile tile = tiles.tile(sweep_, item % tiles.count);
      if (dest_direct_) {
        run_tile<Out>(weights, gaps, first / groups_, tile, first % groups_, groups_at_once);
      } else {
        run_tile<T>(weights, gaps, first / groups_, tile, first % groups_, groups_at_once);
      }
    });
  }

 private:
  // The gaps between rows of a tile's planes and of its sums: tables of all its vectors, or null.
  class Gaps {
   public:
    // `tile`: no other is larger.
    Gaps(const Convolution& of, const Tile& tile) : shape_(of.sweep_, tile), memory_(plan(of)) {
      if (space_.bytes() == 0) return;
      space_.open(memory_);
      const int64_t all = vectors();
      if (of.source_flat_) {
        const int64_t left = -of.planes_.first_col - of.planes_.phases[0].col;
        list_gaps<T>(source_ = space_.take<GapVector>(all), all, shape_.pitch, left,
                     left + of.p_.source.width);
      }
      if (of.dest_gaps_) list_gaps<T>(dest_ = space_.take<GapVector>(all), all, shape_.pitch, 0, tile.cols);
    }

    const GapVector* source() const { return source_; }
    const GapVector* dest() const { return dest_; }

   private:
    int64_t vectors() const { return divide_up(shape_.size, int64_t{Vec<T>::lanes}); }
    size_t plan(const Convolution& of) {
      if (of.source_flat_) space_.plan<GapVector>(vectors());
      if (of.dest_gaps_) space_.plan<GapVector>(vectors());
      return space_.bytes();
    }

    PlaneShape shape_;
    Workspace space_;
    SharedScratch memory_;
    GapVector *source_ = nullptr, *dest_ = nullptr;
  };

  // Of an image. What the second level adds to, tile by tile, stays in L2.
  int64_t least_tiles() const {
    if (shared_ == 0) return 1;
    const int64_t elements = (p_.dest.channels + shared_) * sweep_.rows * sweep_.cols;
    return divide_up(elements * static_cast<int64_t>(sizeof(T)), most_tile_bytes);
  }

  Tiling tiling(int64_t dest_rows, int64_t wanted) const {
    return Tiling(sweep_, staged_ * planes_.count, dest_rows, sizeof(T), wanted);
  }

  void stage_channels([[maybe_unused]] const Gaps& gaps, int64_t n, ChannelSet channels, const Tile& tile,
                      const PlaneShape& shape, Operand* staged, int64_t distance) const {
    if constexpr (expands_rows<Stored>) {
      if (gaps.source()) {
        return stage_vectors(p_.source, n, channels, planes_, tile, shape, gaps.source(), staged, distance,
                             p_.prologue);
      }
    }
    stage(p_.source, n, channels, planes_, tile, shape, staged, distance, shape.size, p_.prologue);
  }

  // Rows that lie where the image has them begin lines where channels are whole lines apart. A copy has to stay in a
  // core's own cache, and scratch small.
  bool copies_tiles() const {
    constexpr int64_t most_bytes = 512 << 10;
    const int64_t bytes = most_sources_ * taps_ * tile_width<Operand> * static_cast<int64_t>(sizeof(Operand));
    return source_direct_ && most_dests_ >= rows_worth_a_copy && bytes <= most_bytes &&
           p_.source.stride_c % Vec<T>::lanes != 0;
  }

  // `To`: of what the rows are that are written, the image's or sums.
  template <class To>
  void run_tile(const Weights<Stored, Operand>& weights, const Gaps& gaps, int64_t n, const Tile& tile,
                int64_t first_group, int64_t group_count) const {
    const PlaneShape shape(sweep_, tile);
    const int64_t length = tile_length(tile, shape.pitch);
    const int64_t source_distance = row_distance<Operand>(planes_.count * shape.size);
    const int64_t sum_distance = row_distance<T>(length);
    const int64_t depth = larger(operands_for<Operand>(most_sources_) * taps_, shared_);
    const int64_t rows = larger(most_dests_, shared_ > 0 ? p_.dest.channels : 0) + 1;

    Workspace space;
    space.plan<Operand>(staged_ * source_distance);
    space.plan<T>(summed_ * sum_distance);
    space.plan<const Operand*>(depth);
    space.plan<int64_t>(depth);
    space.plan<Operand>(most_columns<Operand> * depth);
    space.plan<Operand>(copies_tiles() ? depth * tile_width<Operand> : 0);
    space.plan<const Operand*>(copies_tiles() ? depth : 0);
    space.plan<const Operand*>(fetches_next_ ? depth : 0);
    space.plan<To*>(rows);
    space.plan<const To*>(rows);
    space.plan<T>(rows);
    space.open();
    Operand* staged = space.take<Operand>(staged_ * source_distance);
    T* sums = space.take<T>(summed_ * sum_distance);
    const Operand** sources = space.take<const Operand*>(depth);
    int64_t* steps = space.take<int64_t>(depth);
    Operand* columns = space.take<Operand>(most_columns<Operand> * depth);
    Operand* copy = space.take<Operand>(copies_tiles() ? depth * tile_width<Operand> : 0);
    const Operand** copied = space.take<const Operand*>(copies_tiles() ? depth : 0);
    const Operand** next = space.take<const Operand*>(fetches_next_ ? depth : 0);
    To** dests = space.take<To*>(rows);
    const To** residuals = space.take<const To*>(rows);
    T* bias = space.take<T>(rows);

    if (source_whole_)
      stage(p_.source, n, {nullptr, p_.source.channels}, planes_, tile, shape, staged, source_distance,
            shape.size, p_.prologue);
    if (clear_sums_) fill_zero(sums, summed_ * sum_distance);

    MultiplyJob<Operand, To> job{};
    job.sources = sources;
    job.from_afar = fetches_next_;
    job.steps = steps;
    job.columns = columns;
    if (copies_tiles()) {
      job.tile = copy;
      job.tile_rows = copied;
    }
    job.dests = dests;
    job.length = length;
    job.fetches_weights = !p_.transposed && !caches().follows_rows;
    job.accumulate = accumulate_;
    const bool begins_line = (tile.row * sweep_.cols + tile.col) % Vec<T>::lanes == 0;
    job.stores = stores_ == Stores::streamed && !begins_line ? Stores::fetched : stores_;
    job.gaps = gaps.dest();
    job.pixels = tile.rows * tile.cols;
    if (dest_direct_) {
      job.clamped = p_.activation != Activation::none;
      job.low = finish_.range.low;
      job.high = finish_.range.high;
    }

    // Fills `sources` and `steps` with the taps of a group's channels; returns how many there are.
    const auto list_taps = [&](int64_t g) {
      SourceRows<Operand> rows{staged, source_distance, shape.size, shape.pitch};
      if (source_direct_) rows = {direct<const Operand>(p_.source, n, tile), p_.source.stride_c, 0, 0};
      const bool by_channel = source_direct_ || source_whole_;
      int64_t j = 0;
      for (int64_t i = 0; i < operands_for<Operand>(sources_.count(g)); ++i) {
        for (const Tap& tap : sweep_.taps) {
          sources[j] = rows.row(by_channel ? sources_.of(g)[i] : i, tap);
          steps[j++] = i * weights.source_step(g) + tap.weight;
        }
      }
      return j;
    };

    // As many rows as a group has just read of what is read after it: the next group, or the next image. A list of
    // channels leads anywhere, so nobody else can guess them.
    const auto next_rows = [&](int64_t g) -> const Operand* const* {
      const bool last = g + 1 == groups_;
      const int64_t image = last ? n + 1 : n, group = last ? 0 : g + 1, count = sources_.count(group);
      if (!fetches_next_ || tile.col + tile.cols < sweep_.cols || image == p_.source.batch || count == 0)
        return nullptr;
      const Operand* first = direct<const Operand>(p_.source, image, Tile{});
      for (int64_t j = 0; j < job.depth; ++j) {
        next[j] = first + sources_.of(group)[smaller(j, count - 1)] * p_.source.stride_c;
      }
      return next;
    };

    // Where the sums of a channel go: to the image, or to where its sums are kept.
    const auto row_of = [&](const Image<Stored>& image, int64_t channel, [[maybe_unused]] T* kept) -> To* {
      if constexpr (__is_same(To, T)) {
        if (!dest_direct_) return kept;
      }
      return direct<To>(image, n, tile) + channel * image.stride_c;
    };

    // Where a channel goes that every group makes one of.
    const auto shared_row = [&](int64_t g) {
      return row_of(p_.shared, g, sums + (p_.dest.channels + g) * sum_distance);
    };

    // Fills `dests` and `bias` with where the sums of some channels go and begin.
    const auto list_dests = [&](const int32_t* to, int64_t count) {
      for (int64_t r = 0; r < count; ++r) {
        const int64_t channel = to ? to[r] : r;
        dests[r] = row_of(p_.dest, channel, sums + (dest_whole_ ? channel : r) * sum_distance);
        if (p_.bias) bias[r] = p_.bias[channel];
      }
      job.rows = count;
      job.bias = p_.bias ? bias : nullptr;
    };

    for (int64_t g = first_group; g < first_group + group_count; ++g) {
      const int32_t* to = dests_.of(g);
      if (!source_direct_ && !source_whole_) {
        stage_channels(gaps, n, {sources_.of(g), sources_.count(g)}, tile, shape, staged, source_distance);
      }
      job.depth = list_taps(g);
      job.next = next_rows(g);
      job.weight = weights.of(g);
      job.weight_row_stride = weights.dest_step(g);
      list_dests(to, dests_.count(g));
      if (shared_ > 0) {
        job.bias = nullptr;
        job.weight += sources_.offsets[g] * p_.window_area;  // every group before had a row more
        dests[job.rows++] = shared_row(g);
      }
      if (dest_direct_ && p_.residual.data) {
        for (int64_t r = 0; r < dests_.count(g); ++r) {
          residuals[r] = direct<const To>(p_.residual, n, tile) + to[r] * p_.residual.stride_c;
        }
        job.residuals = residuals;
      }

      multiply_rows(job);

      if (!dest_direct_ && !dest_whole_) {
        unstage(sums, sum_distance, shape.pitch, {to, job.rows}, sweep_, tile, finish_, p_.residual, p_.dest,
                n);
      }
    }
    if constexpr (__is_same(Operand, To)) {
      if (shared_ > 0) {
        if (dest_direct_) {
          job.length = tile.rows * tile.cols;  // which follow each other in the images
          job.gaps = nullptr;
        } else {
          unstage(shared_row(0), sum_distance, shape.pitch, {nullptr, shared_}, sweep_, tile,
                  Finish<T>(Activation::none), Image<const Stored>{}, p_.shared, n);
        }
        for (int64_t i = 0; i < shared_; ++i) {
          sources[i] = shared_row(i);
          steps[i] = i;
        }
        job.next = nullptr;
        job.from_afar = false;
        job.weight = p_.coarse;
        job.depth = job.weight_row_stride = shared_;
        job.accumulate = true;
        list_dests(nullptr, p_.dest.channels);
        multiply_rows(job);
      }
    }
    if (dest_whole_) {
      unstage(sums, sum_distance, shape.pitch, {nullptr, p_.dest.channels}, sweep_, tile, finish_,
              p_.residual, p_.dest, n);
    }
    finish_stores(stores_);
  }

  // Only asked for where the image is stored as what is wanted.
  template <class Wanted, class Element>
  static Wanted* direct(const Image<Element>& image, int64_t n, const Tile& tile) {
    if constexpr (__is_same(Wanted, Element)) {
      return image.at(n, 0, tile.row, tile.col);
    } else {
      return nullptr;
    }
  }

  const ConvolveProblem<Stored>& p_;
  const Sweep& sweep_;
  ChannelLists sources_, dests_;
  Planes planes_;
  int64_t groups_, taps_;
  Finish<T> finish_;
  bool source_direct_, source_whole_, source_flat_;
  bool dest_direct_, dest_whole_, dest_gaps_;  // dest_gaps_: direct, but for the gaps between rows
  bool accumulate_, clear_sums_;
  bool fetches_next_;  // the source is read where it lies, and that is beyond a core's own cache
  Stores stores_ = Stores::plain;
  int64_t most_sources_, most_dests_;  // of one group
  int64_t staged_, summed_;            // channels that a tile keeps in scratch
  int64_t shared_;                     // channels that every group makes one of and every output reads
};

}  // namespace
}  // namespace groupconv::cpu
