// The driver of a pointwise sweep between channels_last images through rows: forward pass and input gradient.
//
// A few pixels at a time are turned into a row for each channel (transpose.h), multiplied with lanes over pixels
// (multiply_turned.h), and the sums turned back into pixels. Rows are addressed by pointers, so neither a permutation of
// the sources nor one of the destinations costs anything, where lanes over channels have to gather every vector of sums.
// A row is as many pixels as a tile of registers takes: what is staged of a group stays in L1 and all of it in L2. Where
// passing through L2 costs more than a narrower tile of registers (caches.h), it is one vector: the pixels' rows fit L1.
//
// While the pixels of one tile are multiplied those of the next are fetched, and the lines that the sums will be
// written to: both are read once, from wherever they are, and turning waits for nothing else.
#pragma once

#include "cpu/products/multiply_turned.h"
#include "cpu/staging/sides.h"
#include "cpu/staging/unstage.h"
#include "cpu/staging/workspace.h"

namespace groupconv::cpu {
namespace {

template <class T>
class TurnedConvolution {
 public:
  static bool suits(const ConvolveProblem<T>& p) {
    constexpr int64_t least_pixels = 64;
    const Sweep& sweep = *p.sweep;
    if (!p.source.channels_last() || !p.dest.channels_last() || p.prologue) return false;
    if (!sweep.pointwise() || sweep.rows != 1 || p.source.height != 1 || p.source.width != sweep.cols)
      return false;
    if (p.transposed && p.partition->inputs_overlap) return false;
    if (!is_clamp(p.activation) || p.dest.batch * sweep.cols < least_pixels) return false;
    if (writes_neighbours(Sides<T>(p))) return false;  // lanes over channels write them without more ado
    const int64_t staged = (p.source.channels + p.dest.channels) * turned_width;
    return staged * static_cast<int64_t>(sizeof(T)) <= most_tile_bytes;
  }

  explicit TurnedConvolution(const ConvolveProblem<T>& problem)
      : p_(problem),
        sides_(problem),
        finish_(p_.activation),
        images_(p_.dest.batch),
        pixels_(p_.sweep->cols),
        width_(row_width()),
        reads_(sides_.sources.offsets[sides_.groups]),
        writes_(sides_.dests.offsets[sides_.groups]) {
    if (images_follow(pixels_, p_.source, p_.dest, p_.residual)) {
      pixels_ *= images_;
      images_ = 1;
    }
    int64_t tiles = 0;
    for (int64_t g = 0; g < sides_.groups; ++g) tiles += turned_tiles<T>(sides_.dests.count(g), width_);
    const int64_t stride = larger(p_.source.stride_w, p_.dest.stride_w);
    const int64_t lines = width_ * stride * static_cast<int64_t>(sizeof(T)) / line_bytes;
    lines_per_tile_ = divide_up(lines, larger(tiles, int64_t{1}));
  }

  void run() const {
    const int64_t wanted = p_.threads.run ? divide_up(pieces_for_threads, images_) : 1;
    const int64_t cut = divide_up(divide_up(pixels_, wanted), width_) * width_;
    const int64_t cuts = divide_up(pixels_, cut);
    for_each_item(p_.threads, images_ * cuts, [&](int64_t item) {
      const int64_t begin = item % cuts * cut;
      run_pixels(item / cuts, begin, smaller(begin + cut, pixels_));
    });
  }

 private:
  // The rows of all groups, in their order, and scratch for the steps from weight to weight.
  struct Rows {
    const T** sources;
    T** dests;
    T* bias;
    int64_t* steps;
  };

  // Narrow ones read the weights three times as often.
  int64_t row_width() const {
    constexpr int64_t narrow = narrow_turned_width<T>;
    const auto bytes = [](int64_t numbers) { return numbers * static_cast<int64_t>(sizeof(T)); };
    const bool pays = vector_registers == 32 && caches().own_is_slow &&
                      bytes(p_.source.channels * narrow) <= caches().nearest &&
                      4 * bytes(p_.partition->entries()) <= caches().own;
    return pays ? narrow : turned_width;
  }

