// The driver of a sweep between channels_last images: forward pass and input gradient with lanes over
// channels. `Blocks` says over which: wide_blocks.h, slot_blocks.h, small_blocks.h, deep_blocks.h.
//
// Prepared once per call, for all tiles and threads: weights packed for the lanes, and where each
// destination channel is found among the sums. The source is read as pixels.h gives it. The destination is
// written
//   directly, where each block writes a run of neighbouring channels;
//   else as sums of a few pixels in the groups' order, permuted in cache on their way out.
// Of a window whose source is staged each block takes all pixels of a tile, or of as many rows as have their sums in
// L2, so that its weights and its sources stay in L1; otherwise all blocks take a few pixels, which lie together.
#pragma once

#include "cpu/drivers/deep_blocks.h"
#include "cpu/drivers/slot_blocks.h"
#include "cpu/drivers/small_blocks.h"
#include "cpu/drivers/wide_blocks.h"
#include "cpu/staging/sums_out.h"
#include "cpu/staging/workspace.h"

namespace groupconv::cpu {
namespace {

template <class Stored, class Blocks>
class PixelConvolution {
  using T = compute_t<Stored>;
  using Operand = typename Blocks::Operand;
  // Sums can leave for the image from registers.
  static constexpr bool writes_stored = __is_same(Stored, T) || channels_in<Operand> == 2;
  using Out = std::conditional_t<writes_stored, Stored, T>;
  static constexpr bool has_reads = requires(const Blocks& blocks) { blocks.reads(); };
  static constexpr bool has_planes = requires(const Blocks& blocks) { blocks.wants_planes(); };

 public:
  static bool suits(const ConvolveProblem<Stored>& p) { return can_run(p) && Blocks::suits(p); }

  static bool can_run(const ConvolveProblem<Stored>& p) {
    if (!p.source.channels_last() || !p.dest.channels_last()) return false;
    if (p.transposed && p.partition->inputs_overlap) return false;
    const Sweep& sweep = *p.sweep;
    if (sweep.far_taps) return false;  // most of what would be staged is never read
    // Packing the weights has to pay.
    const int64_t enough_pixels = sweep.taps.size() > 1 ? Blocks::least_pixels_of_window : 64;
    return p.dest.batch * sweep.rows * sweep.cols >= enough_pixels;
  }

  explicit PixelConvolution(const ConvolveProblem<Stored>& problem)
      : p_(problem),
        sweep_(*problem.sweep),
        sides_(problem),
        blocks_(sides_),
        source_(p_.source, sweep_, reads(), read_lists(), Blocks::side_by_side, p_.prologue),
        sums_out_(p_, blocks_.sums()),
        dest_direct_(writes_stored && is_clamp(p_.activation) && blocks_.writes_runs()) {}

  void run() {
    bool splits = false;
    if constexpr (has_planes) splits = blocks_.wants_planes() && source_.can_split();
    Workspace shared;
    sums_out_.plan(shared);
    shared.plan<PixelPlane>(splits ? sides_.groups : 0);
    source_.plan(shared, splits);
    blocks_.plan(shared);
    const SharedScratch memory(shared.bytes());
    shared.open(memory);
    sums_out_.open(shared);
    PixelPlane* planes = shared.take<PixelPlane>(splits ? sides_.groups : 0);
    source_.open(shared, splits);

    const int64_t wanted = p_.threads.count > 1 ? divide_up(pieces_for_threads, p_.dest.batch) : 1;
    const Tiling tiling(sweep_, source_.staged_per_pixel(), 0, sizeof(T), wanted, Blocks::most);
    source_.set_widest(tiling.tile_cols);
    strip_rows_ = 1;
    // A block that takes any number of pixels, stores its sums itself and is the only one has nobody to wait for.
    strip_cols_ = has_planes && dest_direct_ && blocks_.count() == 1
                      ? tiling.tile_cols
                      : divide_up(tiling.tile_cols, divide_up(tiling.tile_cols, Blocks::most));
    if (splits) {
      source_.split(planes, tiling.tile_rows);
      strip_rows_ = tiling.tile_rows;
      strip_cols_ = tiling.tile_cols;
      if (!dest_direct_) {
        const int64_t pixels = strip_bytes / (static_cast<int64_t>(sizeof(T)) * sums_out_.distance());
        strip_rows_ = larger(pixels / strip_cols_, int64_t{1});
      }
    }
    blocks_.prepare(shared, source_, dest_direct_, sums_out_.places());
    if (!dest_direct_) sums_out_.prepare(shared);
    // Tiles below one another share source rows.
    const int64_t down = tiling.count / tiling.across, pieces = smaller(down, wanted);
    for_each_item(p_.threads, p_.dest.batch * pieces * tiling.across, [&](int64_t item) {
      const int64_t piece = item / tiling.across % pieces;
      run_tiles(item / tiling.across / pieces, tiling, item % tiling.across, down * piece / pieces,
                down * (piece + 1) / pieces);
    });
  }

 private:
  static constexpr int64_t strip_bytes = 128 << 10;

  // What is copied of a pixel: what the groups read one after the other, or as the blocks say.
  ChannelLists reads() const {
    if constexpr (has_reads) return blocks_.reads();
    return sides_.sources;
  }
  int64_t read_lists() const {
    if constexpr (has_reads) return blocks_.read_lists();
    return sides_.groups;
  }

