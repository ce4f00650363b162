// The driver of a sweep between channels_last images whose weights do not stay in cache: lanes over channels, as in
// convolve_pixels.h, but a block of channels takes all pixels before the next is begun, so that weights are read and
// brought into lanes once for all of them, a block at a time, in a thread's scratch.
//
// Of as many images as do not take more memory than the weights, one after the other:
//   1. sources are copied, a plane for each group, padding included;
//   2. each block is packed and multiplied with all pixels;
//   3. sums are brought into the image's order, unless blocks write runs of neighbouring channels themselves.
// So what 1 and 3 keep for all threads is no more than weights packed beforehand would be.
#pragma once

#include "cpu/drivers/wide_blocks.h"
#include "cpu/processor/caches.h"
#include "cpu/staging/pixels.h"
#include "cpu/staging/sides.h"
#include "cpu/staging/sums_out.h"
#include "cpu/staging/workspace.h"

namespace groupconv::cpu {
namespace {

template <class Stored>
class StreamedConvolution {
  using T = compute_t<Stored>;
  using Blocks = WideBlocks<Stored>;
  static constexpr bool computes_as_stored = __is_same(Stored, T);

 public:
  static bool suits(const ConvolveProblem<Stored>& p) {
    constexpr int64_t most_scratch = 896 << 10, size = sizeof(T);  // of a block's weights
    constexpr int64_t most_rounds = 2;                             // in which all weights are packed
    if (!p.source.channels_last() || !p.dest.channels_last() || !Blocks::suits(p)) return false;
    const Sweep& sweep = *p.sweep;
    if ((p.transposed && p.partition->inputs_overlap) || sweep.far_taps) return false;
    // Below, packing beforehand is as fast, or rows are (benches/NOTES.md).
    const Sides<Stored> sides(p);
    const bool window = sides.taps > 1;
    const int64_t weights = weight_bytes(sides), pixels = p.dest.batch * sweep.rows * sweep.cols;
    if (weights <= caches().own / (window ? 4 : 2)) return false;
    if (pixels < (window ? Blocks::least_pixels_of_window : 64)) return false;
    for (int64_t g = 0; g < sides.groups; ++g) {
      const int64_t width = smaller(int64_t{most_vectors} * Vec<T>::lanes, sides.dests.count(g));
      if (sides.sources.count(g) * sides.taps * width * size > most_scratch) return false;
    }
    return weights >= image_bytes(sides) && p.dest.batch <= most_rounds * (weights / image_bytes(sides));
  }

  explicit StreamedConvolution(const ConvolveProblem<Stored>& problem)
      : p_(problem),
        sweep_(*problem.sweep),
        whole_{0, 0, sweep_.rows, sweep_.cols},
        sides_(problem),
        source_(p_.source, sweep_, sides_.sources, sides_.groups, Blocks::side_by_side, p_.prologue),
        blocks_(sides_),
        sums_out_(p_, blocks_.sums()),
        dest_direct_(computes_as_stored && is_clamp(p_.activation) && blocks_.writes_runs()) {
    source_.copy();
  }

  void run() {
    Workspace tables;
    sums_out_.plan(tables);
    tables.plan<PixelPlane>(sides_.groups);
    source_.plan(tables, true);
    blocks_.plan(tables, false);
    const SharedScratch tables_memory(tables.bytes());
    tables.open(tables_memory);
    sums_out_.open(tables);
    PixelPlane* planes = tables.take<PixelPlane>(sides_.groups);
    source_.open(tables, true);
    source_.set_widest(sweep_.cols);
    source_.split(planes, sweep_.rows);
    blocks_.prepare(tables, source_, dest_direct_, sums_out_.places(), false);
    if (!dest_direct_) sums_out_.prepare(tables);

    staged_ = source_.staged_size(whole_);
    sums_ = dest_direct_ ? 0 : sweep_.rows * sweep_.cols * sums_out_.distance();
    const int64_t at_once = smaller(p_.dest.batch, weight_bytes(sides_) / image_bytes(sides_));
    Workspace images;
    images.plan<T>(at_once * staged_);
    images.plan<T>(at_once * sums_);
    const SharedScratch images_memory(images.bytes());
    images.open(images_memory);
    sources_at_ = images.take<T>(at_once * staged_);
    sums_at_ = images.take<T>(at_once * sums_);
    for (int64_t n = 0; n < p_.dest.batch; n += at_once) {
      run_images(n, smaller(at_once, p_.dest.batch - n));
    }
    blocks_.keep();
  }

 private:
  static int64_t weight_bytes(const Sides<Stored>& sides) {
    return sides.problem.partition->entries() * sides.taps * static_cast<int64_t>(sizeof(T));
  }

