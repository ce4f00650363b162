// Depthwise 3×3 with stride 1 in channels_last, along bands of rows: lanes are channels, and a band is passed column by
// column. All weights stay in registers, a source pixel is loaded once for the band, and meets the three columns of
// sums that it belongs to.
//
// Tile: up to 4 destination rows, 16 columns, 1 vector of channels.
//   registers  9 weights, 3 · 4 sums, 1 start, 1 source
//   loads      6 for 36 multiply-adds, each of a line that no other load of the band wants; a tile of 2 × 8 pixels
//              (depthwise/channels.h) loads 10, and 5 vectors of weights
// The next pixel is as far away as the last was, which the processor's prefetchers see.
//
// Lanes are in the destination's order. Where the source's is another, its rows are gathered as the band reaches
// them, each once, into scratch that a core's own cache holds: a row of pixels for each vector of channels.
#pragma once

#include "cpu/depthwise/depthwise.h"
#include "cpu/processor/caches.h"
#include "cpu/staging/channel_order.h"
#include "cpu/vector/fetched_lines.h"
#include "cpu/vector/strides.h"

namespace groupconv::cpu {
namespace {

template <class Stored>
class DepthwiseBands {
  using T = compute_t<Stored>;
  using V_ = Vec<T>;
  using Mask = typename V_::Mask;
  static constexpr int lanes = V_::lanes;
  static constexpr int window = 3;
  static constexpr int most_rows = 4;
  // So that all vectors of a pixel are read and written soon after each other, as memory likes it.
  static constexpr int64_t most_columns = 16;
  static constexpr int most_sources = most_rows + window - 1;

 public:
  DepthwiseBands(const ConvolveProblem<Stored>& problem, const Depthwise& depthwise)
      : p_(problem),
        sweep_(*problem.sweep),
        grid_(sweep_),
        blocks_(divide_up(p_.dest.channels, int64_t{lanes})),
        range_(clamp_range<T>(p_.activation)),
        straight_(depthwise.straight),
        plain_(!p_.residual.data && p_.activation == Activation::none) {
    const int64_t elements = p_.dest.batch * p_.dest.channels * p_.dest.height * p_.dest.width;
    fetches_dest_ = 4 * elements * static_cast<int64_t>(sizeof(Stored)) >= caches().own;
  }

  static bool suits(const ConvolveProblem<Stored>& p, const Depthwise& depthwise) {
    if constexpr (vector_registers < 32) return false;
    constexpr int64_t most_bytes = 512 << 10;
    const Sweep& sweep = *p.sweep;
    const TapGrid grid(sweep);
    if (grid.rows != window || grid.cols != window || grid.row_step != 1 || grid.col_step != 1) return false;
    if (sweep.source_step_h != 1 || sweep.source_step_w != 1) return false;
    if (p.source.stride_c != 1 || p.dest.stride_c != 1 || p.prologue || !is_clamp(p.activation)) return false;
    if (!can_gather<Stored>(p.source.channels)) return false;
    // What sums several channels is left to depthwise/channels.h.
    if (p.transposed && depthwise.most_outputs > 1) return false;
    const int64_t places = divide_up(p.dest.channels, int64_t{lanes}) * lanes;
    return p.partition->entries() * p.window_area < INT32_MAX && p.source.channels < INT32_MAX &&
           most_sources * p.source.width * places * static_cast<int64_t>(sizeof(Stored)) <= most_bytes;
  }

  void run() const {
    // A piece brings the weights into lanes, and gathers the rows around it, for itself.
    constexpr int64_t least_bands = 2;
    const int64_t bands = divide_up(sweep_.rows, int64_t{most_rows});
    const int64_t threads = p_.threads.count;
    const int64_t cuts = divide_up(4 * threads, larger(p_.dest.batch, int64_t{1}));
    const int64_t pieces = threads > 1 ? smaller(cuts, larger(bands / least_bands, int64_t{1})) : int64_t{1};
    for_each_item(p_.threads, p_.dest.batch * pieces, [&](int64_t item) {
      const int64_t piece = item % pieces;
      run_bands(item / pieces, sweep_.rows * piece / pieces, sweep_.rows * (piece + 1) / pieces);
    });
  }

