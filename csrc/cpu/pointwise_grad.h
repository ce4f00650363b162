// The weight gradient of a dense 1×1 convolution: D[n][c] += Σ_q grad[n][q] · input[c][q] as a product of
// matrices, by add_outer_products.
//
// correlate_rows sums over lanes, which it has to add up for every entry and image, and loads 10 vectors for
// 24 multiply-adds. Here lanes are channels of the input: a block of pixels is transposed into rows of
// channels (in channels_last it lies so already), and the gradient is broadcast, 11 loads for 24, from where it
// lies (in channels_last from blocks of its channels). Transposing costs about 0.45 cycles an element, against
// out_channels / 16 multiply-adds a lane, so it pays for many channels, which is when learning a structure needs it.
//
// As many pixels as fill most of L1 in rows of 48 columns are staged at a time, and stay there while all rows of
// the gradient pass over them; D and the block's gradient come from L2, where the next block's are fetched to.
#pragma once

#include "cpu/caches.h"
#include "cpu/outer_products.h"
#include "cpu/staging.h"
#include "cpu/workspace.h"

namespace groupconv::cpu {
namespace {

template <class Stored>
class PointwiseGrad {
  using T = compute_t<Stored>;
  static constexpr bool computes_as_stored = __is_same(Stored, T);

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
        row_blocks_(divide_up(outs_, max_tile_rows)),
        grad_lies_(computes_as_stored && p_.grad.stride_w == 1 && p_.grad.stride_c != 1),
        pixels_at_once_(pixels_at_once()),
        blocks_(divide_up(p_.sweep->cols, pixels_at_once_)) {}

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

  // A panel of the input takes four fifths of L1, and the gradient's blocks no more than scratch may.
  int64_t pixels_at_once() const {
    constexpr int64_t most_scratch = 896 << 10, fewest = 32, size = sizeof(T);
    const int64_t fit = caches().nearest * 4 / 5 / (columns_at_once * size);
    const int64_t blocks = grad_lies_ ? fit : most_scratch / (row_blocks_ * max_tile_rows * size);
    return larger(smaller(fit, blocks), fewest);
  }

