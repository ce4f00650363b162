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
        blocks_(divide_up(p_.sweep->cols, pixels_at_once)) {}

  // Whole tiles of columns, and every sum in the order of the pixels: any cut gives the same bits.
  void run() const {
    const int64_t panels = divide_up(ins_, columns_at_once);
    const int64_t items = p_.threads.count > 1 ? smaller(panels, 4 * p_.threads.count) : int64_t{1};
    for_each_item(p_.threads, items,
                  [&](int64_t item) { run_panels(panels * item / items, panels * (item + 1) / items); });
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
    space.plan<T>(pixels_at_once);
    space.plan<const T*>(pixels_at_once);
    space.plan<int64_t>(pixels_at_once);
    space.plan<T*>(outs_);
    space.open();
    T* rows = space.take<T>(pixels_at_once * columns_at_once);
    T* staged_grad = space.take<T>(grads);
    T* column = space.take<T>(pixels_at_once);
    const T** sources = space.take<const T*>(pixels_at_once);
    int64_t* steps = space.take<int64_t>(pixels_at_once);
    T** dests = space.take<T*>(outs_);
    for (int64_t q = 0; q < pixels_at_once; ++q) sources[q] = rows + q * columns_at_once;

    MultiplyJob<T> job{};
    job.sources = sources;
    job.steps = steps;
    job.column = column;
    job.dests = dests;
    job.rows = outs_;
    job.accumulate = true;
    for (int64_t n = 0; n < p_.input.batch; ++n) {
      for (int64_t b = 0; b < blocks_; ++b) {
        const int64_t begin = p_.sweep->cols * b / blocks_;
        job.depth = p_.sweep->cols * (b + 1) / blocks_ - begin;
        stage_grad(n, begin, staged_grad, steps, job);
        for (int64_t panel = first_panel; panel < end_panel; ++panel) {
          const int64_t first = panel * columns_at_once;
          job.length = smaller(columns_at_once, ins_ - first);
          stage_input(n, first, job.length, begin, job.depth, rows);
          for (int64_t r = 0; r < outs_; ++r) dests[r] = p_.weight_grad + r * ins_ + first;
          multiply_rows(job);
        }
      }
    }
  }

  void stage_input(int64_t n, int64_t first, int64_t columns, int64_t begin, int64_t depth, T* rows) const {
    const Stored* image = p_.input.at(n, first, 0, begin);
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
  void stage_grad(int64_t n, int64_t begin, T* staged, int64_t* steps, MultiplyJob<T>& job) const {
    const Image<const Stored>& grad = p_.grad;
    const Stored* image = grad.at(n, 0, 0, begin);
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
  int64_t ins_, outs_, blocks_;
};

}  // namespace
}  // namespace groupconv::cpu