 private:
  struct Tables {
    T* weight;        // [blocks][9][lanes], by rows of the window
    int32_t* source;  // [blocks][lanes]: the source channel of a lane, or no_channel
    uint32_t* taken;  // [blocks]: the lanes that have one
    ChannelOrder<T> order;
    Stored* rows;  // [most_sources][blocks][width][lanes], source row y in place y % most_sources
  };
  struct Columns {
    int64_t begin, end;
  };
  // One vector of channels of some rows.
  struct Band {
    const Stored* source[most_sources];  // column 0, or null where there is no row
    int64_t source_pixel;                // from column to column
    bool whole;                          // no row is missing
    const T* weight;
    V_ start;
    Mask loaded, stored;
    Stored* dest;  // column 0
    const Stored* residual;
    int64_t dest_row, dest_pixel;
  };

  void run_bands(int64_t n, int64_t first, int64_t end) const {
    const int64_t staged = straight_ ? 0 : most_sources * blocks_ * p_.source.width * lanes;
    Workspace space;
    space.plan<T>(blocks_ * window * window * lanes);
    space.plan<int32_t>(blocks_ * lanes);
    space.plan<int32_t>(blocks_ * lanes);
    space.plan<uint32_t>(blocks_);
    space.plan<Stored>(staged);
    if (orders()) ChannelOrder<T>::plan(space, blocks_ * lanes, p_.source.channels);
    space.open();
    Tables tables{};
    tables.weight = space.take<T>(blocks_ * window * window * lanes);
    tables.source = space.take<int32_t>(blocks_ * lanes);
    int32_t* origin = space.take<int32_t>(blocks_ * lanes);
    tables.taken = space.take<uint32_t>(blocks_);
    tables.rows = space.take<Stored>(staged);
    list_channels(origin, tables);
    if (orders()) tables.order.open(space, tables.source, blocks_ * lanes, p_.source.channels);

    const int64_t bands = divide_up(end - first, int64_t{most_rows});
    const int64_t parts = divide_up(sweep_.cols, most_columns);
    int64_t gathered = 0;
    for (int64_t b = 0; b < bands; ++b) {
      const int64_t row = first + (end - first) * b / bands, next = first + (end - first) * (b + 1) / bands;
      const int64_t top = row + grid_.row(0), bottom = next + grid_.row(window - 1);
      if (!straight_) {
        gathered = larger(gathered, larger(top, int64_t{0}));
        for (; gathered < smaller(bottom, p_.source.height); ++gathered) gather_row(n, gathered, tables);
      }
      for (int64_t part = 0; part < parts; ++part) {
        const Columns columns{sweep_.cols * part / parts, sweep_.cols * (part + 1) / parts};
        switch (next - row) {
          case 1: run_rows<1>(n, row, top, columns, tables); break;
          case 2: run_rows<2>(n, row, top, columns, tables); break;
          case 3: run_rows<3>(n, row, top, columns, tables); break;
          default: run_rows<4>(n, row, top, columns, tables);
        }
      }
    }
  }

  void list_channels(int32_t* origin, const Tables& tables) const {
    const PartitionView& partition = *p_.partition;
    for (int64_t i = 0; i < blocks_ * lanes; ++i) tables.source[i] = no_channel;
    fill_zero(origin, blocks_ * lanes);
    fill_zero(tables.taken, blocks_);
    for (int64_t g = 0; g < partition.groups; ++g) {
      const int32_t input = partition.inputs.of(g)[0];
      const int32_t* output = partition.outputs.of(g);
      const auto weight = static_cast<int32_t>(partition.weight_offsets[g] * p_.window_area);
      for (int64_t j = 0; j < partition.outputs.count(g); ++j) {
        const int64_t dest = p_.transposed ? input : output[j];
        tables.source[dest] = p_.transposed ? output[j] : input;
        tables.taken[dest / lanes] |= uint32_t{1} << dest % lanes;
        origin[dest] = weight + static_cast<int32_t>(j * p_.window_area);
      }
    }
    T* weight = tables.weight;
    for (int64_t block = 0; block < blocks_; ++block) {
      for (int64_t t = 0; t < window * window; ++t, weight += lanes) {
        V_::gather(p_.weight + grid_.weight(t / window, t % window), origin + block * lanes,
                   V_::from_bits(tables.taken[block]))
            .store(weight);
      }
    }
  }

