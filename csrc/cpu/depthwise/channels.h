// Depthwise convolution in channels_last: lanes are channels, nothing is padded, and nothing staged but what
// comes through a prologue.
//
// Tile: 2 destination rows × 8 pixels × 1 vector of channels (1 × 6 with 16 registers). A source pixel is
// loaded once for all the sums it belongs to, up to 2 · kernel width of them.
//   registers  16 sums, up to 2 · 7 weights, 1 source      (6, 7, 1)
//   loads      3×3: 40 sources and 18 weights for 144 multiply-adds
// Channels are the innermost loop: neighbouring tiles read neighbouring memory.
//
// Lanes are always in the source's order. Where destination channels lie elsewhere, or there are several for
// a source channel, a tile's sums go to a strip in L1, and each destination pixel gathers its channels from
// there: one gather for a vector of results. A gather of the sources would cost one for each load.
#pragma once

#include "cpu/depthwise/depthwise.h"
#include "cpu/depthwise/prologue.h"
#include "cpu/staging/unstage.h"

namespace groupconv::cpu {
namespace {

template <class Stored>
class DepthwiseChannels {
  using T = compute_t<Stored>;
  using V_ = Vec<T>;
  using Mask = typename V_::Mask;
  static constexpr int lanes = V_::lanes;
  static constexpr int tile_rows = vector_registers == 32 ? 2 : 1;
  static constexpr int tile_cols = vector_registers == 32 ? 8 : 6;
  static constexpr int widest = 7;  // columns of a window that share loads

 public:
  DepthwiseChannels(const ConvolveProblem<Stored>& problem, const Depthwise& depthwise)
      : p_(problem),
        sweep_(*problem.sweep),
        grid_(sweep_),
        blocks_(divide_up(p_.source.channels, lanes)),
        dest_blocks_(divide_up(p_.dest.channels, lanes)),
        copies_(p_.transposed ? 1 : depthwise.most_outputs),
        picks_(p_.transposed ? depthwise.most_outputs : 1),
        finish_(p_.activation) {
    direct_ = in_vectors<Stored> && depthwise.straight && is_clamp(p_.activation);
    plain_ = !p_.residual.data && p_.activation == Activation::none;
    together_ = grid_.col_step == 1 && grid_.cols <= widest && sweep_.source_step_w <= 2
                    ? larger(grid_.cols, int64_t{1})
                    : 1;
    step_ = together_ == 1 ? 1 : sweep_.source_step_w;
    weights_ = grid_.rows * grid_.cols * lanes;
    record_ = (copies_ * blocks_ + 1) * lanes;
  }

  static bool suits(const ConvolveProblem<Stored>& p, const Depthwise& depthwise) {
    // With a multiplier, a vector that is not full is computed many times over.
    const bool full = depthwise.most_outputs <= 1 || p.source.channels >= lanes;
    return full && p.source.stride_c == 1 && p.dest.stride_c == 1 &&
           p.partition->entries() * p.window_area < INT32_MAX &&
           p.source.channels * copies_limit < INT32_MAX && depthwise.most_outputs <= copies_limit;
  }

  void run() const {
    // A piece transposes the weights for itself, which a few pixels would not pay for: of many images none is cut.
    constexpr int64_t enough_pixels = 16;
    const int64_t tiles = divide_up(sweep_.rows, tile_rows);
    const int64_t threads = p_.threads.count;
    const int64_t cuts = smaller(2 * threads, divide_up(4 * threads, larger(p_.dest.batch, int64_t{1})));
    const int64_t wanted = threads > 1 ? smaller(cuts, tiles) : 1;
    const int64_t worth = larger(int64_t{1}, sweep_.rows * sweep_.cols / enough_pixels);
    const int64_t pieces = smaller(wanted, worth);
    for_each_item(p_.threads, p_.dest.batch * pieces, [&](int64_t item) {
      const int64_t piece = item % pieces;
      run_rows(item / pieces, tiles * piece / pieces * tile_rows,
               smaller(tiles * (piece + 1) / pieces * tile_rows, sweep_.rows));
    });
  }

 private:
  static constexpr int64_t copies_limit = 64;

  // Neighbouring source pixels that the window's columns pass over: which of them exist, and where the
  // weights of these columns begin for each of the tile's rows (-1: that row does not read this line).
  struct Line {
    const Stored* from;
    uint32_t present;
    int64_t weight[tile_rows];
  };
  struct Read {
    int64_t row;  // counted from the tile's first
    int64_t weight[tile_rows];
  };
  struct Tables {
    const PreparedRows<Stored>* source;
    T* weight;      // [copies][blocks][tap][lanes]
    int32_t* pick;  // [picks][dest_blocks · lanes]: where in a record a destination channel's sum is
    Read* reads;
    int64_t read_count;
    Line* lines;
    T* strip;   // [tile_rows · tile_cols] records of one pixel: [copies][blocks][lanes], zeros
    T* picked;  // [dest_blocks][lanes]
  };
  struct Tile {
    int64_t n, row, col, rows, cols, lines;
  };

