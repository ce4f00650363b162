// Weight gradient of a depthwise convolution in channels_last: lanes are channels, nothing is staged but what
// comes through a prologue.
//
// Tile: up to 3 kernel rows × 3 columns of sums over 7 gradient pixels of a row (2 × 7 of the widest window;
// 4 pixels with 16 registers). A source pixel is loaded once for the columns of the window that meet it.
//   registers  9 sums, 7 gradients, 1 source
//   loads      3×3: 27 sources and 7 gradients for 63 multiply-adds
// bfloat16, of which every load is widened, goes along bands of up to 4 rows, column by column, where the window is 3×3
// with stride 1: a source pixel meets the gradients of three columns, which stay in registers.
//   registers  9 sums, 3 · 4 gradients, 1 source
//   loads      6 sources and 4 gradients for 36 multiply-adds
// Lanes are in the input's order; where output channels lie elsewhere, their gradients are gathered.
#pragma once

#include <type_traits>

#include "cpu/depthwise/depthwise.h"
#include "cpu/depthwise/prologue.h"
#include "cpu/staging/slices.h"
#include "cpu/vector/strides.h"

namespace groupconv::cpu {
namespace {

template <class Stored>
class DepthwiseGradChannels {
  using T = compute_t<Stored>;
  using V_ = Vec<T>;
  static constexpr int lanes = V_::lanes;
  static constexpr int tile_cols = vector_registers == 32 ? 7 : 4;
  static constexpr int most_sums = vector_registers == 32 ? 15 : 9;
  static constexpr int widest = 7;
  static constexpr bool has_bands = vector_registers == 32 && !__is_same(Stored, T);
  static constexpr int band_window = 3;
  static constexpr int most_band_rows = 4;
  // So that all vectors of a pixel are read soon after each other, as memory likes it.
  static constexpr int64_t most_band_columns = 16;

 public:
  DepthwiseGradChannels(const WeightGradProblem<Stored>& problem, const Depthwise& depthwise)
      : p_(problem),
        sweep_(*problem.sweep),
        grid_(sweep_),
        blocks_(divide_up(p_.input.channels, lanes)),
        copies_(depthwise.most_outputs),
        straight_(depthwise.straight) {
    together_ = grid_.col_step == 1 && grid_.cols <= widest && sweep_.source_step_w <= 2
                    ? larger(grid_.cols, int64_t{1})
                    : 1;
    step_ = together_ == 1 ? 1 : sweep_.source_step_w;
    taps_ = grid_.rows * grid_.cols;
    in_bands_ = has_bands && grid_.rows == band_window && grid_.cols == band_window && grid_.row_step == 1 &&
                grid_.col_step == 1 && sweep_.source_step_h == 1 && sweep_.source_step_w == 1;
  }

  static bool suits(const WeightGradProblem<Stored>& p, const Depthwise& depthwise) {
    const bool full = depthwise.most_outputs <= 1 || p.input.channels >= lanes;
    return full && p.input.stride_c == 1 && p.grad.stride_c == 1 && can_gather<Stored>(p.grad.channels);
  }

  // Rows of the batch are cut into slices, channels into chunks.
  void run() const {
    constexpr int64_t blocks_per_item = 8, most_chunks = 16;
    // Every chunk looks through all groups for its own, so there are few, and one for one thread.
    const int64_t wanted = larger(blocks_per_item, divide_up(blocks_, most_chunks));
    const int64_t chunks = p_.threads.count > 1 ? divide_up(blocks_, wanted) : 1;
    add_slices(p_.threads, p_.slices, chunks, p_.weight_grad, p_.partition->entries() * p_.window_area,
               [&](int64_t slice, int64_t chunk, T* weight_grad) {
                 run_blocks(slice, blocks_ * chunk / chunks, blocks_ * (chunk + 1) / chunks, weight_grad);
               });
  }

 private:
  // One gradient row, or the first of a band, one block of channels, some rows of the window.
  struct Job {
    int64_t n, row, block, top;
    const int32_t* outputs;  // of the lanes; null: the same as the inputs
    T* sums;                 // [tap][lanes]
    const PreparedRows<Stored>* input;
    int64_t channel;  // where the block begins in a prepared pixel
  };

