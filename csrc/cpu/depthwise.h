// Depthwise convolution: every group has one source and one destination channel, so nothing is shared
// between channels and the tile of multiply.h would be one row high. Here the reuse is along the window.
//
// NCHW (DepthwiseRows): a channel's padded plane is staged, in tiles that fit L2; the registers hold
//   4 rows × 2 vectors of pixels. For windows 3 high, each loaded source row serves three destination rows: 18 loads for 36
//   multiply-adds, where one row at a time would need 36.
// channels_last (DepthwiseChannels): lanes are channels, nothing is staged; a tile is 4 pixels × 4 vectors
//   of channels (2 where there are 16 registers), the weights transposed to [tap][channel] once an item.
//   Needs every channel to stay where it is; a depthwise convolution that permutes goes the general way.
#pragma once

#include "cpu/pixels.h"
#include "cpu/workspace.h"

namespace groupconv::cpu {
namespace {

GROUPCONV_INLINE bool is_depthwise(const PartitionView& partition) {
  if (partition.groups != partition.out_channels) return false;
  for (int64_t g = 0; g < partition.groups; ++g) {
    if (partition.inputs.count(g) != 1 || partition.outputs.count(g) != 1) return false;
  }
  return !partition.inputs_overlap;
}

GROUPCONV_INLINE bool keeps_channels(const PartitionView& partition) {
  if (partition.in_channels != partition.out_channels) return false;
  for (int64_t g = 0; g < partition.groups; ++g) {
    if (partition.inputs.of(g)[0] != partition.outputs.of(g)[0]) return false;
  }
  return true;
}

constexpr int depthwise_rows = 4;
constexpr int depthwise_vectors = 2;
constexpr int64_t channels_per_item = 16;

template <class T>
class DepthwiseRows {
  using V_ = Vec<T>;
  using Mask = typename V_::Mask;
  static constexpr int lanes = V_::lanes;

 public:
  explicit DepthwiseRows(const ConvolveProblem<T>& problem)
      : p_(problem),
        sweep_(*problem.sweep),
        planes_(sweep_),
        taps_(static_cast<int64_t>(sweep_.taps.size())),
        sources_(p_.transposed ? p_.partition->outputs : p_.partition->inputs),
        dests_(p_.transposed ? p_.partition->inputs : p_.partition->outputs),
        range_(clamp_range<T>(p_.activation)) {
    columns_ = sweep_.halo_cols + 1;
    full_columns_of_three_ = planes_.count == 1 && sweep_.halo_rows == 2 && taps_ == 3 * columns_;
  }

  static bool suits(const ConvolveProblem<T>& p) {
    return is_depthwise(*p.partition) && !p.source.channels_last() && !p.dest.channels_last() &&
           is_clamp(p.activation) && p.dest.stride_w == 1;
  }

  void run() const {
    const int64_t chunks = divide_up(p_.partition->groups, channels_per_item);
    const Tiling tiling(sweep_, planes_.count, 0, sizeof(T), 1);
    for_each_item(p_.threads, p_.dest.batch * chunks, [&](int64_t item) {
      const int64_t n = item / chunks, first = item % chunks * channels_per_item;
      for (int64_t i = 0; i < tiling.count; ++i) {
        run_tile(n, tiling.tile(sweep_, i), first, smaller(first + channels_per_item, p_.partition->groups));
      }
    });
  }

 private:
  struct Plane {
    const T* pixels;
    int64_t pitch, size;
    const T* weight;     // [window]
    const T* by_column;  // [column][3], for windows of full columns three high
  };

  void run_tile(int64_t n, const Tile& tile, int64_t first, int64_t end) const {
    const PlaneShape shape(sweep_, tile);
    Workspace space;
    space.plan<T>(planes_.count * shape.size + 2 * depthwise_vectors * lanes);
    space.plan<T>(taps_);
    space.open();
    T* pixels = space.take<T>(planes_.count * shape.size + 2 * depthwise_vectors * lanes);
    T* by_column = space.take<T>(taps_);
    clear_planes(planes_, shape.size, 1, shape, pixels, 0);
    for (int64_t g = first; g < end; ++g) {
      copy_planes(p_.source, n, {sources_.of(g), 1}, planes_, tile, shape, pixels, int64_t{0}, shape.size);
      const Plane plane{pixels, shape.pitch, shape.size,
                        p_.weight + p_.partition->weight_offsets[g] * p_.window_area, by_column};
      if (full_columns_of_three_) {
        for (const Tap& tap : sweep_.taps) by_column[tap.col * 3 + tap.row] = plane.weight[tap.weight];
      }
      const int64_t channel = dests_.of(g)[0];
      int64_t row = 0;
      for (; row + depthwise_rows <= tile.rows; row += depthwise_rows) {
        run_rows<depthwise_rows>(n, channel, tile, plane, row);
      }
      run_last_rows<depthwise_rows - 1>(n, channel, tile, plane, row);
    }
  }

