// The driver of a sweep between channels_last images: forward pass and input gradient with lanes over
// destination channels (multiply_pixels.h).
//
// Prepared once per call, for all tiles and threads: weights packed for the lanes, the offsets at which a
// pixel's inputs lie, and where each destination channel is found among the sums.
//   source   direct: the image as it lies, where no tap leaves it
//            staged: whole pixels copied with their padding, channels in the order in which groups read them
//   dest     direct: groups write runs of neighbouring channels
//            else sums of a few pixels, in the groups' order, permuted in L1 on their way out
#pragma once

#include "cpu/depthwise.h"
#include "cpu/multiply_pixels.h"
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

  // The source pixels around a lattice pixel that some tap reads, in source coordinates.
  struct Reach {
    int64_t top = 0, bottom = 0, left = 0, right = 0;  // first and last, relative to the pixel

    explicit Reach(const Sweep& sweep) {
      for (size_t t = 0; t < sweep.taps.size(); ++t) {
        const Shift shift = shift_of(sweep, sweep.taps[t]);
        top = t ? smaller(top, shift.row) : shift.row;
        bottom = t ? larger(bottom, shift.row) : shift.row;
        left = t ? smaller(left, shift.col) : shift.col;
        right = t ? larger(right, shift.col) : shift.col;
      }
    }
    int64_t rows() const { return bottom - top + 1; }
    int64_t cols() const { return right - left + 1; }
  };

 public:
  static bool suits(const ConvolveProblem<Stored>& p) {
    if constexpr (lanes == 1) return false;
    if (!p.source.channels_last() || !p.dest.channels_last()) return false;
    if (p.transposed && p.partition->inputs_overlap) return false;
    const Sweep& sweep = *p.sweep;
    const Reach reach(sweep);
    // Far taps: most of what would be staged is never read.
    if (reach.rows() * reach.cols() > 4 * static_cast<int64_t>(sweep.taps.size())) return false;
    // Packing the weights has to pay, and lanes have to be filled.
    constexpr int64_t enough_pixels = 64;
    if (p.dest.batch * sweep.rows * sweep.cols < enough_pixels) return false;
    const ChannelLists& dests = p.transposed ? p.partition->inputs : p.partition->outputs;
    int64_t channels = 0, padded = 0;
    for (int64_t g = 0; g < p.partition->groups; ++g) {
      channels += dests.count(g);
      padded += divide_up(dests.count(g), lanes) * lanes;
    }
    return 4 * channels >= 3 * padded;
  }

  explicit PixelConvolution(const ConvolveProblem<Stored>& problem)
      : p_(problem),
        sweep_(*problem.sweep),
        sources_(p_.transposed ? p_.partition->outputs : p_.partition->inputs),
        dests_(p_.transposed ? p_.partition->inputs : p_.partition->outputs),
        groups_(p_.partition->groups),
        taps_(static_cast<int64_t>(sweep_.taps.size())),
        reach_(sweep_),
        finish_(p_.activation) {
    source_direct_ = computes_as_stored && stays_inside();
    dest_direct_ = computes_as_stored && is_clamp(p_.activation) && writes_runs();
    for (int64_t g = 0; g < groups_; ++g) {
      reads_ += sources_.count(g);
      depths_ += sources_.count(g) * taps_;
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
    shared.plan<int64_t>(depths_);
    shared.plan<Block>(block_count_);
    shared.plan<int32_t>(p_.dest.channels);
    shared.plan<int32_t>(reads_);
    const SharedScratch memory(shared.bytes());
    shared.open(memory);
    T* weights = shared.take<T>(weights_);
    T* bias = shared.take<T>(summed_);
    int64_t* offsets = shared.take<int64_t>(depths_);
    blocks_ = shared.take<Block>(block_count_);
    places_ = shared.take<int32_t>(p_.dest.channels);
    order_ = shared.take<int32_t>(reads_);

    const Tiling tiling(sweep_, source_direct_ ? 0 : reads_ * sweep_.source_step_h * sweep_.source_step_w, 0,
                        sizeof(T), p_.threads.run ? divide_up(pieces_for_threads, p_.dest.batch) : 1);
    staged_cols_ = (tiling.tile_cols - 1) * sweep_.source_step_w + reach_.cols();
    staged_pixel_ = row_distance<T>(reads_);
    prepare(weights, bias, offsets);
    for_each_item(p_.threads, p_.dest.batch * tiling.count, [&](int64_t item) {
      run_tile(item / tiling.count, tiling.tile(sweep_, item % tiling.count));
    });
  }

 private:
  bool stays_inside() const {
    const int64_t last_row = (sweep_.rows - 1) * sweep_.source_step_h;
    const int64_t last_col = (sweep_.cols - 1) * sweep_.source_step_w;
    return reach_.top >= 0 && reach_.left >= 0 && last_row + reach_.bottom < p_.source.height &&
           last_col + reach_.right < p_.source.width;
  }

  bool writes_runs() const {
    for (int64_t g = 0; g < groups_; ++g) {
      for (int64_t r = 1; r < dests_.count(g); ++r) {
        if (dests_.of(g)[r] != dests_.of(g)[r - 1] + 1) return false;
      }
    }
    return true;
  }

  // body(first channel, how many, lanes they take)
  template <class Body>
  void for_each_block(int64_t group, const Body& body) const {
    const int64_t count = dests_.count(group);
    for (int64_t first = 0; first < count; first += most_vectors * lanes) {
      const int64_t channels = smaller(most_vectors * lanes, count - first);
      body(first, channels, divide_up(channels, lanes) * lanes);
    }
  }

  void prepare(T* weights, T* bias, int64_t* offsets) {
    const int64_t row_stride = source_direct_ ? p_.source.stride_h : staged_cols_ * staged_pixel_;
    const int64_t pixel_stride = source_direct_ ? p_.source.stride_w : staged_pixel_;
    for (int64_t c = 0; c < p_.dest.channels; ++c) places_[c] = static_cast<int32_t>(summed_);
    int64_t read = 0, sum = 0;
    Block* block = blocks_;
    for (int64_t g = 0; g < groups_; ++g) {
      const int64_t depth = sources_.count(g) * taps_;
      for (int64_t i = 0, j = 0; i < sources_.count(g); ++i, ++read) {
        order_[read] = sources_.of(g)[i];
        reads_in_order_ = reads_in_order_ && order_[read] == read;
        const int64_t channel = source_direct_ ? order_[read] : read;
        for (const Tap& tap : sweep_.taps) {
          const Shift shift = shift_of(sweep_, tap);
          offsets[j++] = (source_direct_ ? shift.row : shift.row - reach_.top) * row_stride +
                         (source_direct_ ? shift.col : shift.col - reach_.left) * pixel_stride + channel;
        }
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
    const int64_t staged_rows = (tile.rows - 1) * sweep_.source_step_h + reach_.rows();
    const int64_t staged_size = source_direct_ ? 0 : staged_rows * staged_cols_ * staged_pixel_;
    const int64_t sums_size = dest_direct_ ? 0 : most_pixels(most_vectors) * row_distance<T>(summed_ + 1);
    Workspace space;
    space.plan<T>(staged_size);
    space.plan<T>(sums_size);
    space.plan<T>(p_.dest.channels);
    space.open();
    T* staged = space.take<T>(staged_size);
    T* sums = space.take<T>(sums_size);
    T* line = space.take<T>(p_.dest.channels);
    if (!source_direct_) stage_pixels(n, tile, staged_rows, staged);

    const int64_t most = most_pixels(most_vectors);
    const int64_t run = divide_up(tile.cols, divide_up(tile.cols, most));
    for (int64_t row = 0; row < tile.rows; ++row) {
      for (int64_t col = 0; col < tile.cols; col += run) {
        const T* source =
            staged + (row * sweep_.source_step_h * staged_cols_ + col * sweep_.source_step_w) * staged_pixel_;
        if constexpr (computes_as_stored) {
          if (source_direct_) {
            source = p_.source.at(n, 0, (tile.row + row) * sweep_.source_step_h,
                                  (tile.col + col) * sweep_.source_step_w);
          }
        }
        run_pixels(n, tile.row + row, tile.col + col, smaller(run, tile.cols - col), source, sums, line);
      }
    }
    release_scratch();
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
    tile.pixel_stride = (source_direct_ ? p_.source.stride_w : staged_pixel_) * sweep_.source_step_w;
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

  void stage_pixels(int64_t n, const Tile& tile, int64_t rows, T* staged) const {
    const int64_t cols = (tile.cols - 1) * sweep_.source_step_w + reach_.cols();
    const int64_t top = tile.row * sweep_.source_step_h + reach_.top;
    const int64_t left = tile.col * sweep_.source_step_w + reach_.left;
    for (int64_t row = 0; row < rows; ++row) {
      for (int64_t col = 0; col < cols; ++col) {
        T* to = staged + (row * staged_cols_ + col) * staged_pixel_;
        const int64_t y = top + row, x = left + col;
        if (y < 0 || y >= p_.source.height || x < 0 || x >= p_.source.width) {
          fill_zero(to, reads_);
          continue;
        }
        const Stored* from = p_.source.at(n, 0, y, x);
        if (reads_in_order_) {
          widen_row(from, 1, to, reads_);
        } else if constexpr (computes_as_stored) {
          for_each_vector<T>(reads_, [&](int64_t i, auto mask) GROUPCONV_INLINE_LAMBDA {
            V_::gather(from, order_ + i, mask).store(to + i, mask);
          });
        } else {
          for (int64_t i = 0; i < reads_; ++i) to[i] = widen(from[order_[i]]);
        }
      }
    }
  }

  const ConvolveProblem<Stored>& p_;
  const Sweep& sweep_;
  ChannelLists sources_, dests_;
  int64_t groups_, taps_;
  Reach reach_;
  Finish<T> finish_;
  bool source_direct_, dest_direct_;
  int64_t reads_ = 0, depths_ = 0, weights_ = 0;
  int64_t block_count_ = 0, summed_ = 0;  // blocks, and the lanes they take
  int64_t staged_cols_ = 0, staged_pixel_ = 0;
  Block* blocks_ = nullptr;
  int32_t* places_ = nullptr;  // of each destination channel among a pixel's sums
  int32_t* order_ = nullptr;   // in which the groups read source channels
  bool reads_in_order_ = true;
};

}  // namespace
}  // namespace groupconv::cpu
