// Depthwise convolution in NCHW: lanes are pixels of a row, read where they lie.
//
// Tile: 4 destination rows × 2 vectors of pixels (1 vector where there are 16 registers or rows are short).
// Down a column of the window, each loaded source vector serves all the rows that it belongs to.
//   registers  8 sums, up to 7 weights, 1 source
//   loads      3×3: 36 sources and 9 weights for 72 multiply-adds; the same image row at three offsets
// A window of 3×3 with stride 1 goes down a strip of one vector of pixels instead, from the map's top to its bottom:
// all weights stay in registers, a source row meets the three rows of sums that it belongs to, and what a tile has to
// set up comes once a strip.
//   registers  9 weights, 3 sums, 1 source
//   loads      3 for 9 multiply-adds
//
// The padding is no memory: columns outside the image are masked out of the loads, rows outside it are one
// row of zeros. Channels are rows by pointer, so permutations and multipliers cost nothing. Behind a prologue
// the rows are those of a channel's copy in L1.
#pragma once

#include "cpu/depthwise.h"
#include "cpu/depthwise_prologue.h"

namespace groupconv::cpu {
namespace {

template <class T>
class DepthwiseRows {
  using V_ = Vec<T>;
  using Mask = typename V_::Mask;
  static constexpr int lanes = V_::lanes;
  static constexpr int tile_rows = 4;
  static constexpr int tile_vectors = vector_registers == 32 ? 2 : 1;

 public:
  explicit DepthwiseRows(const ConvolveProblem<T>& problem)
      : p_(problem),
        sweep_(*problem.sweep),
        grid_(sweep_),
        prepared_(p_.source, p_.prologue, sweep_, grid_),
        range_(clamp_range<T>(p_.activation)) {
    plain_ = !p_.residual.data && p_.activation == Activation::none && sweep_.dest_step_w == 1;
    strips_ = goes_down_strips(sweep_);
  }

  static bool suits(const ConvolveProblem<T>& p) {
    return !p.source.channels_last() && !p.dest.channels_last() && is_clamp(p.activation) &&
           p.dest.stride_w == 1 && (p.source.stride_w == 1 || p.source.width == 1) &&
           p.sweep->source_step_w <= 2;
  }

  // A map of any size is computed without a copy, and with little to set up.
  static bool goes_down_strips(const Sweep& sweep) {
    const TapGrid grid(sweep);
    return grid.rows == 3 && grid.cols == 3 && grid.row_step == 1 && grid.col_step == 1 &&
           sweep.source_step_h == 1 && sweep.source_step_w == 1 && sweep.dest_step_w == 1;
  }

  void run() const {
    constexpr int64_t groups_per_item = 16;
    const int64_t groups = p_.partition->groups;
    const int64_t chunks = divide_up(groups, groups_per_item);
    for_each_item(p_.threads, p_.dest.batch * chunks, [&](int64_t item) {
      const int64_t first = item % chunks * groups_per_item;
      run_groups(item / chunks, first, smaller(first + groups_per_item, groups));
    });
  }

 private:
  struct Tables {
    uint32_t* inside;  // [vector][column of the window]: which of the source pixels of a load exist
    T* zeros;          // an image row outside the image
    T* weight;         // [source][column][row], of one destination channel
    int64_t taps[9];   // of a 3×3 window, by rows: where in a channel's weights
  };
  // A destination channel and the source channels that it sums, or the rows of it that are made from the one
  // source channel of a forward pass.
  struct Channel {
    int64_t n, dest;
    const int32_t* sources;
    int64_t count;
    Band<T> band;
  };