  // Tiles [begin, end) of a column of them.
  void run_tiles(int64_t n, const Tiling& tiling, int64_t column, int64_t begin, int64_t end) const {
    const auto tile_at = [&](int64_t i) { return tiling.tile(sweep_, i * tiling.across + column); };
    const Tile first = tile_at(begin);  // none is larger
    const int64_t sums_size = dest_direct_ ? 0
                                           : smaller(strip_rows_, first.rows) *
                                                 smaller(strip_cols_, first.cols) * sums_out_.distance();
    Workspace space;
    space.plan<Operand>(source_.staged_size(first));
    space.plan<T>(sums_size);
    space.plan<T>(p_.dest.channels);
    space.open();
    Operand* staged = space.take<Operand>(source_.staged_size(first));
    T* sums = space.take<T>(sums_size);
    T* line = space.take<T>(p_.dest.channels);

    for (int64_t i = begin; i < end; ++i) {
      const Tile tile = tile_at(i);
      const int64_t kept = i > begin ? source_.keep_rows(tile_at(i - 1), staged) : 0;
      const Operand* source = source_.open_tile(n, tile, staged, kept);
      for (int64_t row = 0; row < tile.rows; row += strip_rows_) {
        for (int64_t col = 0; col < tile.cols; col += strip_cols_) {
          const Tile strip{row, col, smaller(strip_rows_, tile.rows - row),
                           smaller(strip_cols_, tile.cols - col)};
          if (dest_direct_) {
            run_strip<Out>(n, tile, strip, source, sums, line);
          } else {
            run_strip<T>(n, tile, strip, source, sums, line);
          }
        }
      }
    }
  }

  // `strip`: within the tile. `To`: what is written, the image or sums.
  template <class To>
  void run_strip(int64_t n, const Tile& tile, const Tile& strip, const Operand* source, T* sums,
                 T* line) const {
    const int64_t y = (tile.row + strip.row) * sweep_.dest_step_h + sweep_.dest_origin_h;
    const int64_t x = (tile.col + strip.col) * sweep_.dest_step_w + sweep_.dest_origin_w;
    Stored* dest = p_.dest.at(n, 0, y, x);
    const Stored* residual = p_.residual.data ? p_.residual.at(n, 0, y, x) : nullptr;
    const int64_t dest_pixel = sweep_.dest_step_w * p_.dest.stride_w;
    const int64_t dest_row = sweep_.dest_step_h * p_.dest.stride_h;

    PixelRun<Operand, To> run{};
    run.dest_stride = dest_direct_ ? dest_pixel : sums_out_.distance();
    run.low = sums_out_.finish().range.low;
    run.high = sums_out_.finish().range.high;
    for (int64_t b = 0; b < blocks_.count(); ++b) {
      int64_t group = 0;
      if constexpr (has_planes) group = blocks_.group(b);
      const PixelPlane& plane = source_.plane(group);
      run.pixel_stride = plane.pixel;
      run.pixels = strip.cols;
      for (int64_t row = 0; row < strip.rows; ++row) {
        run.source = source + plane.start + (strip.row + row) * plane.row + strip.col * plane.pixel;
        if constexpr (__is_same(To, T)) run.dest = sums + row * strip.cols * sums_out_.distance();
        if constexpr (__is_same(To, Stored)) {
          if (dest_direct_) {
            run.dest = dest + row * dest_row;
            run.residual = residual ? residual + row * dest_row : nullptr;
            run.clamped = p_.activation != Activation::none;
          }
        }
        blocks_.run(b, run);
      }
    }
    if (dest_direct_) return;
    for (int64_t row = 0; row < strip.rows; ++row) {
      sums_out_.permute(sums + row * strip.cols * sums_out_.distance(), strip.cols,
                        residual ? residual + row * dest_row : nullptr, dest + row * dest_row, dest_pixel,
                        line);
    }
  }

  const ConvolveProblem<Stored>& p_;
  const Sweep& sweep_;
  Sides<Stored> sides_;
  Blocks blocks_;
  PixelSource<Stored, Operand> source_;
  SumsOut<Stored> sums_out_;
  bool dest_direct_;
  int64_t strip_rows_ = 0, strip_cols_ = 0;  // pixels that all blocks take before the next are begun
};

// These are false where another driver has to do it.
template <class Operand, class Stored>
bool convolve_wide(const ConvolveProblem<Stored>& problem) {
  if constexpr (Vec<compute_t<Stored>>::lanes > 1) {
    using Wide = PixelConvolution<Stored, WideBlocks<Stored, Operand>>;
    if (Wide::suits(problem)) return Wide(problem).run(), true;
  }
  return false;
}

template <class Stored>
bool convolve_pixels(const ConvolveProblem<Stored>& problem) {
  if constexpr (has_permute<compute_t<Stored>>) {
    using Deep = PixelConvolution<Stored, DeepBlocks<Stored>>;
    if (Deep::suits(problem)) return Deep(problem).run(), true;
    using Wide = PixelConvolution<Stored, WideBlocks<Stored>>;
    if (Wide::can_run(problem) && PixelCosts<Stored>(Sides<Stored>(problem)).lines_pay()) {
      return Wide(problem).run(), true;
    }
  }
  if (convolve_wide<compute_t<Stored>>(problem)) return true;
  if constexpr (has_permute<compute_t<Stored>>) {
    using Slots = PixelConvolution<Stored, SlotBlocks<Stored>>;
    if (Slots::suits(problem)) return Slots(problem).run(), true;
    using Small = PixelConvolution<Stored, SmallBlocks<Stored>>;
    if (Small::suits(problem)) return Small(problem).run(), true;
  }
  return false;
}

}  // namespace
}  // namespace groupconv::cpu