  Stored* staged(const Tables& tables, int64_t y, int64_t block) const {
    return tables.rows + (y % most_sources * blocks_ + block) * p_.source.width * lanes;
  }

  // Rows are brought into order as all pixels are; bfloat16, which has no order of vectors, is gathered and widened.
  static constexpr bool has_orders = __is_same(Stored, T);
  bool orders() const { return has_orders && !straight_; }

  // While it gathers, memory brings what is read and written next.
  void gather_row(int64_t n, int64_t y, const Tables& tables) const {
    const int64_t width = p_.source.width, pixel = p_.source.stride_w;
    const int64_t ahead = larger(fetched_ahead / pixel, int64_t{1}) * pixel;
    const Stored* from = p_.source.at(n, 0, y, 0);
    const Stored* dest = p_.dest.at(n, 0, smaller(y, p_.dest.height - 1), 0);
    Stored* to = staged(tables, y, 0);
    const auto put = [&](int64_t x, int64_t channel, V_ value) GROUPCONV_INLINE_LAMBDA {
      __builtin_prefetch(from + x * pixel + ahead + channel);
      if (fetches_dest_) __builtin_prefetch(dest + x * p_.dest.stride_w + channel, 1);
      value.store(to + channel * width + x * lanes);
    };
    if constexpr (has_orders) {
      tables.order.run(from, pixel, width,
                       [&](int64_t x, const auto& places, V_ value)
                           GROUPCONV_INLINE_LAMBDA { put(x, places.first, value); });
    } else {
      for (int64_t x = 0; x < width; ++x) {
        for (int64_t block = 0; block < blocks_; ++block) {
          put(x, block * lanes,
              V_::gather(from + x * pixel, tables.source + block * lanes,
                         V_::from_bits(tables.taken[block])));
        }
      }
    }
  }

  // Lattice rows row … row + R - 1, of which the first reads source rows from `top` on.
  template <int R>
  void run_rows(int64_t n, int64_t row, int64_t top, const Columns& columns, const Tables& tables) const {
    Band band;
    band.source_pixel = straight_ ? p_.source.stride_w : int64_t{lanes};
    band.dest_row = sweep_.dest_step_h * p_.dest.stride_h;
    band.dest_pixel = sweep_.dest_step_w * p_.dest.stride_w;
    const int64_t y = row * sweep_.dest_step_h + sweep_.dest_origin_h;
    for (int64_t block = 0; block < blocks_; ++block) {
      const int64_t channel = block * lanes;
      const int64_t count = smaller<int64_t>(lanes, p_.dest.channels - channel);
      band.whole = true;
      for (int i = 0; i < R + window - 1; ++i) {
        const bool exists = top + i >= 0 && top + i < p_.source.height;
        band.whole = band.whole && exists;
        band.source[i] = !exists     ? nullptr
                         : straight_ ? p_.source.at(n, channel, top + i, 0)
                                     : staged(tables, top + i, block);
      }
      band.weight = tables.weight + block * window * window * lanes;
      band.stored = V_::first(count);
      band.loaded = straight_ ? band.stored : V_::first(lanes);
      band.start = p_.bias ? V_::load(p_.bias + channel, band.stored) : zero<T>();
      band.dest = p_.dest.at(n, channel, y, sweep_.dest_origin_w);
      band.residual = p_.residual.data ? p_.residual.at(n, channel, y, sweep_.dest_origin_w) : nullptr;
      if (band.whole) {
        plain_ ? run_band<R, true, true>(band, columns) : run_band<R, true, false>(band, columns);
      } else {
        plain_ ? run_band<R, false, true>(band, columns) : run_band<R, false, false>(band, columns);
      }
    }
  }