  void run_groups(int64_t n, int64_t first, int64_t end) const {
    const PartitionView& partition = *p_.partition;
    // A tile may end in a vector that has no pixels.
    const int64_t vectors = divide_up(sweep_.cols, lanes) + tile_vectors - 1;
    const int64_t taps = grid_.rows * grid_.cols;
    int64_t most_sources = 1;
    for (int64_t g = first; g < end && p_.transposed; ++g) {
      most_sources = larger(most_sources, partition.outputs.count(g));
    }
    Workspace space;
    space.plan<uint32_t>(vectors * grid_.cols);
    space.plan<T>(p_.source.width);
    space.plan<T>(most_sources * taps);
    space.plan<T>(prepared_.size());
    space.open();
    Tables tables{};
    tables.inside = space.take<uint32_t>(vectors * grid_.cols);
    tables.zeros = space.take<T>(p_.source.width);
    tables.weight = space.take<T>(most_sources * taps);
    T* prepared = space.take<T>(prepared_.size());
    fill_zero(tables.zeros, p_.source.width);
    for (int64_t i = 0; i < 9 && strips_; ++i) tables.taps[i] = grid_.weight(i / 3, i % 3);
    for (int64_t v = 0; v < vectors; ++v) {
      for (int64_t j = 0; j < grid_.cols; ++j) {
        const int64_t x = v * lanes * sweep_.source_step_w + grid_.col(j);
        tables.inside[v * grid_.cols + j] =
            pixels_inside(x, sweep_.source_step_w * lanes, 1, p_.source.width);
      }
    }
    for (int64_t g = first; g < end; ++g) {
      const int64_t outputs = partition.outputs.count(g);
      const int32_t* input = partition.inputs.of(g);
      const T* weight = p_.weight + partition.weight_offsets[g] * p_.window_area;
      if (p_.transposed && strips_ && outputs == 1) {
        const Band<T> whole{p_.source.at(n, partition.outputs.of(g)[0], 0, 0), p_.source.stride_h, 0,
                            sweep_.rows};
        run_strips(n, *input, weight, whole, tables);
        continue;
      }
      if (p_.transposed) {
        transpose_weight(weight, outputs, tables.weight);
        run_channel(
            {n, *input, partition.outputs.of(g), outputs, {nullptr, p_.source.stride_h, 0, sweep_.rows}},
            tables);
        continue;
      }
      for (int64_t row = 0; row < sweep_.rows && outputs > 0;) {
        const Band<T> band = prepared_.band(n, *input, row, prepared);
        for (int64_t j = 0; j < outputs && strips_; ++j) {
          run_strips(n, partition.outputs.of(g)[j], weight + j * p_.window_area, band, tables);
        }
        for (int64_t j = 0; j < outputs && !strips_; ++j) {
          transpose_weight(weight + j * p_.window_area, 1, tables.weight);
          run_channel({n, partition.outputs.of(g)[j], input, 1, band}, tables);
        }
        row = band.end_row;
      }
    }
  }

  void transpose_weight(const T* weight, int64_t count, T* to) const {
    for (int64_t s = 0; s < count; ++s, weight += p_.window_area) {
      for (int64_t j = 0; j < grid_.cols; ++j) {
        for (int64_t i = 0; i < grid_.rows; ++i) *to++ = weight[grid_.weight(i, j)];
      }
    }
  }

  void run_channel(const Channel& channel, const Tables& tables) const {
    const bool shares_rows = grid_.row_step == 1 && sweep_.rows > 1;
    if (sweep_.source_step_w == 1) {
      if (shares_rows && sweep_.source_step_h == 1) {
        switch (grid_.rows) {
          case 2: return run_tiles<tile_rows, 2, 1, 1>(channel, tables);
          case 3: return run_tiles<tile_rows, 3, 1, 1>(channel, tables);
          case 4: return run_tiles<tile_rows, 4, 1, 1>(channel, tables);
          case 5: return run_tiles<tile_rows, 5, 1, 1>(channel, tables);
          case 7: return run_tiles<tile_rows, 7, 1, 1>(channel, tables);
        }
      }
      return run_tiles<1, 1, 1, 1>(channel, tables);
    }
    if (shares_rows && sweep_.source_step_h == 2) {
      switch (grid_.rows) {
        case 3: return run_tiles<tile_rows, 3, 2, 2>(channel, tables);
        case 5: return run_tiles<tile_rows, 5, 2, 2>(channel, tables);
        case 7: return run_tiles<tile_rows, 7, 2, 2>(channel, tables);
      }
    }
    run_tiles<1, 1, 1, 2>(channel, tables);
  }

  GROUPCONV_INLINE void run_strips(int64_t n, int64_t channel, const T* weight, const Band<T>& band,
                                   const Tables& tables) const {
    for (int64_t col = 0; col < sweep_.cols; col += lanes) {
      plain_ ? run_strip<true>(n, channel, weight, band, tables, col)
             : run_strip<false>(n, channel, weight, band, tables, col);
    }
  }