  void run_rows(int64_t n, int64_t first, int64_t end) const {
    const int64_t most_lines = tile_rows * grid_.rows * (grid_.cols / together_);
    const int64_t strip_size = direct_ ? 0 : tile_rows * tile_cols * record_;
    const int64_t top = grid_.rows > 0 ? grid_.row(0) : 0;
    const int64_t reach =
        (tile_rows - 1) * sweep_.source_step_h + (grid_.rows > 0 ? grid_.row(grid_.rows - 1) - top + 1 : 1);
    PreparedRows<Stored> source(p_.source, p_.prologue, 0, p_.source.channels, reach);
    Workspace space;
    space.plan<T>(copies_ * blocks_ * weights_);
    space.plan<int32_t>(copies_ * blocks_ * lanes);
    space.plan<int32_t>(picks_ * dest_blocks_ * lanes);
    space.plan<Read>(tile_rows * grid_.rows);
    space.plan<Line>(most_lines);
    space.plan<T>(strip_size);
    space.plan<T>(dest_blocks_ * lanes);
    space.plan<Stored>(source.size());
    space.open();
    Tables tables{};
    tables.source = &source;
    tables.weight = space.take<T>(copies_ * blocks_ * weights_);
    int32_t* origin = space.take<int32_t>(copies_ * blocks_ * lanes);
    tables.pick = space.take<int32_t>(picks_ * dest_blocks_ * lanes);
    tables.reads = space.take<Read>(tile_rows * grid_.rows);
    tables.lines = space.take<Line>(most_lines);
    tables.strip = space.take<T>(strip_size);
    tables.picked = space.take<T>(dest_blocks_ * lanes);
    source.open(space.take<Stored>(source.size()));
    fill_zero(tables.strip, strip_size);
    list_channels(origin, tables.pick);
    transpose_weight(origin, tables.weight);
    tables.read_count = list_reads(tables.reads);

    for (int64_t row = first; row < end; row += tile_rows) {
      const int64_t read = row * sweep_.source_step_h + top;
      source.advance(n, read, read + reach);
      for (int64_t col = 0; col < sweep_.cols; col += tile_cols) {
        Tile tile{n,
                  row,
                  col,
                  smaller<int64_t>(tile_rows, end - row),
                  smaller<int64_t>(tile_cols, sweep_.cols - col),
                  0};
        list_lines(tile, tables);
        run_tile(tile, tables);
        if (!direct_) finish_tile(tile, tables);
      }
    }
  }

  // origin: where the weights of lane `c` of copy `m` begin. A copy or a lane that does not exist computes
  // something that nobody picks.
  void list_channels(int32_t* origin, int32_t* pick) const {
    const PartitionView& partition = *p_.partition;
    fill_zero(origin, copies_ * blocks_ * lanes);
    const int64_t dests = dest_blocks_ * lanes;
    for (int64_t i = 0; i < picks_ * dests; ++i) pick[i] = static_cast<int32_t>(record_ - lanes);
    for (int64_t g = 0; g < partition.groups; ++g) {
      const int64_t input = partition.inputs.of(g)[0];
      for (int64_t j = 0; j < partition.outputs.count(g); ++j) {
        const int64_t output = partition.outputs.of(g)[j];
        const int64_t slot = p_.transposed ? output : j * blocks_ * lanes + input;
        origin[slot] = static_cast<int32_t>((partition.weight_offsets[g] + j) * p_.window_area);
        pick[p_.transposed ? j * dests + input : output] = static_cast<int32_t>(slot);
      }
    }
  }

  void transpose_weight(const int32_t* origin, T* weight) const {
    for (int64_t block = 0; block < copies_ * blocks_; ++block) {
      for (int64_t i = 0; i < grid_.rows; ++i) {
        for (int64_t j = 0; j < grid_.cols; ++j, weight += lanes) {
          V_::gather(p_.weight + grid_.weight(i, j), origin + block * lanes, V_::all()).store(weight);
        }
      }
    }
  }

  // Rows of an image that some row of a tile reads, each once, whichever tile it is.
  int64_t list_reads(Read* reads) const {
    int64_t count = 0;
    const int64_t step = sweep_.source_step_h;
    for (int64_t r = 0; r < tile_rows; ++r) {
      for (int64_t i = 0; i < grid_.rows; ++i) {
        const int64_t y = r * step + grid_.row(i);
        int64_t at = 0;
        while (at < count && reads[at].row != y) ++at;
        if (at == count) {
          reads[count++].row = y;
          for (int64_t other = 0; other < tile_rows; ++other) reads[at].weight[other] = -1;
        }
        reads[at].weight[r] = i * grid_.cols * lanes;
      }
    }
    return count;
  }

