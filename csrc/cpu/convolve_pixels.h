// The driver of a sweep between channels_last images: forward pass and input gradient with lanes over
// destination channels (multiply_pixels.h).
//
// Prepared once per call, for all tiles and threads: weights packed for the lanes, the offsets at which a
// pixel's inputs lie, and where each destination channel is found among the sums.
// The source is read as pixels.h gives it, from any channel. The destination is written
//   directly, where groups write runs of neighbouring channels;
//   else as sums of a few pixels in the groups' order, permuted in L1 on their way out.
#pragma once

#include "cpu/multiply_pixels.h"
#include "cpu/pixels.h"
#include "cpu/workspace.h"

namespace groupconv::cpu {
namespace {

template <class Stored>
class PixelConvolution {
  using T = compute_t<Stored>;
  using V_ = Vec<T>;
  static constexpr int64_t lanes = V_::lanes;
  static constexpr bool computes_as_stored = __is_same(Stored, T);

  // One group's destination channels, as many as a tile of registers takes.
  struct Block {
    const T* weight;
    const T* bias;
    const int64_t* offsets;
    int64_t depth, channels;
    int64_t dest;  // first channel: of the image, or among the sums
  };

 public:
  static bool suits(const ConvolveProblem<Stored>& p) {
    if constexpr (lanes == 1) return false;
    if (!p.source.channels_last() || !p.dest.channels_last()) return false;
    if (p.transposed && p.partition->inputs_overlap) return false;
    const Sweep& sweep = *p.sweep;
    if (sweep.far_taps) return false;  // most of what would be staged is never read
    // Packing the weights has to pay, and lanes have to be filled.
    constexpr int64_t enough_pixels = 64;
    if (p.dest.batch * sweep.rows * sweep.cols < enough_pixels) return false;
    return fills_lanes<T>(p.transposed ? p.partition->inputs : p.partition->outputs, p.partition->groups);
  }

  explicit PixelConvolution(const ConvolveProblem<Stored>& problem)
      : p_(problem),
        sweep_(*problem.sweep),
        sources_(p_.transposed ? p_.partition->outputs : p_.partition->inputs),
        dests_(p_.transposed ? p_.partition->inputs : p_.partition->outputs),
        groups_(p_.partition->groups),
        taps_(static_cast<int64_t>(sweep_.taps.size())),
        source_(p_.source, sweep_),
        reads_(PixelSource<Stored>::count_reads(sources_, groups_)),
        finish_(p_.activation) {
    dest_direct_ = computes_as_stored && is_clamp(p_.activation) && writes_runs();
    for (int64_t g = 0; g < groups_; ++g) {
      for_each_block(g, [&](int64_t, int64_t, int64_t width) {
        ++block_count_;
        summed_ += width;
        weights_ += width * sources_.count(g) * taps_;
      });
    }
  }

  void run() {
    Workspace shared;
    shared.plan<T>(weights_);
    shared.plan<T>(summed_);
    shared.plan<int64_t>(reads_ * taps_);
    shared.plan<Block>(block_count_);
    shared.plan<int32_t>(p_.dest.channels);
    shared.plan<int32_t>(reads_);
    const SharedScratch memory(shared.bytes());
    shared.open(memory);
    T* weights = shared.take<T>(weights_);
    T* bias = shared.take<T>(summed_);
    int64_t* offsets = shared.take<int64_t>(reads_ * taps_);
    blocks_ = shared.take<Block>(block_count_);
    places_ = shared.take<int32_t>(p_.dest.channels);
    source_.open(sources_, groups_, false, shared.take<int32_t>(reads_));

    const Tiling tiling(sweep_, source_.staged_per_pixel(), 0, sizeof(T),
                        p_.threads.run ? divide_up(pieces_for_threads, p_.dest.batch) : 1);
    source_.set_widest(tiling.tile_cols);
    prepare(weights, bias, offsets);
    for_each_item(p_.threads, p_.dest.batch * tiling.count, [&](int64_t item) {
      run_tile(item / tiling.count, tiling.tile(sweep_, item % tiling.count));
    });
  }

 private:
  bool writes_runs() const {
    for (int64_t g = 0; g < groups_; ++g) {
      for (int64_t r = 1; r < dests_.count(g); ++r) {
        if (dests_.of(g)[r] != dests_.of(g)[r - 1] + 1) return false;
      }
    }
    return true;
  }

  template <class Body>
  void for_each_block(int64_t group, const Body& body) const {
    for_each_lane_block<T>(dests_.count(group), body);
  }

  void prepare(T* weights, T* bias, int64_t* offsets) {
    for (int64_t c = 0; c < p_.dest.channels; ++c) places_[c] = static_cast<int32_t>(summed_);
    int64_t read = 0, sum = 0;
    Block* block = blocks_;
    for (int64_t g = 0; g < groups_; ++g) {
      const int64_t depth = sources_.count(g) * taps_;
      for (int64_t i = 0, j = 0; i < sources_.count(g); ++i, ++read) {
        for (const Tap& tap : sweep_.taps) offsets[j++] = source_.tap_offset(tap) + source_.channel(read);
      }
      for_each_block(g, [&](int64_t first, int64_t channels, int64_t width) {
        const int32_t* to = dests_.of(g) + first;
        *block++ = {weights, bias, offsets, depth, channels, dest_direct_ ? to[0] : sum};
        for (int64_t r = 0; r < channels; ++r) places_[to[r]] = static_cast<int32_t>(sum + r);
        for (int64_t r = 0; r < width; ++r) bias[r] = p_.bias && r < channels ? p_.bias[to[r]] : T(0);
        pack_weights(g, first, channels, width, weights);
        weights += width * depth;
        bias += width;
        sum += width;
      });
      offsets += depth;
    }
  }

