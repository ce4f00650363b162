// The driver of the quantised convolution, for every layout, window and partition.
//
// For each image and tile: pixels with their channels in the order in which the streams read them, then
// multiply_quads for every run of pixels and block of outputs, then the outputs in the image's order. Where the
// processor has matrix registers, streams of many quads take those (multiply_quad_blocks.h).
//   source   the image itself, where its channels are neighbours in that order and nothing is padded
//            else staged: channels_last by a permutation of bytes, NCHW transposed by squares
//   dest     the image itself, where each block writes neighbouring channels of a channels_last image
//            else a line of sums' results for each pixel, permuted (channels_last) or transposed (NCHW)
// A tile stages either the rectangle that its taps reach, or, where that has more pixels than the taps read (a
// stride, a dilation), the lattice of every tap by itself. Sums are exact, so where a tile ends decides nothing.
#pragma once

#include "cpu/for_each_item.h"
#include "cpu/products/multiply_quad_blocks.h"
#include "cpu/products/multiply_quads.h"
#include "cpu/staging/byte_order.h"
#include "cpu/staging/channel_order.h"
#include "cpu/staging/transpose_pixels.h"
#include "cpu/staging/workspace.h"

namespace groupconv::cpu {
namespace {

template <class Out>
class QuantizedConvolution {
  // Pixels whose lines are kept at once.
  static constexpr int64_t most_together = has_byte_matrices ? 2 * block_rows : most_quad_pixels;

  using DestOrder = std::conditional_t<__is_same(Out, float), ChannelOrder<float>, ByteOrder>;

  // Blocks of outputs that are computed together.
  struct Work {
    const int8_t* weight;
    const int64_t* offsets;
    int64_t depth, share, blocks;
    int64_t last_lanes;  // of the last block are stored
    int64_t dest;        // first channel, or place of a line
    int64_t slot;        // first among all lanes
    int64_t quads;       // of a tap, for matrix registers; else 0
    int64_t source;      // place of the first
    const int8_t* rest;
  };

  // Neighbouring pixels that are computed together.
  struct Run {
    const uint8_t* source;
    Out* dest;   // of multiplication
    Out* image;  // where it belongs
  };

 public:
  explicit QuantizedConvolution(const QuantizedProblem<Out>& problem)
      : p_(problem),
        layout_(*problem.layout),
        window_(problem.window),
        source_(problem.source),
        dest_(problem.dest),
        taps_(window_.area()),
        slots_(layout_.blocks * quad_lanes) {
    if (layout_.reads == 0) taps_ = 0;
    const bool pointwise = window_.area() == 1 && window_.stride_h == 1 && window_.stride_w == 1 && !padded();
    if (pointwise && source_.flat() && dest_.flat()) {
      source_ = source_.as_row();
      dest_ = dest_.as_row();
    }
    source_last_ = source_.stride_c == 1;
    dest_last_ = dest_.stride_c == 1;
    source_direct_ = source_last_ && !padded() && reads_in_place();
    dest_direct_ = dest_last_ && writes_runs();
    if constexpr (has_byte_matrices) choose_depth();
    for (const QuadStream& stream : layout_.streams) {
      reads_ = first_place(stream, reads_) + stream.quads * stream.share * quad;
    }
    // A pixel's bytes are staged and stored by whole vectors.
    pixel_ = source_direct_ ? source_.stride_w : divide_up(reads_, int64_t{64}) * 64;
  }

  void run() {
    cut();
    Workspace shared;
    plan(shared);
    const SharedScratch memory(shared.bytes());
    shared.open(memory);
    prepare(shared);
    for_each_item(p_.threads, dest_.batch * down_ * across_, [&](int64_t item) {
      const int64_t tile = item % (down_ * across_);
      const int64_t row = tile / across_ * tile_rows_, col = tile % across_ * tile_cols_;
      run_tile(item / (down_ * across_),
               {row, col, smaller(tile_rows_, dest_.height - row), smaller(tile_cols_, dest_.width - col)});
    });
  }

 private:
  // ---- what is decided once -----------------------------------------------------------------------

  bool padded() const {
    return window_.pad_top > 0 || window_.pad_bottom > 0 || window_.pad_left > 0 || window_.pad_right > 0;
  }

