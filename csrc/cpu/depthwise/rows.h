// Depthwise convolution in NCHW: lanes are pixels of a row, read where they lie.
//
// Tile: 4 destination rows × 2 vectors of pixels (1 vector where there are 16 registers or rows are short).
// Down a column of the window, each loaded source vector serves all the rows that it belongs to.
//   registers  8 sums, up to 7 weights, 1 source
//   loads      3×3: 36 sources and 9 weights for 72 multiply-adds; the same image row at three offsets
// A window of 3×3 with stride 1 goes down strips instead (depthwise/strips.h), with AVX-512 one with stride 2 too
// (depthwise/strided_strips.h).
//
// The padding is no memory: columns outside the image are masked out of the loads, rows outside it are one
// row of zeros. Channels are rows by pointer, so permutations and multipliers cost nothing. Behind a prologue
// the rows are those of a channel's copy in L1.
#pragma once

#include "cpu/depthwise/depthwise.h"
#include "cpu/depthwise/prologue.h"
#include "cpu/depthwise/strided_strips.h"
#include "cpu/depthwise/strips.h"

namespace groupconv::cpu {
namespace {

template <class Stored>
class DepthwiseRows {
  using T = compute_t<Stored>;
  using V_ = Vec<T>;
  using Mask = typename V_::Mask;
  static constexpr int lanes = V_::lanes;
  static constexpr int tile_rows = 4;
  static constexpr int tile_vectors = vector_registers == 32 ? 2 : 1;

 public:
  explicit DepthwiseRows(const ConvolveProblem<Stored>& problem)
      : p_(problem),
        sweep_(*problem.sweep),
        grid_(sweep_),
        prepared_(p_.source, p_.prologue, sweep_, grid_),
        range_(clamp_range<T>(p_.activation)) {
    plain_ = !p_.residual.data && p_.activation == Activation::none && sweep_.dest_step_w == 1;
    strips_ = goes_down(sweep_);
  }

  static bool suits(const ConvolveProblem<Stored>& p) {
    return is_rows(p.source) && !p.dest.channels_last() && p.dest.stride_w == 1 && is_clamp(p.activation) &&
           p.sweep->source_step_w <= 2;
  }

  // Whether a map goes down strips, of any size without a copy and with little to set up.
  static bool goes_down(const Sweep& sweep) {
#if defined(__AVX512F__)
    if (goes_down_strided_strips(sweep)) return true;
#endif
    return goes_down_strips(sweep);
  }

  void run() const {
    // What an item sets up weighs as much as a small map of several channels.
    constexpr int64_t least_per_item = 16, items_for_a_thread = 8;
    const int64_t groups = p_.partition->groups;
    const int64_t items = p_.threads.count > 1 ? items_for_a_thread * p_.threads.count : 1;
    const int64_t groups_per_item = larger(least_per_item, divide_up(groups * p_.dest.batch, items));
    const int64_t chunks = divide_up(groups, groups_per_item);
    for_each_item(p_.threads, p_.dest.batch * chunks, [&](int64_t item) {
      const int64_t first = item % chunks * groups_per_item;
      run_groups(item / chunks, first, smaller(first + groups_per_item, groups));
    });
  }

 private:
  struct Tables {
    uint32_t* inside;  // [vector][column of the window]: which of the source pixels of a load exist
    Stored* zeros;     // an image row outside the image
    T* weight;         // [source][column][row], of one destination channel
  };
  // A destination channel and the source channels that it sums, or the rows of it that are made from the one
  // source channel of a forward pass.
  struct Channel {
    int64_t n, dest;
    const int32_t* sources;
    int64_t count;
    Band<Stored> band;
  };

  // Channels that are to go down strips, made some at a time: all that wait have the same rows.
  class Strips {
   public:
    Strips(const DepthwiseRows& of, int64_t n, const uint32_t* inside)
        : of_(of), dest_stride_(of.p_.dest.stride_c), n_(n), inside_(inside) {
      if (!of.strips_) return;
      const ConvolveProblem<Stored>& p = of.p_;
      halves_ = of.sweep_.cols <= half_lanes<T>;
      const int64_t strips = of.sweep_.source_step_w == 1 ? strips_at_once : 1;
      at_once_ = halves_ ? 2 * strips : strips;
      for (int64_t t = 0; t < 9; ++t) taps_[t] = of.grid_.weight(t / 3, t % 3);
      job_.height = p.source.height;
      job_.dest_stride = of.sweep_.dest_step_h * p.dest.stride_h;
      job_.taps = taps_;
      job_.clamped = p.activation != Activation::none;
      job_.range = of.range_;
      take({nullptr, p.source.stride_h, 0, of.sweep_.rows});
    }

    // The rows of all channels that are added from now on.
    void take(const Band<Stored>& band) {
      const ConvolveProblem<Stored>& p = of_.p_;
      const int64_t y = band.first_row * of_.sweep_.dest_step_h + of_.sweep_.dest_origin_h;
      const int64_t x = of_.sweep_.dest_origin_w;
      dest_ = p.dest.at(n_, 0, y, x);
      residual_ = p.residual.data ? p.residual.at(n_, 0, y, x) : nullptr;
      job_.first_row = band.first_row * of_.sweep_.source_step_h + of_.grid_.row(0);
      job_.end_row = (band.end_row - 1) * of_.sweep_.source_step_h + of_.grid_.row(2) + 1;
      job_.source_stride = band.stride_h;
      begin_ = job_.first_row * band.stride_h + of_.grid_.col(0);
    }