  void run_blocks(int64_t slice, int64_t first, int64_t end, T* weight_grad) const {
    const int64_t count = copies_ * (end - first);
    const int64_t top = grid_.rows > 0 ? grid_.row(0) : 0;
    const int64_t window_reach = grid_.rows > 0 ? grid_.row(grid_.rows - 1) - top + 1 : 1;
    const int64_t most_rows = in_bands_ ? most_band_rows : 1;
    const int64_t reach = most_rows - 1 + window_reach;
    PreparedRows<Stored> input(p_.input, p_.prologue, first * lanes,
                               smaller(end * lanes, p_.input.channels) - first * lanes, reach);
    Workspace space;
    space.plan<T>(count * taps_ * lanes);
    space.plan<int32_t>(count * lanes);
    space.plan<Stored>(input.size());
    space.open();
    T* sums = space.take<T>(count * taps_ * lanes);
    int32_t* outputs = space.take<int32_t>(count * lanes);
    input.open(space.take<Stored>(input.size()));
    fill_zero(sums, count * taps_ * lanes);
    fill_zero(outputs, count * lanes);
    for_each_weight(first, end, [&](int64_t slot, int64_t output, int64_t) {
      outputs[slot] = static_cast<int32_t>(output);
    });
    const int64_t units = p_.input.batch * sweep_.rows, beyond = units * (slice + 1) / p_.slices;
    for (int64_t unit = units * slice / p_.slices; unit < beyond;) {
      const int64_t n = unit / sweep_.rows, row = unit % sweep_.rows;
      const int64_t left = smaller(sweep_.rows - row, beyond - unit);
      const int64_t rows = divide_up(left, divide_up(left, most_rows));
      const int64_t read = row * sweep_.source_step_h + top;
      input.advance(n, read, read + rows - 1 + window_reach);
      const auto for_each_block = [&](const auto& add) {
        for (int64_t i = 0; i < count; ++i) {
          const int64_t block = i % (end - first);
          add(Job{n, row, first + block, 0, straight_ ? nullptr : outputs + i * lanes,
                  sums + i * taps_ * lanes, &input, block * lanes});
        }
      };
      if (in_bands_) {
        const int64_t parts = divide_up(sweep_.cols, most_band_columns);
        for (int64_t part = 0; part < parts; ++part) {
          const int64_t begin = sweep_.cols * part / parts, last = sweep_.cols * (part + 1) / parts;
          for_each_block([&](const Job& job) { add_band(job, rows, begin, last); });
        }
      } else {
        for_each_block([&](const Job& job) { add_row(job); });
      }
      unit += rows;
    }
    for_each_weight(first, end, [&](int64_t slot, int64_t, int64_t weight) {
      const T* from = sums + slot / lanes * taps_ * lanes + slot % lanes;
      for (int64_t i = 0; i < grid_.rows; ++i) {
        for (int64_t j = 0; j < grid_.cols; ++j, from += lanes) {
          weight_grad[weight * p_.window_area + grid_.weight(i, j)] += *from;
        }
      }
    });
  }

  // Slot: copy, block and lane of an input channel between two blocks.
  template <class Body>
  void for_each_weight(int64_t first, int64_t end, const Body& body) const {
    const PartitionView& partition = *p_.partition;
    for (int64_t g = 0; g < partition.groups; ++g) {
      const int64_t lane = partition.inputs.of(g)[0] - first * lanes;
      if (lane < 0 || lane >= (end - first) * lanes) continue;
      for (int64_t j = 0; j < partition.outputs.count(g); ++j) {
        body(j * (end - first) * lanes + lane, partition.outputs.of(g)[j], partition.weight_offsets[g] + j);
      }
    }
  }

  void add_band(const Job& job, int64_t rows, int64_t begin, int64_t end) const {
    if constexpr (has_bands) {
      switch (rows) {
        case 1: return add_band_rows<1>(job, begin, end);
        case 2: return add_band_rows<2>(job, begin, end);
        case 3: return add_band_rows<3>(job, begin, end);
        default: return add_band_rows<4>(job, begin, end);
      }
    }
  }