  // Every stream's quads are four neighbours of the image, those of matrix registers one another's as well, and no
  // read is of what does not exist.
  bool reads_in_place() const {
    for (const QuadStream& stream : layout_.streams) {
      if (stream.share > 1) return false;
      const bool in_one = takes_matrices(stream);
      for (int64_t i = 0; i < stream.quads; ++i) {
        const int64_t first =
            in_one ? layout_.input_of(stream, 0, 0) + i * quad : layout_.input_of(stream, i, 0);
        if (first != layout_.input_of(stream, i, 0)) return false;
        for (int64_t byte = 1; byte < quad; ++byte) {
          if (layout_.input_of(stream, i, byte) != first + byte) return false;
        }
      }
    }
    return true;
  }

  // Every stream's lanes are neighbours of the image, from block to block as well.
  bool writes_runs() const {
    for (const QuadStream& stream : layout_.streams) {
      int64_t before = layout_.output_of(stream, 0, 0);
      for (int64_t i = 1; i < stream.blocks * quad_lanes; ++i) {
        const int64_t output = layout_.output_of(stream, i / quad_lanes, i % quad_lanes);
        if (output >= 0 && (before < 0 || output != before + 1)) return false;
        before = output;
      }
    }
    return true;
  }

  // Vectors waste less on streams of few quads, and on runs of few pixels.
  bool takes_matrices(const QuadStream& stream) const {
    constexpr int64_t least_quads = 8, least_pixels = 4;
    return has_byte_matrices && stream.share == 1 && stream.quads >= least_quads && taps_ > 0 &&
           dest_.width >= least_pixels;
  }

  // Products of as many quads as all streams can be cut into; else full ones, and what is left of a stream filled
  // up with zeros. What lies there in its place is read too, which beyond an image must not be.
  void choose_depth() {
    int64_t quads = 0;
    for (const QuadStream& stream : layout_.streams) {
      if (!takes_matrices(stream)) continue;
      if (quads > 0 && quads != stream.quads) has_rests_ = true;
      quads = stream.quads;
    }
    if (quads == 0) return;
    const int64_t products = divide_up(quads, most_depth);
    has_rests_ = has_rests_ || quads % products != 0;
    depth_ = has_rests_ ? most_depth : quads / products;
    source_direct_ = source_direct_ && !has_rests_;
  }

  // Where the stream begins in a staged pixel, of which `place` bytes are taken: operands of matrix registers that
  // would lie across two cache lines are loaded six times as slowly.
  int64_t first_place(const QuadStream& stream, int64_t place) const {
    if (source_direct_ || !takes_matrices(stream)) return place;
    const int64_t line = stream.quads > most_depth / 2 ? 64 : 32;
    return divide_up(place, line) * line;
  }

  // Tiles of which what is staged and what is kept as lines stay in L1 and the nearer part of L2.
  void cut() {
    // Squares that are transposed are spread over more of the cache: a row of each is another page.
    const int64_t budget = dest_last_ || taps_ > 1 ? 64 << 10 : 32 << 10;
    constexpr int64_t narrowest = 64;
    const int64_t line = dest_direct_ || dest_last_ ? 0 : slots_ * static_cast<int64_t>(sizeof(Out));
    const int64_t staged = source_direct_ ? 0 : pixel_ * window_.stride_h * window_.stride_w;
    const int64_t pixels = larger(budget / larger(staged + line, int64_t{1}), narrowest);
    tile_cols_ = smaller(dest_.width, larger(pixels, narrowest));
    // A halo is staged once for each tile: not so low that it would be most of it.
    tile_rows_ = smaller(dest_.height, larger(pixels / tile_cols_, window_.kernel_h > 1 ? int64_t{4} : 1));
    if (p_.threads.run) {
      const int64_t wanted = divide_up(pieces_for_threads, dest_.batch);
      if (dest_.height > 1) {
        tile_rows_ = smaller(tile_rows_, divide_up(dest_.height, wanted));
      } else {
        tile_cols_ = smaller(tile_cols_, divide_up(divide_up(dest_.width, wanted), narrowest) * narrowest);
      }
    }
    down_ = divide_up(dest_.height, tile_rows_);
    across_ = divide_up(dest_.width, tile_cols_);
    tile_rows_ = divide_up(dest_.height, down_);
    tile_cols_ = divide_up(dest_.width, across_);

    const int64_t rows = reach_rows(tile_rows_), cols = reach_cols(tile_cols_);
    by_tap_ =
        !source_direct_ && static_cast<double>(rows) * static_cast<double>(cols) >
                               static_cast<double>(taps_ * tile_rows_) * static_cast<double>(tile_cols_);
    if (source_direct_) {
      row_ = source_.stride_h;
    } else {
      row_ = (by_tap_ ? tile_cols_ : cols) * pixel_;
      staged_ = by_tap_ ? taps_ * tile_rows_ * row_ : rows * row_;
    }
  }
  int64_t row_count() const { return divide_up(reads_, quad_lanes) * quad_lanes; }
  int64_t reach_rows(int64_t rows) const { return (rows - 1) * window_.stride_h + window_.reach_h(); }
  int64_t reach_cols(int64_t cols) const { return (cols - 1) * window_.stride_w + window_.reach_w(); }