  // weights[j · width + r], zero where no channel is.
  void pack_weights(int64_t group, int64_t first, int64_t channels, int64_t width, T* weights) const {
    const int64_t area = p_.window_area, reads = p_.partition->inputs.count(group);
    const int64_t row = area * (p_.transposed ? 1 : reads), step = area * (p_.transposed ? reads : 1);
    const T* block = p_.weight + p_.partition->weight_offsets[group] * area + first * row;
    const int64_t depth = sources_.count(group) * taps_;
    if (channels < width) fill_zero(weights, depth * width);
    if (!p_.transposed && taps_ == area) {
      transpose_in(block, row, channels, depth, weights, width);
      return;
    }
    for (int64_t i = 0; i < sources_.count(group); ++i) {
      for (const Tap& tap : sweep_.taps) {
        const T* from = block + i * step + tap.weight;
        for (int64_t r = 0; r < channels; ++r) weights[r] = from[r * row];
        weights += width;
      }
    }
  }

  void run_tile(int64_t n, const Tile& tile) const {
    const int64_t most = most_pixels(most_vectors);
    const int64_t sums_size = dest_direct_ ? 0 : most * row_distance<T>(summed_ + 1);
    Workspace space;
    space.plan<T>(source_.staged_size(tile));
    space.plan<T>(sums_size);
    space.plan<T>(p_.dest.channels);
    space.open();
    const T* source = source_.open_tile(n, tile, space.take<T>(source_.staged_size(tile)));
    T* sums = space.take<T>(sums_size);
    T* line = space.take<T>(p_.dest.channels);

    const int64_t run = divide_up(tile.cols, divide_up(tile.cols, most));
    for (int64_t row = 0; row < tile.rows; ++row) {
      for (int64_t col = 0; col < tile.cols; col += run) {
        run_pixels(n, tile.row + row, tile.col + col, smaller(run, tile.cols - col),
                   source + row * source_.row_stride() + col * source_.pixel_stride(), sums, line);
      }
    }
  }

  void run_pixels(int64_t n, int64_t row, int64_t col, int64_t pixels, const T* source, T* sums,
                  T* line) const {
    const int64_t y = row * sweep_.dest_step_h + sweep_.dest_origin_h;
    const int64_t x = col * sweep_.dest_step_w + sweep_.dest_origin_w;
    Stored* dest = p_.dest.at(n, 0, y, x);
    const Stored* residual = p_.residual.data ? p_.residual.at(n, 0, y, x) : nullptr;
    const int64_t dest_pixel = sweep_.dest_step_w * p_.dest.stride_w;

    PixelTile<T> tile{};
    tile.source = source;
    tile.pixel_stride = source_.pixel_stride();
    tile.dest_stride = dest_direct_ ? dest_pixel : row_distance<T>(summed_ + 1);
    tile.clamped = dest_direct_ && p_.activation != Activation::none;
    tile.low = finish_.range.low;
    tile.high = finish_.range.high;
    for (int64_t b = 0; b < block_count_; ++b) {
      const Block& block = blocks_[b];
      tile.offsets = block.offsets;
      tile.depth = block.depth;
      tile.weight = block.weight;
      tile.bias = block.bias;
      tile.channels = block.channels;
      tile.dest = sums + block.dest;
      if constexpr (computes_as_stored) {
        if (dest_direct_) {
          tile.dest = dest + block.dest;
          tile.residual = residual ? residual + block.dest : nullptr;
        }
      }
      if (block.channels > lanes) {
        multiply_pixel_run<T, 2>(tile, pixels);
      } else {
        multiply_pixel_run<T, 1>(tile, pixels);
      }
    }
    for (int64_t p = 0; p < pixels && !dest_direct_; ++p) {
      permute_out(sums + p * tile.dest_stride, residual ? residual + p * dest_pixel : nullptr,
                  dest + p * dest_pixel, line);
    }
  }

  // One pixel's sums from the groups' order to the image's.
  void permute_out(T* sums, const Stored* residual, Stored* dest, T* line) const {
    sums[summed_] = T(0);  // where channels that no group writes are found
    const auto to_line = [&](int64_t c, auto mask) GROUPCONV_INLINE_LAMBDA {
      V_::gather(sums, places_ + c, mask).store(line + c, mask);
    };
    if constexpr (computes_as_stored) {
      if (is_clamp(p_.activation)) {
        const V_ low = V_::broadcast(finish_.range.low), high = V_::broadcast(finish_.range.high);
        return for_each_vector<T>(p_.dest.channels, [&](int64_t c, auto mask) GROUPCONV_INLINE_LAMBDA {
          V_ sum = V_::gather(sums, places_ + c, mask);
          if (residual) sum = sum + V_::load(residual + c, mask);
          clamp(low, high, sum).store(dest + c, mask);
        });
      }
    }
    for_each_vector<T>(p_.dest.channels, to_line);
    finish_run(finish_, line, 1, residual, dest, 1, p_.dest.channels);
  }

  const ConvolveProblem<Stored>& p_;
  const Sweep& sweep_;
  ChannelLists sources_, dests_;
  int64_t groups_, taps_;
  PixelSource<Stored> source_;
  int64_t reads_;
  Finish<T> finish_;
  bool dest_direct_;
  int64_t weights_ = 0;
  int64_t block_count_ = 0, summed_ = 0;  // blocks, and the lanes they take
  Block* blocks_ = nullptr;
  int32_t* places_ = nullptr;  // of each destination channel among a pixel's sums
};

}  // namespace
}  // namespace groupconv::cpu