    GROUPCONV_INLINE void add(const Stored* plane, const T* weight, int64_t dest) {
      StripChannel<Stored>& strip = waiting_[count_];
      const int64_t at = dest * dest_stride_;
      strip.source = plane + begin_;
      strip.weight = weight;
      strip.start = of_.p_.bias ? of_.p_.bias[dest] : T(0);
      strip.dest = dest_ + at;
      strip.residual = residual_ ? residual_ + at : nullptr;
      if (++count_ == at_once_) flush();
    }

    void flush() {
      job_.inside = inside_;
      for (int64_t col = 0; count_ > 0; job_.inside += 3) {
        job_.stored = smaller<int64_t>(lanes, of_.sweep_.cols - col);
        run_waiting();
        col += lanes;
        if (col >= of_.sweep_.cols) count_ = 0;
        for (int64_t i = 0; i < count_; ++i) {
          waiting_[i].source += lanes * of_.sweep_.source_step_w;
          waiting_[i].dest += lanes;
          if (residual_) waiting_[i].residual += lanes;
        }
      }
    }

   private:
    void run_waiting() {
#if defined(__AVX512F__)
      if (of_.sweep_.source_step_w == 2) return run_strided_strip(job_, waiting_, count_, halves_);
#endif
      run_strips(job_, waiting_, count_, halves_);
    }

    const DepthwiseRows& of_;
    int64_t dest_stride_, n_;
    const uint32_t* inside_;
    int64_t taps_[9];
    Stored* dest_ = nullptr;
    const Stored* residual_ = nullptr;
    int64_t begin_ = 0;
    StripJob<T> job_{};
    StripChannel<Stored> waiting_[2 * strips_at_once];
    int64_t count_ = 0, at_once_ = 1;
    bool halves_ = false;
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
    space.plan<Stored>(p_.source.width);
    space.plan<T>(most_sources * taps);
    space.plan<Stored>(prepared_.size());
    space.open();
    Tables tables{};
    tables.inside = space.take<uint32_t>(vectors * grid_.cols);
    tables.zeros = space.take<Stored>(p_.source.width);
    tables.weight = space.take<T>(most_sources * taps);
    Stored* prepared = space.take<Stored>(prepared_.size());
    fill_zero(tables.zeros, p_.source.width);
    for (int64_t v = 0; v < vectors; ++v) {
      for (int64_t j = 0; j < grid_.cols; ++j) {
        const int64_t x = v * lanes * sweep_.source_step_w + grid_.col(j);
        tables.inside[v * grid_.cols + j] =
            pixels_inside(x, sweep_.source_step_w * lanes, 1, p_.source.width);
      }
    }
    Strips strips(*this, n, tables.inside);
    const Stored* const image = p_.source.at(n, 0, 0, 0);
    const ChannelLists& inputs = partition.inputs;
    const ChannelLists& outputs = partition.outputs;
    for (int64_t g = first; g < end; ++g) {
      const int64_t count = outputs.count(g);
      const int32_t input = inputs.of(g)[0];
      const int32_t* output = outputs.of(g);
      const T* weight = p_.weight + partition.weight_offsets[g] * p_.window_area;
      if (strips_ && p_.transposed && count == 1) {
        strips.add(image + *output * p_.source.stride_c, weight, input);
      } else if (p_.transposed) {
        transpose_weight(weight, count, tables.weight);
        run_channel({n, input, output, count, {nullptr, p_.source.stride_h, 0, sweep_.rows}}, tables);
      } else if (strips_ && !p_.prologue) {
        for (int64_t j = 0; j < count; ++j, weight += p_.window_area) {
          strips.add(image + input * p_.source.stride_c, weight, output[j]);
        }
      } else {
        run_bands(n, input, output, count, weight, prepared, strips, tables);
      }
    }
    strips.flush();
  }

  // A group's outputs, band after band of what its input is after the prologue.
  void run_bands(int64_t n, const int32_t& input, const int32_t* output, int64_t count, const T* weight,
                 Stored* prepared, Strips& strips, const Tables& tables) const {
    for (int64_t row = 0; row < sweep_.rows && count > 0;) {
      const Band<Stored> band = prepared_.band(n, input, row, prepared);
      if (strips_) strips.take(band);
      for (int64_t j = 0; j < count; ++j) {
        if (strips_) {
          strips.add(band.plane, weight + j * p_.window_area, output[j]);
        } else {
          transpose_weight(weight + j * p_.window_area, 1, tables.weight);
          run_channel({n, output[j], &input, 1, band}, tables);
        }
      }
      strips.flush();
      row = band.end_row;
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
      const Stored* plane =
          channel.band.plane ? channel.band.plane : p_.source.at(channel.n, channel.sources[s], 0, 0);
      for (int64_t top = 0; top < grid_.rows; top += Height) {
        const Stored* rows[source_rows];
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
  GROUPCONV_INLINE void list_rows(const Stored* plane, int64_t stride, const Stored* zeros, int64_t first,
                                  const Stored* (&rows)[Count]) const {
    const Stored* row = plane + first * stride;
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
    Stored* dest = p_.dest.at(channel.n, channel.dest, y, x);
    const Stored* residual = p_.residual.data ? p_.residual.at(channel.n, channel.dest, y, x) : nullptr;
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
        } else if (sweep_.dest_step_w == 2) {
          store_every_second(sum, dest + at, count);
        } else {
          T pixels[lanes];
          sum.store(pixels);
          for (int64_t i = 0; i < count; ++i) narrow(pixels[i], dest[at + i * sweep_.dest_step_w]);
        }
      }
    }
  }

  const ConvolveProblem<Stored>& p_;
  const Sweep& sweep_;
  TapGrid grid_;
  PreparedPlane<Stored> prepared_;
  ClampRange<T> range_;
  bool plain_;   // sums are stored as they are
  bool strips_;  // 3×3 with stride 1, or 2
};

}  // namespace
}  // namespace groupconv::cpu