  // From one lattice pixel, or row of them, to the next.
  int64_t pixel_stride() const { return by_tap_ ? pixel_ : pixel_ * window_.stride_w; }
  int64_t row_stride() const { return by_tap_ ? row_ : row_ * window_.stride_h; }

  int64_t tap_offset(int64_t tap) const {
    if (by_tap_) return tap * tile_rows_ * row_;
    return tap / window_.kernel_w * window_.dilation_h * row_ +
           tap % window_.kernel_w * window_.dilation_w * pixel_;
  }

  void plan(Workspace& shared) const {
    shared.plan<Work>(layout_.blocks);
    shared.plan<int64_t>(layout_.reads * taps_);
    shared.plan<int64_t>(taps_);
    shared.plan<int32_t>(slots_);
    shared.plan<float>(slots_);
    shared.plan<int32_t>(slots_);
    shared.plan<int32_t>(reads_);
    shared.plan<int32_t>(dest_.channels);
    shared.plan<int64_t>(row_count());
    shared.plan<int64_t>(slots_);
    ByteOrder::plan(shared, reads_, source_.channels);
    DestOrder::plan(shared, dest_.channels, slots_);
    shared.plan<int8_t>(rest_bytes());
  }

  int64_t rest_bytes() const {
    int64_t operands = 0;
    for (const QuadStream& stream : layout_.streams) {
      if (has_rest(stream)) operands += stream.blocks * taps_;
    }
    return operands * right_bytes;
  }
  bool has_rest(const QuadStream& stream) const {
    return has_rests_ && takes_matrices(stream) && stream.quads % most_depth > 0;
  }

  void prepare(Workspace& shared) {
    works_ = shared.take<Work>(layout_.blocks);
    int64_t* offsets = shared.take<int64_t>(layout_.reads * taps_);
    tap_offsets_ = shared.take<int64_t>(taps_);
    start_ = shared.take<int32_t>(slots_);
    multiplier_ = shared.take<float>(slots_);
    channel_of_ = shared.take<int32_t>(slots_);
    reads_of_ = shared.take<int32_t>(reads_);
    place_of_ = shared.take<int32_t>(dest_.channels);
    source_rows_ = shared.take<int64_t>(row_count());
    dest_rows_ = shared.take<int64_t>(slots_);
    int8_t* rest = shared.take<int8_t>(rest_bytes());
    const int8_t* weight = p_.weight;
    Work* next = works_;
    int64_t slot = 0, end = 0;
    for (int64_t tap = 0; tap < taps_; ++tap) tap_offsets_[tap] = tap_offset(tap);
    for (const QuadStream& stream : layout_.streams) {
      const int64_t depth = stream.quads * taps_, place = first_place(stream, end);
      for (; end < place; ++end) reads_of_[end] = -1;
      for (int64_t read = 0; read < stream.quads * stream.share; ++read) {
        for (int64_t byte = 0; byte < quad; ++byte) {
          reads_of_[end++] = static_cast<int32_t>(layout_.input_of(stream, read, byte));
        }
      }
      for (int64_t tap = 0, j = 0; tap < taps_; ++tap) {
        for (int64_t i = 0; i < stream.quads; ++i) {
          const int64_t read = place + i * stream.share * quad;
          offsets[j++] = tap_offset(tap) + (source_direct_ ? reads_of_[read] : read);
        }
      }
      const bool by_matrices = takes_matrices(stream);
      for (int64_t b = 0; b < stream.blocks;) {
        const int64_t left = stream.blocks - b, first = slot;
        int64_t blocks = smaller<int64_t>(most_quad_blocks, left), last_lanes = 0;
        if (by_matrices && left >= most_panel_blocks) blocks = most_panel_blocks;
        for (int64_t i = 0; i < blocks; ++i, ++b, slot += quad_lanes)
          last_lanes = open_lanes(stream, b, slot);
        *next++ = {weight,
                   offsets,
                   depth,
                   stream.share,
                   blocks,
                   last_lanes,
                   dest_direct_ ? larger<int64_t>(channel_of_[first], 0) : first,
                   first,
                   by_matrices ? stream.quads : 0,
                   by_matrices ? offsets[0] - tap_offset(0) : 0,
                   has_rest(stream) ? rest : nullptr};
        if (has_rest(stream)) rest = fill_up(weight, stream.quads, blocks * taps_, rest);
        weight += blocks * depth * quad * quad_lanes;
      }
      offsets += depth;
    }
    last_work_ = next;
    // Whole squares of channels are transposed, those beyond the last as copies of it.
    for (int64_t i = 0; !source_last_ && i < row_count(); ++i) {
      const int64_t read = smaller(i, reads_ - 1);
      source_rows_[i] = read < 0 ? 0 : larger(reads_of_[read], 0) * source_.stride_c;
    }
    for (int64_t slot = 0; !dest_last_ && slot < slots_; ++slot) {
      dest_rows_[slot] = channel_of_[slot] < 0 ? no_row : channel_of_[slot] * dest_.stride_c;
    }
    if (!source_direct_ && source_last_) source_order_.open(shared, reads_of_, reads_, source_.channels);
    if (!dest_direct_ && dest_last_) dest_order_.open(shared, place_of_, dest_.channels, slots_);
  }