  // Gradient columns from `begin` to `end`.
  template <int R>
  void add_band_rows(const Job& job, int64_t begin, int64_t end) const {
    constexpr int source_rows = R + band_window - 1;
    const int64_t channel = job.block * lanes;
    const auto mask = V_::first(smaller<int64_t>(lanes, p_.input.channels - channel));
    const int64_t width = p_.input.width, pixel = job.input->pixel_stride(), left = grid_.col(0);
    const Stored* sources[source_rows];  // column 0, or null where there is no row
#pragma GCC unroll 6
    for (int i = 0; i < source_rows; ++i) {
      const int64_t y = job.row + grid_.row(0) + i;
      sources[i] = y >= 0 && y < p_.input.height ? job.input->row(job.n, y) + job.channel : nullptr;
    }
    const Strides down(p_.grad.stride_h * static_cast<int64_t>(sizeof(Stored)));
    const Stored* grads = p_.grad.at(job.n, job.outputs ? 0 : channel, job.row, begin);
    V_ sums[band_window][band_window];
#pragma GCC unroll 9
    for (int t = 0; t < band_window * band_window; ++t) {
      sums[t / band_window][t % band_window] = V_::load(job.sums + t * lanes);
    }

    V_ g[band_window][R];  // of gradient columns that come and go in turns
    int64_t col = begin, from = (begin + left) * pixel;
    // Source column col + left is the window's first of gradient column `col`, and its last of that two before.
    const auto add_column = [&](V_(&newest)[R], V_(&middle)[R], V_(&oldest)[R]) GROUPCONV_INLINE_LAMBDA {
      const auto add = [&](int j, const V_(&gradients)[R], int i, const V_& x) GROUPCONV_INLINE_LAMBDA {
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) {
          const int k = i - r;
          if (k >= 0 && k < band_window) sums[k][j] = multiply_add(gradients[r], x, sums[k][j]);
        }
      };
      if (col < end) {
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) {
          const Stored* at = down.at(grads, r);
          newest[r] = job.outputs ? V_::gather(at, job.outputs, mask) : V_::load(at, mask);
        }
        grads += p_.grad.stride_w;
      }
      if (col + left >= 0 && col + left < width) {
        const bool whole = col - 2 >= begin && col < end;
#pragma GCC unroll 6
        for (int i = 0; i < source_rows; ++i) {
          if (!sources[i]) continue;
          V_ x = V_::load(sources[i] + from, mask);
          pin(x);
          if (__builtin_expect(whole, 1)) {
            add(0, newest, i, x);
            add(1, middle, i, x);
            add(2, oldest, i, x);
          } else {
            if (col < end) add(0, newest, i, x);
            if (col - 1 >= begin && col - 1 < end) add(1, middle, i, x);
            if (col - 2 >= begin) add(2, oldest, i, x);
          }
        }
      }
      ++col;
      from += pixel;
      return col < end + band_window - 1;
    };
    while (add_column(g[0], g[2], g[1]) && add_column(g[1], g[0], g[2]) && add_column(g[2], g[1], g[0])) {
    }
#pragma GCC unroll 9
    for (int t = 0; t < band_window * band_window; ++t) {
      sums[t / band_window][t % band_window].store(job.sums + t * lanes);
    }
  }

  void add_row(Job job) const {
    switch (step_ * 10 + together_) {
      case 12: return add_taps<2, 1>(job);
      case 13: return add_taps<3, 1>(job);
      case 14: return add_taps<4, 1>(job);
      case 15: return add_taps<5, 1>(job);
      case 16: return add_taps<6, 1>(job);
      case 17: return add_taps<7, 1>(job);
      case 22: return add_taps<2, 2>(job);
      case 23: return add_taps<3, 2>(job);
      case 24: return add_taps<4, 2>(job);
      case 25: return add_taps<5, 2>(job);
      case 26: return add_taps<6, 2>(job);
      case 27: return add_taps<7, 2>(job);
      default: return add_taps<1, 1>(job);
    }
  }