  // About what copied sources and sums take.
  static int64_t image_bytes(const Sides<Stored>& sides) {
    const Sweep& sweep = *sides.problem.sweep;
    const int64_t read = (sweep.rows * sweep.source_step_h + sweep.halo_rows) *
                         (sweep.cols * sweep.source_step_w + sweep.halo_cols);
    const int64_t numbers = read * sides.sources.offsets[sides.groups] +
                            sweep.rows * sweep.cols * sides.dests.offsets[sides.groups];
    return numbers * static_cast<int64_t>(sizeof(T));
  }

  void run_images(int64_t first, int64_t count) const {
    const int64_t source_rows = source_.rows(whole_);
    for_each_item(p_.threads, count * source_rows, [&](int64_t item) {
      const int64_t i = item / source_rows, row = item % source_rows;
      source_.stage_rows(first + i, whole_, row, row + 1, sources_at_ + i * staged_);
    });
    // Each cut packs the weights once more.
    const int64_t cuts =
        p_.threads.count > 1 ? smaller(count, divide_up(4 * int64_t{p_.threads.count}, blocks_.count())) : 1;
    for_each_item(p_.threads, blocks_.count() * cuts, [&](int64_t item) {
      const int64_t cut = item % cuts;
      run_block(item / cuts, first, count * cut / cuts, count * (cut + 1) / cuts);
    });
    if (dest_direct_) return;
    for_each_item(p_.threads, count * sweep_.rows,
                  [&](int64_t item) { permute_row(first, item / sweep_.rows, item % sweep_.rows); });
  }

  // A block of channels, of images [begin, end) of those from `first` on.
  void run_block(int64_t block, int64_t first, int64_t begin, int64_t end) const {
    T* kept = blocks_.kept(block, begin == 0);
    const int64_t in_scratch = kept ? 0 : blocks_.packed_size(block);
    Workspace space;
    space.plan<T>(in_scratch);
    space.open();
    T* scratch = space.take<T>(in_scratch);
    T* weights = kept ? kept : scratch;
    if (!blocks_.filled()) blocks_.pack(block, weights);

    const PixelPlane& plane = source_.plane(blocks_.group(block));
    PixelRun<T> run{};
    run.pixel_stride = plane.pixel;
    run.pixels = sweep_.cols;
    run.dest_stride = dest_direct_ ? sweep_.dest_step_w * p_.dest.stride_w : sums_out_.distance();
    run.low = sums_out_.finish().range.low;
    run.high = sums_out_.finish().range.high;
    for (int64_t i = begin; i < end; ++i) {
      for (int64_t row = 0; row < sweep_.rows; ++row) {
        run.source = sources_at_ + i * staged_ + plane.start + row * plane.row;
        run.dest = sums_row(i, row);
        if constexpr (computes_as_stored) {
          if (dest_direct_) {
            run.dest = at(p_.dest, first + i, row);
            run.residual = p_.residual.data ? at(p_.residual, first + i, row) : nullptr;
            run.clamped = p_.activation != Activation::none;
          }
        }
        blocks_.run(block, weights, run);
      }
    }
  }

  void permute_row(int64_t first, int64_t image, int64_t row) const {
    Workspace space;
    space.plan<T>(p_.dest.channels);
    space.open();
    T* line = space.take<T>(p_.dest.channels);
    sums_out_.permute(sums_row(image, row), sweep_.cols,
                      p_.residual.data ? at(p_.residual, first + image, row) : nullptr,
                      at(p_.dest, first + image, row), sweep_.dest_step_w * p_.dest.stride_w, line);
  }

  T* sums_row(int64_t image, int64_t row) const {
    return sums_at_ + image * sums_ + row * sweep_.cols * sums_out_.distance();
  }
  // The first pixel of a lattice row.
  template <class Element>
  Element* at(const Image<Element>& image, int64_t n, int64_t row) const {
    return image.at(n, 0, row * sweep_.dest_step_h + sweep_.dest_origin_h, sweep_.dest_origin_w);
  }

  const ConvolveProblem<Stored>& p_;
  const Sweep& sweep_;
  Tile whole_;
  Sides<Stored> sides_;
  PixelSource<Stored> source_;
  Blocks blocks_;
  SumsOut<Stored> sums_out_;
  bool dest_direct_;
  int64_t staged_ = 0, sums_ = 0;                 // of an image
  T *sources_at_ = nullptr, *sums_at_ = nullptr;  // of all images that are taken together
};

template <class Stored>
bool convolve_streamed(const ConvolveProblem<Stored>& problem) {
  if constexpr (Vec<compute_t<Stored>>::lanes > 1) {
    using Streamed = StreamedConvolution<Stored>;
    if (Streamed::suits(problem)) return Streamed(problem).run(), true;
  }
  return false;
}

}  // namespace
}  // namespace groupconv::cpu