  template <bool Plain>
  GROUPCONV_INLINE void run_strip(int64_t n, int64_t channel, const T* weight, const Band<T>& band,
                                  const Tables& tables, int64_t col) const {
    constexpr int window = 3;
    V_ w[window][window];
    Mask inside[window];
#pragma GCC unroll 3
    for (int j = 0; j < window; ++j) {
      inside[j] = V_::from_bits(tables.inside[col / lanes * window + j]);
#pragma GCC unroll 3
      for (int i = 0; i < window; ++i) w[i][j] = V_::broadcast(weight[tables.taps[i * window + j]]);
    }
    const V_ start = p_.bias ? V_::broadcast(p_.bias[channel]) : zero<T>();
    const V_ low = V_::broadcast(range_.low), high = V_::broadcast(range_.high);
    const Mask stored = V_::first(smaller<int64_t>(lanes, sweep_.cols - col));
    const int64_t height = p_.source.height, stride = band.stride_h;
    const int64_t row_stride = sweep_.dest_step_h * p_.dest.stride_h;
    const int64_t first_row = band.first_row * sweep_.dest_step_h + sweep_.dest_origin_h;
    T* dest = p_.dest.at(n, channel, first_row, col + sweep_.dest_origin_w);
    const T* residual = Plain || !p_.residual.data
                            ? nullptr
                            : p_.residual.at(n, channel, first_row, col + sweep_.dest_origin_w);
    int64_t y = band.first_row + grid_.row(0);
    const int64_t end = band.end_row + grid_.row(window - 1);
    const T* from = band.plane + y * stride + col + grid_.col(0);

    V_ sums[window];
    // Source row y is the last of the sums stored, and the first of `newest`.
    const auto add_row = [&](V_& newest, V_& middle, V_& oldest, bool completes) GROUPCONV_INLINE_LAMBDA {
      newest = start;
      if (__builtin_expect(y >= 0 && y < height, 1)) {
#pragma GCC unroll 3
        for (int j = 0; j < window; ++j) {
          V_ x = V_::load(from + j, inside[j]);
          pin(x);
          oldest = multiply_add(w[2][j], x, oldest);
          middle = multiply_add(w[1][j], x, middle);
          newest = multiply_add(w[0][j], x, newest);
        }
      }
      if (completes) {
        V_ sum = oldest;
        if constexpr (!Plain) {
          if (residual) {
            sum = sum + V_::load(residual, stored);
            residual += row_stride;
          }
          sum = clamp(low, high, sum);
        }
        sum.store(dest, stored);
        dest += row_stride;
      }
      ++y;
      from += stride;
      return y < end;
    };
    sums[1] = sums[2] = start;
    add_row(sums[0], sums[2], sums[1], false);
    add_row(sums[1], sums[0], sums[2], false);
    while (add_row(sums[2], sums[1], sums[0], true) && add_row(sums[0], sums[2], sums[1], true) &&
           add_row(sums[1], sums[0], sums[2], true)) {
    }
  }

  template <int R, int Height, int StepH, int StepW>
  void run_tiles(const Channel& channel, const Tables& tables) const {
    for (int64_t row = channel.band.first_row; row < channel.band.end_row; row += R) {
      int64_t col = 0;
      for (; sweep_.cols - col > lanes; col += tile_vectors * lanes) {
        run_tile<R, Height, StepH, StepW, tile_vectors>(channel, tables, row, col);
      }
      if (col < sweep_.cols) run_tile<R, Height, StepH, StepW, 1>(channel, tables, row, col);
    }
  }

