// The weight gradient of a dense 1×1 convolution: D[n][c] += Σ_q grad[n][q] · input[c][q] as a product of
// matrices, by multiply_rows.
//
// correlate_rows sums over lanes, which it has to add up for every entry and image, and loads 10 vectors for
// 24 multiply-adds. Here lanes are channels of the input: a block of pixels is transposed into rows of
// channels (in channels_last it lies so already), and the gradient is broadcast, 11 loads for 24, from blocks of
// its channels (in channels_last from where it lies). Transposing costs about 0.45 cycles an element, against out_channels / 16 multiply-adds a lane, so
// it pays for many channels, which is when learning a structure needs it.
//
// 128 pixels × 48 columns are staged at a time, one behind the other, 24 KiB that stay in L1 while all rows of
// the gradient pass over them; D and the gradient's block come from L2.
#pragma once

#include "cpu/multiply.h"
#include "cpu/row_blocks.h"
#include "cpu/workspace.h"

namespace groupconv::cpu {
namespace {

template <class Stored>
class PointwiseGrad {
  using T = compute_t<Stored>;
  static constexpr bool computes_as_stored = __is_same(Stored, T);
  static constexpr int64_t pixels_at_once = 128;
  static constexpr int64_t columns_at_once = 48;  // whole tiles of multiply_rows, whatever the lanes

 public:
  static bool suits(const WeightGradProblem<Stored>& p) {
    constexpr int64_t least_channels = 64, least_pixels = 32;
    const PartitionView& partition = *p.partition;
    return p.slices == 1 && partition.groups == 1 && partition.in_channels >= least_channels &&
           partition.out_channels >= least_channels && p.sweep->cols >= least_pixels &&
           p.sweep->pointwise() && p.sweep->rows == 1 && p.input.height == 1 && p.grad.height == 1 &&
           p.input.width == p.sweep->cols && p.grad.width == p.sweep->cols &&
           (p.input.stride_w == 1 || p.input.stride_c == 1) &&
           counts_up(partition.inputs, partition.in_channels) &&
           counts_up(partition.outputs, partition.out_channels);
  }

  explicit PointwiseGrad(const WeightGradProblem<Stored>& problem)
      : p_(problem),
        ins_(p_.input.channels),
        outs_(p_.grad.channels),
        panels_(divide_up(ins_, columns_at_once)),
        blocks_(divide_up(p_.sweep->cols, pixels_at_once)) {}

  // Whole tiles of columns, and every sum in the order of the pixels: any cut gives the same bits.
  void run() const {
    const int64_t items = p_.threads.count > 1 ? smaller(panels_, 4 * p_.threads.count) : int64_t{1};
    for_each_item(p_.threads, items,
                  [&](int64_t item) { run_panels(panels_ * item / items, panels_ * (item + 1) / items); });
  }

 private:
  static bool counts_up(const ChannelLists& lists, int64_t channels) {
    if (lists.count(0) != channels) return false;
    for (int64_t c = 0; c < channels; ++c) {
      if (lists.channels[c] != c) return false;
    }
    return true;
  }

  void run_panels(int64_t first_panel, int64_t end_panel) const {
    Workspace space;
    space.plan<T>(pixels_at_once * columns_at_once);
    const int64_t grads = divide_up(outs_, max_tile_rows) * max_tile_rows * pixels_at_once;
    space.plan<T>(grads);
    space.plan<T>(most_columns<T> * pixels_at_once);
    space.plan<const T*>(pixels_at_once);
    space.plan<int64_t>(pixels_at_once);
    space.plan<T*>(outs_);
    space.open();
    T* rows = space.take<T>(pixels_at_once * columns_at_once);
    T* staged_grad = space.take<T>(grads);
    T* columns = space.take<T>(most_columns<T> * pixels_at_once);
    const T** sources = space.take<const T*>(pixels_at_once);
    int64_t* steps = space.take<int64_t>(pixels_at_once);
    T** dests = space.take<T*>(outs_);
    for (int64_t q = 0; q < pixels_at_once; ++q) sources[q] = rows + q * columns_at_once;

    MultiplyJob<T> job{};
    job.sources = sources;
    job.steps = steps;
    job.columns = columns;
    job.dests = dests;
    job.accumulate = true;
    for (int64_t unit = 0; unit < p_.input.batch * blocks_; ++unit) {
      const Pixels pixels = pixels_of(unit), next = pixels_of(unit + 1);
      job.depth = pixels.count;
      stage_grad(pixels, staged_grad, steps, job);
      FetchAhead grad = ahead(p_.grad, next, 0, outs_);
      for (int64_t panel = first_panel; panel < end_panel; ++panel) {
        const int64_t first = begin_of(panel);
        const bool last = panel + 1 == end_panel;
        const int64_t then = last ? first_panel : panel + 1;
        job.length = begin_of(panel + 1) - first;
        stage_input(pixels, first, job.length, rows);
        for (int64_t r = 0; r < outs_; ++r) dests[r] = p_.weight_grad + r * ins_ + first;
        FetchAhead input =
            ahead(p_.input, last ? next : pixels, begin_of(then), begin_of(then + 1) - begin_of(then));
        multiply_some_rows(job, input, grad, end_panel - first_panel);
      }
    }
  }

