// The weight gradient of a 1×1 convolution with many channels in a group: D[n][c] += Σ_q grad[n][q] · input[c][q] as
// a product of matrices, by add_outer_products. One group is dense: what a structure that learns needs.
//
// correlate_rows sums over lanes, which it has to add up for every entry and image, and walks through L2. Here lanes
// are channels of the input: a block of pixels is transposed into rows of channels (in channels_last it lies so
// already), and the gradient is broadcast, 11 loads for 24, from where it lies (in channels_last from blocks of its
// channels). Transposing costs about 0.45 cycles an element, against out_channels / 32 cycles of multiply-adds, so
// it pays for groups of 32 channels and more.
//
// As many pixels as fill most of L1 in rows of 48 columns are staged at a time, and stay there while all rows of
// the gradient pass over them; D and the block's gradient come from L2. What is read next is fetched meanwhile.
// Where the gradient's channels have to be brought into blocks, so many rows of D are finished before the next are
// begun as have their blocks in scratch.
#pragma once

#include "cpu/processor/caches.h"
#include "cpu/products/outer_products.h"
#include "cpu/staging/slices.h"
#include "cpu/staging/stage.h"
#include "cpu/staging/workspace.h"

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
    const bool images = p.sweep->pointwise() && p.sweep->rows == 1 && p.sweep->cols >= least_pixels &&
                        p.input.height == 1 && p.grad.height == 1 && p.input.width == p.sweep->cols &&
                        p.grad.width == p.sweep->cols;
    if (!images) return false;
    if (partition.groups == 1) {
      return p.slices == 1 && partition.in_channels >= least_channels &&
             partition.out_channels >= least_channels && (p.input.stride_w == 1 || p.input.stride_c == 1) &&
             counts_up(partition.inputs, partition.in_channels) &&
             counts_up(partition.outputs, partition.out_channels);
    }
    return computes_as_stored && !p.prologue && suits_rows(partition, p.input, p.grad);
  }

  static bool suits_rows(const PartitionView& partition, const Image<const Stored>& input,
                         const Image<const Stored>& grad) {
    constexpr int64_t least_width = 32;
    return reads_rows(input) && reads_rows(grad) && has_groups(partition, least_width);
  }

  // Which fill tiles, and have on average so many channels on either side.
  static bool has_groups(const PartitionView& partition, int64_t least_width) {
    for (int64_t g = 0; g < partition.groups; ++g) {
      if (partition.outputs.count(g) < max_tile_rows) return false;
    }
    return partition.entries() >= least_width * partition.inputs.offsets[partition.groups] &&
           partition.entries() >= least_width * partition.outputs.offsets[partition.groups];
  }

  // As rows of a panel they fill most of a cache of so many bytes.
  static int64_t pixels_in(int64_t cache) {
    return cache * 4 / 5 / (panel_columns * static_cast<int64_t>(sizeof(T)));
  }

  // Where the L1 is small, some lines of a panel come from L2, which costs less than passing over D more often.
  static int64_t most_pixels_at_once() { return pixels_in(larger(caches().nearest, int64_t{48} << 10)); }

  explicit PointwiseGrad(const WeightGradProblem<Stored>& problem)
      : p_(problem),
        inputs_(p_.partition->inputs),
        outputs_(p_.partition->outputs),
        grad_lies_(computes_as_stored && reads_rows(p_.grad)),
        pixels_at_once_(most_pixels_at_once()),
        blocks_(divide_up(p_.input.width, pixels_at_once_)) {}

  // Items are groups, or whole tiles of one group's columns; every sum in the order of the pixels: any cut gives
  // the same bits.
  void run() const {
    const int64_t groups = p_.partition->groups;
    const int64_t cuts =
        groups > 1 || p_.threads.count == 1 ? 1 : smaller(panels(0), 4 * int64_t{p_.threads.count});
    add_slices(p_.threads, p_.slices, groups * cuts, p_.weight_grad, p_.partition->entries(),
               [&](int64_t slice, int64_t item, T* weight_grad) {
                 const int64_t cut = item % cuts, group = item / cuts;
                 run_panels(slice, {weight_grad, group, panels(group) * cut / cuts,
                                    panels(group) * (cut + 1) / cuts});
               });
  }

  // Neighbouring pixels of an image.
  struct Pixels {
    int64_t n, begin, count;
  };

  // Of one group, or of any.
  struct Scratch {
    T *rows, *blocks, *edge;
  };
  void plan(Workspace& space, int64_t group) const {
    space.plan<T>(pixels_at_once_ * panel_columns);
    space.plan<T>(blocks_size(group));
    space.plan<T>(max_tile_rows * panel_columns);
  }
  Scratch take(Workspace& space, int64_t group) const {
    return {space.take<T>(pixels_at_once_ * panel_columns), space.take<T>(blocks_size(group)),
            space.take<T>(max_tile_rows * panel_columns)};
  }

  // Rows of an image that are far apart, for which the hardware does not look ahead; or a block of pixels, all channels
  // of which lie in one piece, in as many pieces.
  struct RowsAhead {
    const Stored* first = nullptr;
    const int32_t* channels = nullptr;
    int64_t distance = 0, rows = 0, taken = 0;

    int64_t left() const { return rows - taken; }
    const char* next() {
      const int64_t row = taken++;
      return reinterpret_cast<const char*>(first + (channels ? channels[row] : row) * distance);
    }
  };
  static RowsAhead ahead(const Image<const Stored>& image, const Pixels& pixels, const int32_t* channels,
                         int64_t count) {
    if (pixels.count == 0) return {};
    const Stored* first = image.at(pixels.n, 0, 0, pixels.begin);
    if (image.stride_w == 1) return {first, channels, image.stride_c, count};
    const bool one_piece = image.stride_w == image.channels && count == image.channels;
    return {first, nullptr, pixels.count, one_piece ? count : 0};
  }

  // What will be read next, fetched evenly by so many tiles.
  struct ReadsAhead {
    RowsAhead input, grad;
    int64_t tiles = 0;

    void give(OuterProducts<T>& job) {
      const int64_t left = input.left() + grad.left();
      const int64_t even = divide_up(left, 2 * larger(tiles--, int64_t{1})) * 2;
      const int64_t rows = smaller(larger(even, int64_t{least_rows_ahead}), int64_t{most_rows_ahead});
      job.rows_ahead = static_cast<int>(rows);
      for (int64_t r = 0; r < rows; ++r) {
        RowsAhead& from = input.left() ? input : grad;
        job.ahead[r] = from.left() ? from.next() : reinterpret_cast<const char*>(job.rows);
      }
    }
  };

  // How often all groups ask what is read next.
  int64_t tiles() const {
    int64_t count = 0;
    for (int64_t g = 0; g < p_.partition->groups; ++g) count += row_blocks(g) * panels(g);
    return count;
  }

  // What some pixels add to a group's part, for whoever goes over the images himself. `grads`: the group's rows of the
  // gradient, at the first of them. `later`: what to fetch meanwhile, where the pixels themselves are in cache.
  void add(T* weight_grad, int64_t group, const Pixels& pixels, const T* const* grads, const Scratch& scratch,
           ReadsAhead* later = nullptr) const {
    const int64_t blocks = divide_up(pixels.count, pixels_at_once_);
    for (int64_t b = 0; b < blocks; ++b) {
      const Pixels part = part_of(pixels, b, blocks);
      const Pixels next = b + 1 < blocks ? part_of(pixels, b + 1, blocks) : Pixels{};
      add_block({weight_grad, group, 0, panels(group)},
                {part, {0, row_blocks(group)}, grads, part.begin - pixels.begin}, next,
                ahead(p_.grad, next, outputs_.of(group), outputs_.count(group)), scratch, later);
    }
  }

 private:
  static bool counts_up(const ChannelLists& lists, int64_t channels) {
    if (lists.count(0) != channels) return false;
    for (int64_t c = 0; c < channels; ++c) {
      if (lists.channels[c] != c) return false;
    }
    return true;
  }
  static bool reads_rows(const Image<const Stored>& image) {
    return image.stride_w == 1 && image.stride_c != 1;
  }

  int64_t panels(int64_t group) const { return divide_up(inputs_.count(group), panel_columns); }
  int64_t row_blocks(int64_t group) const { return divide_up(outputs_.count(group), int64_t{max_tile_rows}); }

  // That are finished together.
  int64_t row_blocks_at_once(int64_t group) const {
    constexpr int64_t most_scratch = 896 << 10, size = sizeof(T);
    const int64_t all = row_blocks(group);
    if (grad_lies_) return all;
    return divide_up(all, divide_up(all, most_scratch / (max_tile_rows * pixels_at_once_ * size)));
  }

  int64_t blocks_size(int64_t group) const {
    return grad_lies_ ? 0 : row_blocks_at_once(group) * max_tile_rows * pixels_at_once_;
  }

  // Rows of a group's gradient, eight to a block.
  struct RowBlocks {
    int64_t begin, end;
  };

  // Pixels that are staged together, and rows of their gradient. `grads`: all of the group's, of which the first
  // `before` pixels are others', or null: those of the image.
  struct Block {
    Pixels pixels;
    RowBlocks part;
    const T* const* grads = nullptr;
    int64_t before = 0;
  };
  static Pixels part_of(const Pixels& all, int64_t part, int64_t parts) {
    const int64_t begin = all.count * part / parts, end = all.count * (part + 1) / parts;
    return {all.n, all.begin + begin, end - begin};
  }
  Pixels pixels_of(int64_t unit) const {
    return part_of({unit / blocks_, 0, p_.input.width}, unit % blocks_, blocks_);
  }

  // Columns of a group's gradient.
  struct Panels {
    T* weight_grad;  // of all groups
    int64_t group, begin, end;
  };

  void run_panels(int64_t slice, const Panels& panels) const {
    const int64_t group = panels.group;
    Workspace space;
    plan(space, group);
    space.open();
    const Scratch scratch = take(space, group);
    const int64_t at_once = row_blocks_at_once(group);
    for (int64_t first = 0; first < row_blocks(group); first += at_once) {
      const RowBlocks part{first, smaller(first + at_once, row_blocks(group))};
      run_rows(slice, panels, part, scratch);
    }
  }

  void run_rows(int64_t slice, const Panels& panels, const RowBlocks& part, const Scratch& scratch) const {
    const int64_t group = panels.group;
    const int64_t first_row = row_of(group, part.begin);
    const int64_t rows_of_part = row_of(group, part.end - 1) + max_tile_rows - first_row;
    const int64_t units = p_.input.batch * blocks_, end = units * (slice + 1) / p_.slices;
    for (int64_t unit = units * slice / p_.slices; unit < end; ++unit) {
      const Pixels pixels = pixels_of(unit), next = unit + 1 < end ? pixels_of(unit + 1) : Pixels{};
      if (!grad_lies_) stage_grad(pixels, part, scratch.blocks);
      const RowsAhead next_grad = ahead(p_.grad, next, outputs_.of(group) + first_row, rows_of_part);
      add_block(panels, {pixels, part}, next, next_grad, scratch);
    }
  }

  struct Panel {
    int64_t group, width;
    const int32_t* channels;
    T* dest;  // of the group's first row
  };
  Panel panel_of(const Panels& panels, int64_t panel) const {
    const int64_t group = panels.group, first = panel * panel_columns;
    return {group, smaller(panel_columns, inputs_.count(group) - first), inputs_.of(group) + first,
            panels.weight_grad + p_.partition->weight_offsets[group] + first};
  }
  // The last rows of the gradient share some with the block before, and no block has fewer.
  int64_t row_of(int64_t group, int64_t block) const {
    return smaller(block * max_tile_rows, outputs_.count(group) - max_tile_rows);
  }

  // `next`: the pixels after these, if there are any.
  void add_block(const Panels& panels, const Block& block, const Pixels& next, const RowsAhead& next_grad,
                 const Scratch& scratch, ReadsAhead* later = nullptr) const {
    const int64_t group = panels.group;
    ReadsAhead reads{ahead(p_.input, next, inputs_.of(group), inputs_.count(group)), next_grad};
    for (int64_t panel = panels.begin; panel < panels.end; ++panel) {
      const Panel here = panel_of(panels, panel);
      const bool last = panel + 1 == panels.end;
      const Panel then = panel_of(panels, last ? panels.begin : panel + 1);
      stage_input(block.pixels, here, scratch.rows);
      if (reads_rows(p_.input)) {
        reads.input = ahead(p_.input, last ? next : block.pixels, then.channels, then.width);
      }
      reads.tiles = (panels.end - panel) * (block.part.end - block.part.begin);
      multiply(block, here, scratch, later ? *later : reads);
    }
  }

  void multiply(const Block& from, const Panel& panel, const Scratch& scratch, ReadsAhead& reads) const {
    const Pixels& pixels = from.pixels;
    const RowBlocks& part = from.part;
    const T *blocks = scratch.blocks, *rows = scratch.rows;
    T* edge = scratch.edge;
    constexpr int64_t lanes = Vec<T>::lanes, tile = tile_vectors(max_tile_rows) * lanes;
    const int64_t ins = inputs_.count(panel.group);
    const int32_t* outs = outputs_.of(panel.group);
    OuterProducts<T> job{};
    job.pixels = pixels.count;
    for (int64_t block = part.begin; block < part.end; ++block) {
      const int64_t row = row_of(panel.group, block), skipped = block * max_tile_rows - row;
      job.grads[0] = blocks + (block - part.begin) * max_tile_rows * pixels.count;
      if constexpr (computes_as_stored) {
        for (int r = 0; r < max_tile_rows && grad_lies_; ++r) {
          job.grads[r] = from.grads ? from.grads[row + r] + from.before
                                    : p_.grad.at(pixels.n, outs[row + r], 0, pixels.begin);
        }
      }
      job.rows = rows;
      reads.give(job);
      for (int64_t column = 0; column < panel.width; column += tile) {
        const int64_t columns = smaller(tile, panel.width - column);
        T* dest = panel.dest + row * ins + column;
        job.rows = rows + column;
        const bool whole = skipped == 0 && columns % lanes == 0;
        job.dest = whole ? dest : edge;
        job.dest_row = whole ? ins : panel_columns;
        if (!whole) fill_zero(edge, max_tile_rows * panel_columns);
        add_tile<tile_vectors(max_tile_rows)>(job, divide_up(columns, lanes));
        if (whole) continue;
        for (int64_t r = skipped; r < max_tile_rows; ++r) {
          for (int64_t c = 0; c < columns; ++c) dest[r * ins + c] += edge[r * panel_columns + c];
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

  void stage_input(const Pixels& pixels, const Panel& panel, T* rows) const {
    const Stored* image = p_.input.at(pixels.n, 0, 0, pixels.begin);
    const int64_t depth = pixels.count, columns = panel.width;
    if (reads_rows(p_.input)) {
      transpose_rows(
          [&](int64_t i) GROUPCONV_INLINE_LAMBDA { return image + panel.channels[i] * p_.input.stride_c; },
          columns, depth, [&](int64_t q) GROUPCONV_INLINE_LAMBDA { return rows + q * panel_columns; });
    } else {
      for (int64_t q = 0; q < depth; ++q) {
        widen_row(image + panel.channels[0] + q * p_.input.stride_w, 1, rows + q * panel_columns, columns);
      }
    }
    if (!p_.prologue) return;
    const Prologue<T> prologue = from_channel(p_.prologue, panel.channels[0]);
    for (int64_t q = 0; q < depth; ++q, rows += panel_columns) prepare_pixel(prologue, rows, rows, columns);
  }

  // Of one group's gradient, blocks[block][pixel][row]: its pixels are walked once, in the order in which they lie.
  void stage_grad(const Pixels& pixels, const RowBlocks& part, T* blocks) const {
    const Image<const Stored>& grad = p_.grad;
    const int64_t block_size = pixels.count * max_tile_rows;
    if (reads_rows(grad)) {
      for (int64_t block = part.begin; block < part.end; ++block, blocks += block_size) {
        transpose_in(grad.at(pixels.n, row_of(0, block), 0, pixels.begin), grad.stride_c,
                     int64_t{max_tile_rows}, pixels.count, blocks, max_tile_rows);
      }
      return;
    }
    for (int64_t q = 0; q < pixels.count; ++q, blocks += max_tile_rows) {
      const Stored* pixel = grad.at(pixels.n, 0, 0, pixels.begin + q);
      T* to = blocks;
      for (int64_t block = part.begin; block < part.end; ++block, to += block_size) {
        const Stored* from = pixel + row_of(0, block) * grad.stride_c;
        T row[max_tile_rows];  // all are read before any is written: so they become vectors
        if (grad.stride_c == 1) {
          for (int r = 0; r < max_tile_rows; ++r) row[r] = element_of<T>(from[r]);
        } else {
          for (int r = 0; r < max_tile_rows; ++r) row[r] = element_of<T>(from[r * grad.stride_c]);
        }
        for (int r = 0; r < max_tile_rows; ++r) to[r] = row[r];
      }
    }
  }

  const WeightGradProblem<Stored>& p_;
  ChannelLists inputs_, outputs_;
  bool grad_lies_;
  int64_t pixels_at_once_, blocks_;
};

}  // namespace
}  // namespace groupconv::cpu