  void run_panels(int64_t first_panel, int64_t end_panel) const {
    const int64_t blocks_size = grad_lies_ ? 0 : row_blocks_ * max_tile_rows * pixels_at_once_;
    Workspace space;
    space.plan<T>(pixels_at_once_ * columns_at_once);
    space.plan<T>(blocks_size);
    space.plan<T>(max_tile_rows * columns_at_once);
    space.open();
    T* rows = space.take<T>(pixels_at_once_ * columns_at_once);
    T* blocks = space.take<T>(blocks_size);
    T* edge = space.take<T>(max_tile_rows * columns_at_once);

    for (int64_t unit = 0; unit < p_.input.batch * blocks_; ++unit) {
      const Pixels pixels = pixels_of(unit), next = pixels_of(unit + 1);
      if (!grad_lies_) stage_grad(pixels, blocks);
      RowsAhead next_grad = ahead(p_.grad, next, 0, outs_);
      RowsAhead next_input = ahead(p_.input, next, 0, ins_);
      for (int64_t panel = first_panel; panel < end_panel; ++panel) {
        const bool last = panel + 1 == end_panel;
        const int64_t then = last ? first_panel : panel + 1;
        stage_input(pixels, begin_of(panel), width_of(panel), rows);
        if (p_.input.stride_c != 1)
          next_input = ahead(p_.input, last ? next : pixels, begin_of(then), width_of(then));
        multiply(pixels, blocks, rows, panel, next_input, next_grad, edge);
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

  static int64_t begin_of(int64_t panel) { return panel * columns_at_once; }
  int64_t width_of(int64_t panel) const { return smaller(columns_at_once, ins_ - begin_of(panel)); }
  // The last rows of the gradient share some with the block before, and no block has fewer.
  int64_t row_of(int64_t block) const { return smaller(block * max_tile_rows, outs_ - max_tile_rows); }

  // Rows of an image that are far apart, for which the hardware does not look ahead.
  struct RowsAhead {
    const Stored* row = nullptr;
    int64_t distance = 0, rows = 0;

    const char* next() {
      const Stored* here = row;
      row += distance;
      --rows;
      return reinterpret_cast<const char*>(here);
    }
  };
  static RowsAhead ahead(const Image<const Stored>& image, const Pixels& pixels, int64_t first,
                         int64_t count) {
    if (pixels.count == 0) return {};
    const Stored* begin = image.at(pixels.n, first, 0, pixels.begin);
    if (image.stride_w == 1) return {begin, image.stride_c, count};
    return {begin, pixels.count, image.stride_w == image.channels ? count : 0};
  }

  void multiply(const Pixels& pixels, const T* blocks, const T* rows, int64_t panel, RowsAhead& next_input,
                RowsAhead& next_grad, T* edge) const {
    constexpr int64_t lanes = Vec<T>::lanes, tile = tile_vectors(max_tile_rows) * lanes;
    const int64_t width = width_of(panel);
    OuterProducts<T> job{};
    job.grad_row = p_.grad.stride_c;
    job.pixels = pixels.count;
    for (int64_t block = 0; block < row_blocks_; ++block) {
      const int64_t row = row_of(block), skipped = block * max_tile_rows - row;
      if constexpr (computes_as_stored) job.grad = p_.grad.at(pixels.n, row, 0, pixels.begin);
      if (!grad_lies_) job.grad = blocks + block * max_tile_rows * pixels.count;
      for (const char*& fetched : job.ahead) {
        RowsAhead& from = next_input.rows > 0 ? next_input : next_grad;
        fetched = from.rows > 0 ? from.next() : reinterpret_cast<const char*>(rows);
      }
      for (int64_t column = 0; column < width; column += tile) {
        const int64_t columns = smaller(tile, width - column);
        T* dest = p_.weight_grad + row * ins_ + begin_of(panel) + column;
        job.rows = rows + column;
        const bool whole = skipped == 0 && columns % lanes == 0;
        job.dest = whole ? dest : edge;
        job.dest_row = whole ? ins_ : columns_at_once;
        if (!whole) fill_zero(edge, max_tile_rows * columns_at_once);
        add_tile<tile_vectors(max_tile_rows)>(job, divide_up(columns, lanes));
        if (whole) continue;
        for (int64_t r = skipped; r < max_tile_rows; ++r) {
          for (int64_t c = 0; c < columns; ++c) dest[r * ins_ + c] += edge[r * columns_at_once + c];
        }
      }
    }
  }

  template <int V>
  void add_tile(const OuterProducts<T>& job, int64_t vectors) const {
    if constexpr (V > 1) {
      if (vectors < V) return add_tile<V - 1>(job, vectors);
    }
    if (grad_lies_) return add_outer_products<T, V, false>(job);
    add_outer_products<T, V, true>(job);
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

  // blocks[block][pixel][row]: a gradient's pixels are walked once, in the order in which they lie.
  void stage_grad(const Pixels& pixels, T* blocks) const {
    const Image<const Stored>& grad = p_.grad;
    const int64_t block_size = pixels.count * max_tile_rows;
    if (grad.stride_w == 1 && grad.stride_c != 1) {
      for (int64_t block = 0; block < row_blocks_; ++block, blocks += block_size) {
        transpose_in(grad.at(pixels.n, row_of(block), 0, pixels.begin), grad.stride_c, int64_t{max_tile_rows},
                     pixels.count, blocks, max_tile_rows);
      }
      return;
    }
    for (int64_t q = 0; q < pixels.count; ++q, blocks += max_tile_rows) {
      const Stored* pixel = grad.at(pixels.n, 0, 0, pixels.begin + q);
      for (int64_t block = 0; block < row_blocks_; ++block) {
        const Stored* from = pixel + row_of(block) * grad.stride_c;
        T* to = blocks + block * block_size;
        if (grad.stride_c == 1) {
          for (int r = 0; r < max_tile_rows; ++r) to[r] = element_of<T>(from[r]);
        } else {
          for (int r = 0; r < max_tile_rows; ++r) to[r] = element_of<T>(from[r * grad.stride_c]);
        }
      }
    }
  }

  const WeightGradProblem<Stored>& p_;
  int64_t ins_, outs_, panels_, row_blocks_;
  bool grad_lies_;
  int64_t pixels_at_once_, blocks_;
};

}  // namespace
}  // namespace groupconv::cpu