  template <int R>
  void run_last_rows(int64_t n, int64_t channel, const Tile& tile, const Plane& plane, int64_t row) const {
    if constexpr (R > 0) {
      if (tile.rows - row == R) return run_rows<R>(n, channel, tile, plane, row);
      run_last_rows<R - 1>(n, channel, tile, plane, row);
    }
  }

  template <int R>
  void run_rows(int64_t n, int64_t channel, const Tile& tile, const Plane& plane, int64_t row) const {
    int64_t col = 0;
    for (; tile.cols - col > lanes; col += depthwise_vectors * lanes) {
      run_block<R, depthwise_vectors>(n, channel, tile, plane, row, col);
    }
    if (col < tile.cols) run_block<R, 1>(n, channel, tile, plane, row, col);
  }

  template <int R, int V>
  void run_block(int64_t n, int64_t channel, const Tile& tile, const Plane& plane, int64_t row,
                 int64_t col) const {
    const V_ start = p_.bias ? V_::broadcast(p_.bias[channel]) : zero<T>();
    V_ sums[R][V];
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) sums[r][v] = start;
    }
    const T* pixels = plane.pixels + row * plane.pitch + col;
    if (full_columns_of_three_) {
      for (int64_t c = 0; c < columns_; ++c) {
        const T* weight = plane.by_column + 3 * c;
        const V_ w[3] = {V_::broadcast(weight[0]), V_::broadcast(weight[1]), V_::broadcast(weight[2])};
#pragma GCC unroll 6
        for (int source = 0; source < R + 2; ++source) {
#pragma GCC unroll 2
          for (int v = 0; v < V; ++v) {
            V_ x = V_::load(pixels + source * plane.pitch + c + v * lanes);
            pin(x);
#pragma GCC unroll 3
            for (int k = 0; k < 3; ++k) {
              const int r = source - k;
              if (r >= 0 && r < R) sums[r][v] = multiply_add(w[k], x, sums[r][v]);
            }
          }
        }
      }
    } else {
      for (const Tap& tap : sweep_.taps) {
        const V_ w = V_::broadcast(plane.weight[tap.weight]);
        const T* from = pixels + tap.plane * plane.size + tap.row * plane.pitch + tap.col;
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) {
#pragma GCC unroll 2
          for (int v = 0; v < V; ++v) {
            sums[r][v] = multiply_add(w, V_::load(from + r * plane.pitch + v * lanes), sums[r][v]);
          }
        }
      }
    }
    const int64_t y = (tile.row + row) * sweep_.dest_step_h + sweep_.dest_origin_h;
    const int64_t x = (tile.col + col) * sweep_.dest_step_w + sweep_.dest_origin_w;
    T* dest = p_.dest.at(n, channel, y, x);
    const T* residual = p_.residual.data ? p_.residual.at(n, channel, y, x) : nullptr;
    const int64_t row_stride = sweep_.dest_step_h * p_.dest.stride_h;
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) {
        const int64_t at = r * row_stride + v * lanes * sweep_.dest_step_w;
        store(sums[r][v], dest + at, residual ? residual + at : nullptr,
              smaller<int64_t>(tile.cols - col - v * lanes, lanes));
      }
    }
  }

  GROUPCONV_INLINE void store(V_ sum, T* to, const T* residual, int64_t count) const {
    const Mask mask = V_::first(count);
    if (residual) sum = sum + V_::load(residual, mask);
    if (p_.activation != Activation::none) {
      sum = clamp(V_::broadcast(range_.low), V_::broadcast(range_.high), sum);
    }
    if (sweep_.dest_step_w == 1) {
      sum.store(to, mask);
    } else {
      T row[lanes];
      sum.store(row);
      for (int64_t i = 0; i < count; ++i) to[i * sweep_.dest_step_w] = row[i];
    }
  }

  const ConvolveProblem<T>& p_;
  const Sweep& sweep_;
  Planes planes_;
  int64_t taps_, columns_;
  bool full_columns_of_three_;
  ChannelLists sources_, dests_;
  ClampRange<T> range_;
};

template <class T>
class DepthwiseChannels {
  using V_ = Vec<T>;
  using Mask = typename V_::Mask;
  static constexpr int lanes = V_::lanes;
  static constexpr int pixels_at_once = 4;
  static constexpr int channel_vectors = vector_registers == 32 ? 4 : 2;

 public:
  explicit DepthwiseChannels(const ConvolveProblem<T>& problem)
      : p_(problem),
        sweep_(*problem.sweep),
        taps_(static_cast<int64_t>(sweep_.taps.size())),
        channels_(p_.partition->groups),
        range_(clamp_range<T>(p_.activation)) {}

  static bool suits(const ConvolveProblem<T>& p) {
    return is_depthwise(*p.partition) && p.source.channels_last() && p.dest.channels_last() &&
           is_clamp(p.activation) && keeps_channels(*p.partition);
  }