  // The quads of `taps` taps that no whole product takes, as right operands; returns their end.
  static int8_t* fill_up(const int8_t* weight, int64_t quads, int64_t taps, int8_t* to) {
    const int64_t bytes = quads % most_depth * right_row_bytes;
    for (; taps > 0; --taps, to += right_bytes) {
      weight += quads * right_row_bytes;
      std::memcpy(to, weight - bytes, static_cast<size_t>(bytes));
      std::memset(to + bytes, 0, static_cast<size_t>(right_bytes - bytes));
    }
    return to;
  }

  // Start, multiplier and channel of a block's lanes; returns how many are stored.
  int64_t open_lanes(const QuadStream& stream, int64_t block, int64_t slot) {
    int64_t stored = 0;
    for (int64_t lane = 0; lane < quad_lanes; ++lane) {
      const int64_t output = layout_.output_of(stream, block, lane);
      channel_of_[slot + lane] = static_cast<int32_t>(output);
      start_[slot + lane] = output < 0 ? 0 : p_.start[output];
      multiplier_[slot + lane] = output < 0 ? 0.0f : p_.multiplier[output];
      if (output < 0) continue;
      place_of_[output] = static_cast<int32_t>(slot + lane);
      ++stored;
    }
    return dest_direct_ ? stored : quad_lanes;
  }

  // ---- a tile -------------------------------------------------------------------------------------

  void run_tile(int64_t n, const Tile& tile) const {
    // One run of pixels where lines leave at once.
    const int64_t lines = dest_direct_ ? 0 : dest_last_ ? most_together : tile.rows * tile.cols;
    Workspace space;
    space.plan<uint8_t>(staged_);
    space.plan<Out>(lines * slots_);
    space.plan<Out>(dest_.channels);
    space.open();
    uint8_t* staged = space.take<uint8_t>(staged_);
    Out* line = space.take<Out>(lines * slots_);
    const uint8_t* source = staged;
    if (source_direct_) {
      source = source_.at(n, 0, tile.row * window_.stride_h, tile.col * window_.stride_w);
    } else {
      stage(n, tile, staged);
    }

    if constexpr (has_byte_matrices) {
      if (depth_ > 0) {
        const int64_t pixels = run_pixels(tile, block_rows);
        const MatrixRegisters registers(pixels, depth_ * quad);
        multiply_tile<2>(n, tile, source, line, pixels);
      }
    }
    if (depth_ == 0) multiply_tile<1>(n, tile, source, line, run_pixels(tile, most_quad_pixels));
    if (!dest_direct_ && !dest_last_) unstage(line, n, tile);
  }