  void list_lines(Tile& tile, const Tables& tables) const {
    const int64_t step = sweep_.source_step_w, apart = together_ == 1 ? step : 1;
    const int64_t count = step_ * (tile.cols - 1) + together_;
    for (int64_t j = 0; j < grid_.cols; j += together_) {
      const int64_t x = tile.col * step + grid_.col(j);
      const uint32_t present = pixels_inside(x, count, apart, p_.source.width);
      for (int64_t i = 0; i < tables.read_count; ++i) {
        const Read& read = tables.reads[i];
        const int64_t y = tile.row * sweep_.source_step_h + read.row;
        if (y < 0 || y >= p_.source.height) continue;
        Line& line = tables.lines[tile.lines++];
        line.from = tables.source->row(tile.n, y) + x * tables.source->pixel_stride();
        line.present = present;
        for (int64_t r = 0; r < tile_rows; ++r) {
          line.weight[r] = read.weight[r] < 0 ? -1 : read.weight[r] + j * lanes;
        }
      }
    }
  }

  void run_tile(const Tile& tile, const Tables& tables) const {
    switch (step_ * 10 + together_) {
      case 12: return run_blocks<2, 1>(tile, tables);
      case 13: return run_blocks<3, 1>(tile, tables);
      case 14: return run_blocks<4, 1>(tile, tables);
      case 15: return run_blocks<5, 1>(tile, tables);
      case 16: return run_blocks<6, 1>(tile, tables);
      case 17: return run_blocks<7, 1>(tile, tables);
      case 22: return run_blocks<2, 2>(tile, tables);
      case 23: return run_blocks<3, 2>(tile, tables);
      case 24: return run_blocks<4, 2>(tile, tables);
      case 25: return run_blocks<5, 2>(tile, tables);
      case 26: return run_blocks<6, 2>(tile, tables);
      case 27: return run_blocks<7, 2>(tile, tables);
      default: return run_blocks<1, 1>(tile, tables);
    }
  }

  template <int Cols, int Step>
  void run_blocks(const Tile& tile, const Tables& tables) const {
    const int64_t apart = tables.source->pixel_stride() * (together_ == 1 ? sweep_.source_step_w : 1);
    for (int64_t m = 0; m < copies_; ++m) {
      for (int64_t b = 0; b < blocks_; ++b) {
        const int64_t block = m * blocks_ + b;
        const int64_t channel = b * lanes, count = smaller<int64_t>(lanes, p_.source.channels - channel);
        const V_ start = direct_ && p_.bias ? V_::load(p_.bias + channel, V_::first(count)) : zero<T>();
        V_ sums[tile_rows][tile_cols];
#pragma GCC unroll 2
        for (int r = 0; r < tile_rows; ++r) {
#pragma GCC unroll 8
          for (int p = 0; p < tile_cols; ++p) sums[r][p] = start;
        }
        for (int64_t i = 0; i < tile.lines; ++i) {
          add_line<Cols, Step>(tables.lines[i], apart, channel, count, tables.weight + block * weights_,
                               sums);
        }
        if (direct_) {
          store_direct(tile, channel, count, sums);
        } else {
          T* record = tables.strip + block * lanes;
#pragma GCC unroll 2
          for (int r = 0; r < tile_rows; ++r) {
#pragma GCC unroll 8
            for (int p = 0; p < tile_cols; ++p) {
              sums[r][p].store(record);
              record += record_;
            }
          }
        }
      }
    }
  }

  template <int Cols, int Step>
  static GROUPCONV_INLINE void add_line(const Line& line, int64_t apart, int64_t channel, int64_t count,
                                        const T* weight, V_ (&sums)[tile_rows][tile_cols]) {
    const auto add = [&](auto... reads) GROUPCONV_INLINE_LAMBDA {
      constexpr bool reads_line[] = {decltype(reads)::value...};
      V_ w[tile_rows][Cols];
#pragma GCC unroll 2
      for (int r = 0; r < tile_rows; ++r) {
#pragma GCC unroll 7
        for (int k = 0; k < Cols; ++k) {
          if (reads_line[r]) w[r][k] = V_::load(weight + line.weight[r] + k * lanes);
        }
      }
      const Stored* from = line.from + channel;
      const uint32_t present = line.present;
#pragma GCC unroll 24
      for (int i = 0; i < Step * (tile_cols - 1) + Cols; ++i, from += apart) {
        if (__builtin_expect(present >> i & 1, 1)) {
          V_ x = load_widened<T>(from, count);
          pin(x);
#pragma GCC unroll 2
          for (int r = 0; r < tile_rows; ++r) {
#pragma GCC unroll 7
            for (int k = 0; k < Cols; ++k) {
              const int p = (i - k) / Step;
              if (reads_line[r] && i >= k && p * Step == i - k && p < tile_cols) {
                sums[r][p] = multiply_add(w[r][k], x, sums[r][p]);
              }
            }
          }
        }
      }
    };
    if constexpr (tile_rows == 1) {
      add(Yes{});
    } else if (line.weight[0] >= 0 && line.weight[1] >= 0) {
      add(Yes{}, Yes{});
    } else if (line.weight[0] >= 0) {
      add(Yes{}, No{});
    } else {
      add(No{}, Yes{});
    }
  }
  struct Yes {
    static constexpr bool value = true;
  };
  struct No {
    static constexpr bool value = false;
  };