  template <int R, bool Whole, bool Plain>
  void run_band(const Band& band, const Columns& columns) const {
    constexpr int sources = R + window - 1;
    V_ w[window][window];
#pragma GCC unroll 9
    for (int t = 0; t < window * window; ++t) {
      w[t / window][t % window] = V_::load(band.weight + t * lanes);
    }
    const V_ start = band.start;
    const V_ low = V_::broadcast(range_.low), high = V_::broadcast(range_.high);
    const Mask loaded = band.loaded, stored = band.stored;
    const Stored* source[sources];
    const int64_t pixel = band.source_pixel, dest_pixel = band.dest_pixel;
    const int64_t width = p_.source.width, end_column = columns.end + grid_.col(window - 1);
    int64_t x = columns.begin + grid_.col(0), from = x * pixel;
#pragma GCC unroll 6
    for (int i = 0; i < sources; ++i) source[i] = band.source[i];
    Stored* dest = band.dest + columns.begin * dest_pixel;
    const Stored* residual = band.residual ? band.residual + columns.begin * dest_pixel : nullptr;
    const Strides down(band.dest_row * static_cast<int64_t>(sizeof(Stored)));

    V_ sums[window][R];
    // Source column x is the last of the sums stored, and the first of `newest`.
    const auto add_column = [&](V_(&newest)[R], V_(&middle)[R], V_(&oldest)[R], bool completes)
                                GROUPCONV_INLINE_LAMBDA {
#pragma GCC unroll 4
                                  for (int r = 0; r < R; ++r) newest[r] = start;
                                  if (__builtin_expect(x >= 0 && x < width, 1)) {
#pragma GCC unroll 6
                                    for (int i = 0; i < sources; ++i) {
                                      if (!Whole && !source[i]) continue;
                                      V_ value = V_::load(source[i] + from, loaded);
                                      pin(value);
#pragma GCC unroll 4
                                      for (int r = 0; r < R; ++r) {
                                        const int k = i - r;
                                        if (k < 0 || k >= window) continue;
                                        oldest[r] = multiply_add(w[k][2], value, oldest[r]);
                                        middle[r] = multiply_add(w[k][1], value, middle[r]);
                                        newest[r] = multiply_add(w[k][0], value, newest[r]);
                                      }
                                    }
                                  }
                                  if (completes) {
#pragma GCC unroll 4
                                    for (int r = 0; r < R; ++r) {
                                      V_ sum = oldest[r];
                                      if constexpr (!Plain) {
                                        if (residual) sum = sum + V_::load(down.at(residual, r), stored);
                                        sum = clamp(low, high, sum);
                                      }
                                      sum.store(const_cast<Stored*>(down.at(dest, r)), stored);
                                    }
                                    dest += dest_pixel;
                                    if (!Plain && residual) residual += dest_pixel;
                                  }
                                  ++x;
                                  from += pixel;
                                  return x < end_column;
                                };
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) sums[1][r] = sums[2][r] = start;
    add_column(sums[0], sums[2], sums[1], false);
    add_column(sums[1], sums[0], sums[2], false);
    while (add_column(sums[2], sums[1], sums[0], true) && add_column(sums[0], sums[2], sums[1], true) &&
           add_column(sums[1], sums[0], sums[2], true)) {
    }
  }

  const ConvolveProblem<Stored>& p_;
  const Sweep& sweep_;
  TapGrid grid_;
  int64_t blocks_;
  ClampRange<T> range_;
  bool straight_;      // every channel stays where it is
  bool plain_;         // sums are stored as they are
  bool fetches_dest_;  // which is too large to be at hand
};

}  // namespace
}  // namespace groupconv::cpu