  // Pixels of an image that are staged together.
  struct Pixels {
    int64_t n, begin, count;
  };
  Pixels pixels_of(int64_t unit) const {
    const int64_t n = unit / blocks_, b = unit % blocks_;
    const int64_t begin = p_.sweep->cols * b / blocks_, end = p_.sweep->cols * (b + 1) / blocks_;
    return {n, begin, n < p_.input.batch ? end - begin : 0};
  }

  int64_t begin_of(int64_t panel) const { return smaller(panel * columns_at_once, ins_); }

  // Lines of an image that is rows, far apart, for which the hardware does not look ahead.
  struct FetchAhead {
    const Stored* row = nullptr;
    int64_t distance = 0, rows = 0, length = 0, at = 0;

    void some(int64_t lines) {
      constexpr int64_t line = 64 / sizeof(Stored);
      for (; lines > 0 && rows > 0; --lines) {
        __builtin_prefetch(row + at, 0, 2);
        at += line;
        if (at >= length) {
          at = 0;
          row += distance;
          --rows;
        }
      }
    }
    int64_t lines() const { return rows * (length / static_cast<int64_t>(64 / sizeof(Stored)) + 1); }
  };
  static FetchAhead ahead(const Image<const Stored>& image, const Pixels& pixels, int64_t first,
                          int64_t count) {
    if (image.stride_w != 1 || pixels.count == 0) return {};
    return {image.at(pixels.n, first, 0, pixels.begin), image.stride_c, count, pixels.count};
  }

  // A few rows at a time, and between them what the next panel reads and a share of the next block's gradient.
  void multiply_some_rows(MultiplyJob<T> job, FetchAhead& input, FetchAhead& grad, int64_t panels) const {
    constexpr int64_t rows_at_once = 2 * max_tile_rows;
    const int64_t times = divide_up(outs_, rows_at_once);
    const int64_t inputs = divide_up(input.lines(), times), grads = divide_up(grad.lines(), times * panels);
    for (int64_t r = 0; r < outs_; r += rows_at_once) {
      input.some(inputs);
      grad.some(grads);
      job.rows = smaller(rows_at_once, outs_ - r);
      multiply_rows(job);
      job.dests += rows_at_once;
      if (job.blocks) {
        job.blocks += rows_at_once * job.depth;
      } else {
        job.weight += rows_at_once;
      }
    }
  }

  void stage_input(const Pixels& pixels, int64_t first, int64_t columns, T* rows) const {
    const Stored* image = p_.input.at(pixels.n, first, 0, pixels.begin);
    const int64_t depth = pixels.count;
    if (p_.input.stride_c != 1) {
      transpose_in(image, p_.input.stride_c, columns, depth, rows, columns_at_once);
    } else {
      for (int64_t q = 0; q < depth; ++q) {
        widen_row(image + q * p_.input.stride_w, 1, rows + q * columns_at_once, columns);
      }
    }
    if (!p_.prologue) return;
    const Prologue<T> prologue = from_channel(p_.prologue, first);
    for (int64_t q = 0; q < depth; ++q, rows += columns_at_once) prepare_pixel(prologue, rows, rows, columns);
  }

  // The gradient's channels are the rows of weights: next to each other in channels_last, else brought into blocks.
  void stage_grad(const Pixels& pixels, T* staged, int64_t* steps, MultiplyJob<T>& job) const {
    const Image<const Stored>& grad = p_.grad;
    const Stored* image = grad.at(pixels.n, 0, 0, pixels.begin);
    job.weight_row_stride = 1;
    if (grad.stride_c == 1) {
      if constexpr (computes_as_stored) {
        job.weight = image;
        for (int64_t q = 0; q < job.depth; ++q) steps[q] = q * grad.stride_w;
      } else {
        for (int64_t q = 0; q < job.depth; ++q) {
          widen_row(image + q * grad.stride_w, 1, staged + q * outs_, outs_);
          steps[q] = q * outs_;
        }
        job.weight = staged;
      }
      return;
    }
    job.weight = nullptr;
    job.blocks = staged;
    job.block_steps = steps;
    for (int64_t q = 0; q < job.depth; ++q) steps[q] = q * max_tile_rows;
    if (grad.stride_w == 1) {
      bring_into_blocks(image, grad.stride_c, outs_, job.depth, staged);
      return;
    }
    for (int64_t r = 0; r < outs_; r += max_tile_rows, staged += job.depth * max_tile_rows) {
      const int64_t rows = smaller<int64_t>(max_tile_rows, outs_ - r);
      for (int64_t q = 0; q < job.depth; ++q) {
        for (int64_t i = 0; i < rows; ++i) {
          staged[q * max_tile_rows + i] = element_of<T>(image[(r + i) * grad.stride_c + q * grad.stride_w]);
        }
      }
    }
  }

  const WeightGradProblem<Stored>& p_;
  int64_t ins_, outs_, panels_, blocks_;
};

}  // namespace
}  // namespace groupconv::cpu