  template <int Cols, int Step>
  void add_taps(Job job) const {
    constexpr int rows = smaller(3, most_sums / Cols);
    for (; job.top < grid_.rows; job.top += rows) {
      for (int64_t j = 0; j < grid_.cols; j += Cols) add_window_rows<rows, Cols, Step>(job, j);
    }
  }

  template <int Rows, int Cols, int Step>
  void add_window_rows(const Job& job, int64_t first_col) const {
    const int64_t channel = job.block * lanes;
    const int64_t count = smaller<int64_t>(lanes, p_.input.channels - channel);
    const int64_t stride = Cols == 1 ? sweep_.source_step_w : 1;
    const int64_t pixel_stride = job.input->pixel_stride();
    const Stored* sources[Rows];
    bool inside[Rows];
    V_ sums[Rows][Cols];
    T* totals = job.sums + (job.top * grid_.cols + first_col) * lanes;
#pragma GCC unroll 3
    for (int i = 0; i < Rows; ++i) {
      const int64_t y = job.row * sweep_.source_step_h + grid_.row(job.top + i);
      inside[i] = job.top + i < grid_.rows && y >= 0 && y < p_.input.height;
      sources[i] = inside[i] ? job.input->row(job.n, y) + job.channel : nullptr;
#pragma GCC unroll 7
      for (int k = 0; k < Cols; ++k) {
        sums[i][k] = inside[i] ? V_::load(totals + (i * grid_.cols + k) * lanes) : zero<T>();
      }
    }
    const Stored* grads = p_.grad.at(job.n, job.outputs ? 0 : channel, job.row, 0);
    const auto add_pixels = [&](int64_t col, auto pixels) GROUPCONV_INLINE_LAMBDA {
      constexpr int length = decltype(pixels)::value;
      constexpr int reach = Step * (length - 1) + Cols;
      V_ g[length];
#pragma GCC unroll 7
      for (int p = 0; p < length; ++p) {
        const Stored* from = grads + (col + p) * p_.grad.stride_w;
        g[p] =
            job.outputs ? V_::gather(from, job.outputs, V_::first(count)) : V_::load(from, V_::first(count));
      }
      const int64_t x = col * sweep_.source_step_w + grid_.col(first_col);
      const uint32_t present = pixels_inside(x, reach, stride, p_.input.width);
#pragma GCC unroll 3
      for (int i = 0; i < Rows; ++i) {
        if (!inside[i]) continue;
        const Stored* from = sources[i] + x * pixel_stride;
#pragma GCC unroll 24
        for (int at = 0; at < reach; ++at, from += stride * pixel_stride) {
          if (__builtin_expect(present >> at & 1, 1)) {
            V_ source = V_::load(from, V_::first(count));
            pin(source);
#pragma GCC unroll 7
            for (int k = 0; k < Cols; ++k) {
              const int p = (at - k) / Step;
              if (at >= k && p * Step == at - k && p < length) {
                sums[i][k] = multiply_add(g[p], source, sums[i][k]);
              }
            }
          }
        }
      }
    };
    int64_t col = 0;
    for (; col + tile_cols <= sweep_.cols; col += tile_cols) add_pixels(col, Pixels<tile_cols>{});
    for (; col < sweep_.cols; ++col) add_pixels(col, Pixels<1>{});
#pragma GCC unroll 3
    for (int i = 0; i < Rows; ++i) {
#pragma GCC unroll 7
      for (int k = 0; k < Cols; ++k) {
        if (inside[i]) sums[i][k].store(totals + (i * grid_.cols + k) * lanes);
      }
    }
  }
  template <int Count>
  using Pixels = std::integral_constant<int, Count>;

  const WeightGradProblem<Stored>& p_;
  const Sweep& sweep_;
  TapGrid grid_;
  int64_t blocks_, copies_;
  bool straight_;
  bool in_bands_;  // 3×3 with stride 1
  int64_t together_, step_, taps_;
};

}  // namespace
}  // namespace groupconv::cpu