  void run() const {
    // Every item transposes the weights for itself, which a few pixels would not pay for.
    constexpr int64_t enough_pixels = 64;
    const int64_t wanted = smaller(int64_t{4}, larger(int64_t{1}, sweep_.rows * sweep_.cols / enough_pixels));
    const int64_t rows_per_item = divide_up(sweep_.rows, wanted);
    const int64_t items = divide_up(sweep_.rows, rows_per_item);
    for_each_item(p_.threads, p_.dest.batch * items, [&](int64_t item) {
      Workspace space;
      space.plan<T>(taps_ * channels_);
      space.plan<Shift>(taps_);
      space.open();
      T* weight = space.take<T>(taps_ * channels_);
      Shift* shifts = space.take<Shift>(taps_);
      transpose_weight(weight);
      for (int64_t t = 0; t < taps_; ++t) shifts[t] = shift_of(sweep_, sweep_.taps[static_cast<size_t>(t)]);
      const int64_t first = item % items * rows_per_item;
      for (int64_t row = first; row < smaller(first + rows_per_item, sweep_.rows); ++row) {
        for (int64_t col = 0; col < sweep_.cols; col += pixels_at_once) {
          run_pixels(item / items, row, col, weight, shifts);
        }
      }
    });
  }

 private:
  void transpose_weight(T* weight) const {
    for (int64_t g = 0; g < channels_; ++g) {
      const T* from = p_.weight + p_.partition->weight_offsets[g] * p_.window_area;
      const int64_t channel = p_.partition->outputs.of(g)[0];
      for (int64_t t = 0; t < taps_; ++t) {
        weight[t * channels_ + channel] = from[sweep_.taps[static_cast<size_t>(t)].weight];
      }
    }
  }

  void run_pixels(int64_t n, int64_t row, int64_t col, const T* weight, const Shift* shifts) const {
    int64_t c = 0;
    for (; c + channel_vectors * lanes <= channels_; c += channel_vectors * lanes) {
      run_block<channel_vectors, true>(n, row, col, c, weight, shifts);
    }
    for (; c < channels_; c += lanes) run_block<1, false>(n, row, col, c, weight, shifts);
  }

  // Whole: all V vectors of channels exist; otherwise the only one may end early.
  template <int V, bool Whole>
  void run_block(int64_t n, int64_t row, int64_t col, int64_t channel, const T* weight,
                 const Shift* shifts) const {
    const Mask mask = V_::first(smaller<int64_t>(lanes, channels_ - channel));
    const auto load = [&](const T* from)
                          GROUPCONV_INLINE_LAMBDA { return Whole ? V_::load(from) : V_::load(from, mask); };
    V_ sums[pixels_at_once][V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      const V_ start = p_.bias ? load(p_.bias + channel + v * lanes) : zero<T>();
#pragma GCC unroll 4
      for (int p = 0; p < pixels_at_once; ++p) sums[p][v] = start;
    }
    const int64_t count = smaller<int64_t>(pixels_at_once, sweep_.cols - col);
    const int64_t step = sweep_.source_step_w;
    for (int64_t t = 0; t < taps_; ++t) {
      const int64_t y = row * sweep_.source_step_h + shifts[t].row;
      if (y < 0 || y >= p_.source.height) continue;
      const int64_t x = col * step + shifts[t].col;
      const T* from =
          p_.source.data + n * p_.source.stride_n + y * p_.source.stride_h + x * p_.source.stride_w + channel;
      V_ w[V];
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) w[v] = load(weight + t * channels_ + channel + v * lanes);
      const auto add = [&](int p) GROUPCONV_INLINE_LAMBDA {
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) {
          const V_ value = load(from + p * step * p_.source.stride_w + v * lanes);
          sums[p][v] = multiply_add(w[v], value, sums[p][v]);
        }
      };
      if (count == pixels_at_once && x >= 0 && x + (pixels_at_once - 1) * step < p_.source.width) {
#pragma GCC unroll 4
        for (int p = 0; p < pixels_at_once; ++p) add(p);
      } else {
#pragma GCC unroll 4
        for (int p = 0; p < pixels_at_once; ++p) {
          if (p < count && x + p * step >= 0 && x + p * step < p_.source.width) add(p);
        }
      }
    }
    const int64_t y = row * sweep_.dest_step_h + sweep_.dest_origin_h;
    const int64_t x = col * sweep_.dest_step_w + sweep_.dest_origin_w;
    const int64_t pixel_stride = sweep_.dest_step_w * p_.dest.stride_w;
    T* dest = p_.dest.at(n, channel, y, x);
    const T* residual = p_.residual.data ? p_.residual.at(n, channel, y, x) : nullptr;
    const V_ low = V_::broadcast(range_.low), high = V_::broadcast(range_.high);
#pragma GCC unroll 4
    for (int p = 0; p < pixels_at_once; ++p) {
      if (p >= count) break;
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) {
        const int64_t at = p * pixel_stride + v * lanes;
        V_ sum = sums[p][v];
        if (residual) sum = sum + load(residual + at);
        if (p_.activation != Activation::none) sum = clamp(low, high, sum);
        if (Whole) {
          sum.store(dest + at);
        } else {
          sum.store(dest + at, mask);
        }
      }
    }
  }

  const ConvolveProblem<T>& p_;
  const Sweep& sweep_;
  int64_t taps_, channels_;
  ClampRange<T> range_;
};

}  // namespace
}  // namespace groupconv::cpu