  static int64_t run_pixels(const Tile& tile, int64_t most) {
    return divide_up(tile.cols, divide_up(tile.cols, most));
  }

  // By so many runs at a time. Rows of matrix registers are as many as a run has pixels: the last of a row of the
  // tile begins where it has them all.
  template <int Most>
  void multiply_tile(int64_t n, const Tile& tile, const uint8_t* source, Out* line, int64_t pixels) const {
    Run runs[Most];
    int count = 0;
    for (int64_t row = 0; row < tile.rows; ++row) {
      for (int64_t at = 0; at < tile.cols; at += pixels) {
        const int64_t col = Most > 1 ? smaller(at, tile.cols - pixels) : at;
        Out* image = dest_.at(n, 0, tile.row + row, tile.col + col);
        Out* dest = dest_direct_ ? image
                    : dest_last_ ? line + count * block_rows * slots_
                                 : line + (row * tile.cols + col) * slots_;
        runs[count++] = {source + row * row_stride() + col * pixel_stride(), dest, image};
        const bool last = row == tile.rows - 1 && at + pixels >= tile.cols;
        if (count < Most && !last) continue;
        multiply(runs, count, smaller(pixels, tile.cols - col));
        count = 0;
      }
    }
  }

  void multiply(const Run* runs, int count, int64_t pixels) const {
    for (const Work* work = works_; work < last_work_; ++work) {
      if constexpr (has_byte_matrices) {
        if (work->quads > 0) {
          multiply_by_matrices(*work, runs, count, pixels);
          continue;
        }
      }
      const int64_t run = divide_up(pixels, divide_up(pixels, int64_t{most_quad_pixels}));
      for (const Run* r = runs; r < runs + count; ++r) {
        for (int64_t p = 0; p < pixels; p += run) multiply_by_vectors(*work, *r, p, smaller(run, pixels - p));
      }
    }
    if (dest_direct_ || !dest_last_) return;
    for (const Run* r = runs; r < runs + count; ++r) permute_out(r->dest, r->image, pixels);
  }

  int64_t run_stride() const { return dest_direct_ ? dest_.stride_w : slots_; }

  void multiply_by_vectors(const Work& work, const Run& run, int64_t first, int64_t pixels) const {
    QuadTile<Out> tile{};
    tile.source = run.source + first * pixel_stride();
    tile.pixel_stride = pixel_stride();
    tile.output = p_.output;
    tile.dest_stride = run_stride();
    tile.offsets = work.offsets;
    tile.depth = work.depth;
    tile.weight = work.weight;
    tile.start = start_ + work.slot;
    tile.multiplier = multiplier_ + work.slot;
    tile.dest = run.dest + first * tile.dest_stride + work.dest;
    tile.last_lanes = work.last_lanes;
    multiply_quad_run(tile, pixels, work.blocks, work.share);
  }

  void multiply_by_matrices(const Work& work, const Run* runs, int count, int64_t pixels) const {
    QuadPanel<Out> panel{};
    for (int i = 0; i < 2; ++i) {
      const Run& run = runs[i < count ? i : 0];
      panel.sources[i] = run.source + work.source;
      panel.dests[i] = run.dest + work.dest;
    }
    panel.runs = count;
    panel.pixels = pixels;
    panel.pixel_stride = pixel_stride();
    panel.dest_stride = run_stride();
    panel.tap_offsets = tap_offsets_;
    panel.taps = taps_;
    panel.quads = work.quads;
    panel.depth = depth_;
    panel.weight = work.weight;
    panel.rest = work.rest;
    panel.start = start_ + work.slot;
    panel.multiplier = multiplier_ + work.slot;
    panel.output = p_.output;
    panel.blocks = work.blocks;
    panel.last_lanes = work.last_lanes;
    multiply_quad_panel(panel);
  }

  // ---- in -----------------------------------------------------------------------------------------