  // Height: rows of the window that are taken together, all of them or one.
  template <int R, int Height, int StepH, int StepW, int V>
  void run_tile(const Channel& channel, const Tables& tables, int64_t row, int64_t col) const {
    const V_ start = p_.bias ? V_::broadcast(p_.bias[channel.dest]) : zero<T>();
    V_ sums[R][V];
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) sums[r][v] = start;
    }
    const uint32_t* inside[V];
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) inside[v] = tables.inside + (col / lanes + v) * grid_.cols;
    const T* weight = tables.weight;
    const int64_t taps_across = grid_.cols, taps_down = grid_.rows, apart = grid_.col_step;
    constexpr int source_rows = StepH * (R - 1) + Height;
    for (int64_t s = 0; s < channel.count; ++s) {
      const T* plane =
          channel.band.plane ? channel.band.plane : p_.source.at(channel.n, channel.sources[s], 0, 0);
      for (int64_t top = 0; top < grid_.rows; top += Height) {
        const T* rows[source_rows];
        list_rows<source_rows>(plane, channel.band.stride_h, tables.zeros,
                               row * sweep_.source_step_h + grid_.row(top), rows);
        const T* taps = weight + top;
        int64_t x = col * StepW + grid_.col(0);
        for (int64_t j = 0; j < taps_across; ++j, taps += taps_down, x += apart) {
          V_ w[Height];
#pragma GCC unroll 7
          for (int k = 0; k < Height; ++k) w[k] = V_::broadcast(taps[k]);
#pragma GCC unroll 2
          for (int v = 0; v < V; ++v) {
            const uint32_t exists = inside[v][j];
#pragma GCC unroll 13
            for (int i = 0; i < source_rows; ++i) {
              V_ source = load_stepped<T, StepW>(rows[i] + x + v * lanes * StepW, exists);
              pin(source);
#pragma GCC unroll 7
              for (int k = 0; k < Height; ++k) {
                const int r = (i - k) / StepH;
                if (i >= k && r * StepH == i - k && r < R) {
                  sums[r][v] = multiply_add(w[k], source, sums[r][v]);
                }
              }
            }
          }
        }
      }
      weight += grid_.rows * grid_.cols;
    }
    store<R, V>(channel, row, col, sums);
  }

  template <int Count>
  GROUPCONV_INLINE void list_rows(const T* plane, int64_t stride, const T* zeros, int64_t first,
                                  const T* (&rows)[Count]) const {
    const T* row = plane + first * stride;
    if (first >= 0 && first + Count <= p_.source.height) {
#pragma GCC unroll 13
      for (int i = 0; i < Count; ++i) rows[i] = row + i * stride;
    } else {
#pragma GCC unroll 13
      for (int i = 0; i < Count; ++i) {
        rows[i] = first + i >= 0 && first + i < p_.source.height ? row + i * stride : zeros;
      }
    }
  }

  template <int R, int V>
  GROUPCONV_INLINE void store(const Channel& channel, int64_t row, int64_t col,
                              const V_ (&sums)[R][V]) const {
    const int64_t y = row * sweep_.dest_step_h + sweep_.dest_origin_h;
    const int64_t x = col * sweep_.dest_step_w + sweep_.dest_origin_w;
    T* dest = p_.dest.at(channel.n, channel.dest, y, x);
    const T* residual = p_.residual.data ? p_.residual.at(channel.n, channel.dest, y, x) : nullptr;
    const int64_t row_stride = sweep_.dest_step_h * p_.dest.stride_h;
    const int64_t last = smaller<int64_t>(sweep_.cols - col - (V - 1) * lanes, lanes);
    if (plain_ && row + R <= sweep_.rows && last > 0) {
      const Mask mask = V_::first(last);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r, dest += row_stride) {
#pragma GCC unroll 2
        for (int v = 0; v < V - 1; ++v) sums[r][v].store(dest + v * lanes);
        sums[r][V - 1].store(dest + (V - 1) * lanes, mask);
      }
      return;
    }
    const V_ low = V_::broadcast(range_.low), high = V_::broadcast(range_.high);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      if (row + r >= sweep_.rows) break;
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) {
        const int64_t count = smaller<int64_t>(sweep_.cols - col - v * lanes, lanes);
        if (count <= 0) break;
        const Mask mask = V_::first(count);
        const int64_t at = r * row_stride + v * lanes * sweep_.dest_step_w;
        V_ sum = sums[r][v];
        if (residual) sum = sum + V_::load(residual + at, mask);
        if (p_.activation != Activation::none) sum = clamp(low, high, sum);
        if (sweep_.dest_step_w == 1) {
          sum.store(dest + at, mask);
        } else {
          T pixels[lanes];
          sum.store(pixels);
          for (int64_t i = 0; i < count; ++i) dest[at + i * sweep_.dest_step_w] = pixels[i];
        }
      }
    }
  }

  const ConvolveProblem<T>& p_;
  const Sweep& sweep_;
  TapGrid grid_;
  PreparedPlane<T> prepared_;
  ClampRange<T> range_;
  bool plain_;   // sums are stored as they are
  bool strips_;  // 3×3 with stride 1
};

}  // namespace
}  // namespace groupconv::cpu
