// Weight gradient of a depthwise convolution in channels_last: lanes are channels, nothing is staged but what
// comes through a prologue.
//
// Tile: up to 3 kernel rows × 3 columns of sums over 7 gradient pixels of a row (2 × 7 of the widest window;
// 4 pixels with 16 registers). A source pixel is loaded once for the columns of the window that meet it.
//   registers  9 sums, 7 gradients, 1 source
//   loads      3×3: 27 sources and 7 gradients for 63 multiply-adds
// Lanes are in the input's order; where output channels lie elsewhere, their gradients are gathered.
#pragma once

#include "cpu/depthwise.h"
#include "cpu/depthwise_prologue.h"

namespace groupconv::cpu {
namespace {

template <class T>
class DepthwiseGradChannels {
  using V_ = Vec<T>;
  static constexpr int lanes = V_::lanes;
  static constexpr int tile_cols = vector_registers == 32 ? 7 : 4;
  static constexpr int most_sums = vector_registers == 32 ? 15 : 9;
  static constexpr int widest = 7;

 public:
  DepthwiseGradChannels(const WeightGradProblem<T>& problem, const Depthwise& depthwise)
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
  }

  static bool suits(const WeightGradProblem<T>& p, const Depthwise& depthwise) {
    const bool full = depthwise.most_outputs <= 1 || p.input.channels >= lanes;
    return full && p.input.stride_c == 1 && p.grad.stride_c == 1;
  }

  // Rows of the batch are cut into slices, channels into chunks.
  void run() const {
    constexpr int64_t blocks_per_item = 8, most_chunks = 16;
    // Every chunk looks through all groups for its own, so there are few, and one for one thread.
    const int64_t wanted = larger(blocks_per_item, divide_up(blocks_, most_chunks));
    const int64_t chunks = p_.threads.count > 1 ? divide_up(blocks_, wanted) : 1;
    for_each_item(p_.threads, p_.slices * chunks, [&](int64_t item) {
      const int64_t chunk = item % chunks;
      run_blocks(item / chunks, blocks_ * chunk / chunks, blocks_ * (chunk + 1) / chunks);
    });
  }

 private:
  // One gradient row, one block of channels, some rows of the window.
  struct Job {
    int64_t n, row, block, top;
    const int32_t* outputs;  // of the lanes; null: the same as the inputs
    T* sums;                 // [tap][lanes]
    const PreparedRows<T>* input;
    int64_t channel;  // where the block begins in a prepared pixel
  };

  void run_blocks(int64_t slice, int64_t first, int64_t end) const {
    const int64_t count = copies_ * (end - first);
    const int64_t top = grid_.rows > 0 ? grid_.row(0) : 0;
    const int64_t reach = grid_.rows > 0 ? grid_.row(grid_.rows - 1) - top + 1 : 1;
    PreparedRows<T> input(p_.input, p_.prologue, first * lanes,
                          smaller(end * lanes, p_.input.channels) - first * lanes, reach);
    Workspace space;
    space.plan<T>(count * taps_ * lanes);
    space.plan<int32_t>(count * lanes);
    space.plan<T>(input.size());
    space.open();
    T* sums = space.take<T>(count * taps_ * lanes);
    int32_t* outputs = space.take<int32_t>(count * lanes);
    input.open(space.take<T>(input.size()));
    fill_zero(sums, count * taps_ * lanes);
    fill_zero(outputs, count * lanes);
    for_each_weight(first, end, [&](int64_t slot, int64_t output, int64_t) {
      outputs[slot] = static_cast<int32_t>(output);
    });
    const int64_t units = p_.input.batch * sweep_.rows;
    for (int64_t unit = units * slice / p_.slices; unit < units * (slice + 1) / p_.slices; ++unit) {
      const int64_t n = unit / sweep_.rows, row = unit % sweep_.rows;
      const int64_t read = row * sweep_.source_step_h + top;
      input.advance(n, read, read + reach);
      for (int64_t i = 0; i < count; ++i) {
        const int64_t block = i % (end - first);
        add_row({n, row, first + block, 0, straight_ ? nullptr : outputs + i * lanes,
                 sums + i * taps_ * lanes, &input, block * lanes});
      }
    }
    T* total = p_.weight_grad + slice * p_.partition->entries() * p_.window_area;
    for_each_weight(first, end, [&](int64_t slot, int64_t, int64_t weight) {
      const T* from = sums + slot / lanes * taps_ * lanes + slot % lanes;
      for (int64_t i = 0; i < grid_.rows; ++i) {
        for (int64_t j = 0; j < grid_.cols; ++j, from += lanes) {
          total[weight * p_.window_area + grid_.weight(i, j)] += *from;
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
    const T* sources[Rows];
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
    const T* grads = p_.grad.at(job.n, job.outputs ? 0 : channel, job.row, 0);
    const auto add_pixels = [&](int64_t col, auto pixels) GROUPCONV_INLINE_LAMBDA {
      constexpr int length = decltype(pixels)::value;
      constexpr int reach = Step * (length - 1) + Cols;
      V_ g[length];
#pragma GCC unroll 7
      for (int p = 0; p < length; ++p) {
        const T* from = grads + (col + p) * p_.grad.stride_w;
        g[p] =
            job.outputs ? V_::gather(from, job.outputs, V_::first(count)) : V_::load(from, V_::first(count));
      }
      const int64_t x = col * sweep_.source_step_w + grid_.col(first_col);
      const uint32_t present = pixels_inside(x, reach, stride, p_.input.width);
#pragma GCC unroll 3
      for (int i = 0; i < Rows; ++i) {
        if (!inside[i]) continue;
        const T* from = sources[i] + x * pixel_stride;
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
  struct Pixels {
    static constexpr int value = Count;
  };

  const WeightGradProblem<T>& p_;
  const Sweep& sweep_;
  TapGrid grid_;
  int64_t blocks_, copies_;
  bool straight_;
  int64_t together_, step_, taps_;
};

}  // namespace
}  // namespace groupconv::cpu