  void run_pixels(int64_t image, int64_t begin, int64_t end) const {
    Workspace space;
    space.plan<T>(p_.source.channels * width_);
    space.plan<T>(p_.dest.channels * width_);
    space.plan<const T*>(reads_);
    space.plan<T*>(writes_);
    space.plan<T>(writes_);
    space.plan<int64_t>(sides_.most_sources);
    space.open();
    T* staged = space.take<T>(p_.source.channels * width_);
    T* sums = space.take<T>(p_.dest.channels * width_);
    const Rows rows{space.take<const T*>(reads_), space.take<T*>(writes_), space.take<T>(writes_),
                    space.take<int64_t>(sides_.most_sources)};
    for (int64_t i = 0; i < reads_; ++i) rows.sources[i] = staged + sides_.sources.channels[i] * width_;
    for (int64_t r = 0; r < writes_; ++r) {
      const int64_t channel = sides_.dests.channels[r];
      rows.dests[r] = sums + channel * width_;
      rows.bias[r] = sides_.bias(channel);
    }
    if (writes_ < p_.dest.channels) fill_zero(sums, p_.dest.channels * width_);  // some are nobody's

    for (int64_t pixel = begin; pixel < end; pixel += width_) {
      const int64_t count = smaller(width_, end - pixel);
      const T* source = p_.source.at(image, 0, 0, pixel);
      T* dest = p_.dest.at(image, 0, 0, pixel);
      const T* residual = p_.residual.data ? p_.residual.at(image, 0, 0, pixel) : nullptr;
      transpose_in(source, p_.source.stride_w, count, p_.source.channels, staged, width_);
      if (count == width_) {
        FetchedLines lines{reinterpret_cast<const char*>(source + width_ * p_.source.stride_w),
                           reinterpret_cast<char*>(dest), lines_per_tile_};
        for (int64_t g = 0; g < sides_.groups; ++g) multiply_turned(turned_job(g, rows), width_, lines);
      } else {
        for (int64_t g = 0; g < sides_.groups; ++g) multiply_rest(g, rows, count);
      }
      transpose_out(sums, width_, count, p_.dest.channels, finish_, residual, dest, p_.dest.stride_w);
    }
  }

  TurnedJob<T> turned_job(int64_t g, const Rows& rows) const {
    return {rows.sources + sides_.sources.offsets[g],
            sides_.sources.count(g),
            sides_.weight(g),
            sides_.dest_step(g),
            sides_.source_step(g),
            Strides(sides_.dest_step(g) * static_cast<int64_t>(sizeof(T))),
            rows.dests + sides_.dests.offsets[g],
            rows.bias + sides_.dests.offsets[g],
            sides_.dests.count(g)};
  }

  // Fewer pixels than a tile has. Each is summed as in a whole tile, not with lanes over the depth, so that its bits do
  // not depend on how many come before it.
  void multiply_rest(int64_t g, const Rows& rows, int64_t pixels) const {
    for (int64_t i = 0; i < sides_.sources.count(g); ++i) rows.steps[i] = i * sides_.source_step(g);
    MultiplyJob<T> job{};
    job.sources = rows.sources + sides_.sources.offsets[g];
    job.steps = rows.steps;
    job.depth = sides_.sources.count(g);
    job.weight = sides_.weight(g);
    job.weight_row_stride = sides_.dest_step(g);
    job.dests = rows.dests + sides_.dests.offsets[g];
    job.bias = rows.bias + sides_.dests.offsets[g];
    job.rows = sides_.dests.count(g);
    job.length = pixels;
    multiply_all_rows(job);
  }

  const ConvolveProblem<T>& p_;
  Sides<T> sides_;
  Finish<T> finish_;
  int64_t images_, pixels_;  // all images are one where they follow each other
  int64_t width_;            // of the rows, in pixels
  int64_t reads_, writes_;   // of a pixel, by all groups
  int64_t lines_per_tile_ = 0;
};

// False where another driver has to do it.
template <class Stored>
bool convolve_turned(const ConvolveProblem<Stored>& problem) {
  if constexpr (transposes_vectors<Stored>) {
    using Turned = TurnedConvolution<Stored>;
    if (Turned::suits(problem)) return Turned(problem).run(), true;
  }
  return false;
}

}  // namespace
}  // namespace groupconv::cpu