  void stage(int64_t n, const Tile& tile, uint8_t* staged) const {
    const int64_t top = tile.row * window_.stride_h - window_.pad_top;
    const int64_t left = tile.col * window_.stride_w - window_.pad_left;
    if (!by_tap_) {
      const int64_t cols = reach_cols(tile.cols);
      for (int64_t row = 0; taps_ > 0 && row < reach_rows(tile.rows); ++row) {
        stage_row(n, top + row, left, 1, cols, staged + row * row_);
      }
      return;
    }
    for (int64_t tap = 0; tap < taps_; ++tap) {
      const int64_t down = top + tap / window_.kernel_w * window_.dilation_h;
      const int64_t right = left + tap % window_.kernel_w * window_.dilation_w;
      for (int64_t row = 0; row < tile.rows; ++row) {
        stage_row(n, down + row * window_.stride_h, right, window_.stride_w, tile.cols,
                  staged + tap_offset(tap) + row * row_);
      }
    }
  }

  // `count` pixels, `step` apart, of which those beyond the image are the zero point.
  void stage_row(int64_t n, int64_t y, int64_t x, int64_t step, int64_t count, uint8_t* to) const {
    int64_t first = 0, last = 0;  // that exist
    if (y >= 0 && y < source_.height) {
      first = smaller(count, x < 0 ? divide_up(-x, step) : int64_t{0});
      last = x >= source_.width ? first : larger(first, smaller(count, divide_up(source_.width - x, step)));
    }
    std::memset(to, p_.source_zero, static_cast<size_t>(first * pixel_));
    std::memset(to + last * pixel_, p_.source_zero, static_cast<size_t>((count - last) * pixel_));
    if (last == first) return;
    const uint8_t* from = source_.at(n, 0, y, x + first * step);
    to += first * pixel_;
    const int64_t stride = step * source_.stride_w;
    if (source_last_) {
      source_order_.run(from, stride, to, pixel_, last - first);
    } else if (stride == 1) {
      rows_to_pixels(from, source_rows_, reads_, last - first, to, pixel_);
    } else {
      for (int64_t p = 0; p < last - first; ++p) {
        for (int64_t i = 0; i < reads_; ++i) {
          to[p * pixel_ + i] = from[p * stride + source_rows_[i]];
        }
      }
    }
  }

  // ---- out ----------------------------------------------------------------------------------------

  void permute_out(const uint8_t* lines, uint8_t* dest, int64_t pixels) const {
    dest_order_.run(lines, slots_, dest, dest_.stride_w, pixels);
  }
  void permute_out(const float* lines, float* dest, int64_t pixels) const {
    dest_order_.run(lines, slots_, pixels,
                    [&](int64_t p, const auto& places, auto x)
                        GROUPCONV_INLINE_LAMBDA { places.store(x, dest + p * dest_.stride_w); });
  }

  void unstage(const Out* line, int64_t n, const Tile& tile) const {
    const bool one_row = tile.cols == dest_.width && dest_.flat();
    const int64_t rows = one_row ? 1 : tile.rows, cols = one_row ? tile.rows * tile.cols : tile.cols;
    for (int64_t row = 0; row < rows; ++row, line += cols * slots_) {
      Out* dest = dest_.at(n, 0, tile.row + row, tile.col);
      pixels_to_rows(line, slots_, cols, dest, dest_rows_);
    }
  }

  const QuantizedProblem<Out>& p_;
  const QuantizedLayout& layout_;
  Window window_;
  Image<const uint8_t> source_;
  Image<Out> dest_;
  int64_t taps_;
  int64_t reads_ = 0, slots_;  // bytes that are read of a pixel, lanes that are made of it
  int64_t depth_ = 0;          // quads of a product of matrix registers; 0: none is made
  bool has_rests_ = false;
  bool source_last_, dest_last_, source_direct_, dest_direct_, by_tap_ = false;
  int64_t tile_rows_ = 0, tile_cols_ = 0, down_ = 0, across_ = 0;
  int64_t pixel_, row_ = 0, staged_ = 0;  // from pixel to pixel and row to row of the source; bytes of a tile
  Work* works_ = nullptr;
  const Work* last_work_ = nullptr;
  int64_t* tap_offsets_ = nullptr;
  int32_t* start_ = nullptr;
  float* multiplier_ = nullptr;
  int32_t* channel_of_ = nullptr;  // of a lane; −1: none
  int32_t* reads_of_ = nullptr;    // the channel of a staged byte; −1: any
  int32_t* place_of_ = nullptr;    // of a channel among the lanes
  int64_t *source_rows_ = nullptr,
          *dest_rows_ = nullptr;  // where the row of a staged byte, or a lane, begins
  ByteOrder source_order_;
  DestOrder dest_order_;
};

}  // namespace
}  // namespace groupconv::cpu