  struct Place {
    int64_t y, x;
  };
  Place place(const Tile& tile, int64_t r, int64_t p) const {
    return {(tile.row + r) * sweep_.dest_step_h + sweep_.dest_origin_h,
            (tile.col + p) * sweep_.dest_step_w + sweep_.dest_origin_w};
  }

  GROUPCONV_INLINE void store_direct(const Tile& tile, int64_t channel, int64_t count,
                                     const V_ (&sums)[tile_rows][tile_cols]) const {
    if constexpr (in_vectors<Stored>) {
      const Mask mask = V_::first(count);
      const Place first = place(tile, 0, 0);
      Stored* dest = p_.dest.at(tile.n, channel, first.y, first.x);
      const Stored* residual = p_.residual.data ? p_.residual.at(tile.n, channel, first.y, first.x) : nullptr;
      const int64_t row_stride = sweep_.dest_step_h * p_.dest.stride_h;
      const int64_t pixel_stride = sweep_.dest_step_w * p_.dest.stride_w;
      if (plain_ && tile.rows == tile_rows && tile.cols == tile_cols) {
#pragma GCC unroll 2
        for (int r = 0; r < tile_rows; ++r) {
          Stored* to = dest + r * row_stride;
#pragma GCC unroll 8
          for (int p = 0; p < tile_cols; ++p, to += pixel_stride) sums[r][p].store(to, mask);
        }
        return;
      }
      const V_ low = V_::broadcast(finish_.range.low), high = V_::broadcast(finish_.range.high);
#pragma GCC unroll 2
      for (int r = 0; r < tile_rows; ++r) {
        if (__builtin_expect(r >= tile.rows, 0)) break;
#pragma GCC unroll 8
        for (int p = 0; p < tile_cols; ++p) {
          if (__builtin_expect(p >= tile.cols, 0)) break;
          const int64_t at = r * row_stride + p * pixel_stride;
          V_ sum = sums[r][p];
          if (residual) sum = sum + V_::load(residual + at, mask);
          if (p_.activation != Activation::none) sum = clamp(low, high, sum);
          sum.store(dest + at, mask);
        }
      }
    }
  }

  void finish_tile(const Tile& tile, const Tables& tables) const {
    for (int64_t r = 0; r < tile.rows; ++r) {
      for (int64_t p = 0; p < tile.cols; ++p) {
        const T* record = tables.strip + (r * tile_cols + p) * record_;
        const Place at = place(tile, r, p);
        Stored* dest = p_.dest.at(tile.n, 0, at.y, at.x);
        for (int64_t c = 0; c < dest_blocks_ * lanes; c += lanes) {
          V_ sum = V_::gather(record, tables.pick + c, V_::all());
          for (int64_t k = 1; k < picks_; ++k) {
            sum = sum + V_::gather(record, tables.pick + k * dest_blocks_ * lanes + c, V_::all());
          }
          const Mask mask = V_::first(smaller<int64_t>(lanes, p_.dest.channels - c));
          if (p_.bias) sum = sum + V_::load(p_.bias + c, mask);
          if constexpr (in_vectors<Stored>) {
            if (plain_) {
              sum.store(dest + c, mask);
              continue;
            }
          }
          sum.store(tables.picked + c);
        }
        if (in_vectors<Stored> && plain_) continue;
        finish_run(finish_, tables.picked, 1,
                   p_.residual.data ? p_.residual.at(tile.n, 0, at.y, at.x) : nullptr, dest, 1,
                   p_.dest.channels);
      }
    }
  }

  const ConvolveProblem<Stored>& p_;
  const Sweep& sweep_;
  TapGrid grid_;
  int64_t blocks_, dest_blocks_, copies_, picks_;
  Finish<T> finish_;
  bool direct_, plain_;      // sums go to the destination at once; as they are
  int64_t together_, step_;  // columns that share loads, and source pixels from one sum's to the next's
  int64_t weights_, record_;
};

}  // namespace
}  // namespace groupconv::cpu
