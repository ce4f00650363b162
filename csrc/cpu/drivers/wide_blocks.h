// Groups that fill vectors of channels by themselves: one or two vectors of a group's destination channels
// at a time, sources broadcast one by one (multiply_pixels.h).
#pragma once

#include "cpu/products/multiply_pixels.h"
#include "cpu/staging/packed_memory.h"
#include "cpu/staging/pixels.h"
#include "cpu/staging/sides.h"
#include "cpu/staging/weights.h"
#include "cpu/staging/workspace.h"

namespace groupconv::cpu {
namespace {

template <class Stored, class X = compute_t<Stored>>
class WideBlocks {
  using T = compute_t<Stored>;
  static constexpr int64_t lanes = Vec<T>::lanes;

  struct Block {
    X* weight;  // packed, or null
    const T* bias;
    const int64_t* offsets;
    int64_t depth, channels, width;
    int64_t group, first;  // of its channels
    int64_t dest;          // first channel: of the image, or among the sums
  };

 public:
  using Operand = X;
  static constexpr bool side_by_side = false;  // sources may lie anywhere
  static constexpr int64_t most = most_pixels(most_vectors, 1);
  static constexpr int64_t least_pixels_of_window = 32;

  static bool suits(const ConvolveProblem<Stored>& p) {
    return fills_lanes<T>(Sides<Stored>(p).dests, p.partition->groups);
  }

  explicit WideBlocks(const Sides<Stored>& sides)
      : sides_(sides),
        reads_(count_reads<X>(sides.sources, sides.groups)),
        runs_(runs_of_taps(*sides.problem.sweep, taps_together)) {
    int64_t weights = 0;
    for (int64_t g = 0; g < sides_.groups; ++g) {
      for_each_lane_block<T>(sides_.dests.count(g), [&](int64_t, int64_t, int64_t width) {
        ++count_;
        sums_ += width;
        weights += width * operands_for<X>(sides_.sources.count(g)) * sides_.taps;
      });
    }
    packed_.open(sides_, &packer<WideBlocks>, weights, static_cast<int64_t>(runs_));
  }

  int64_t sums() const { return sums_; }
  int64_t count() const { return count_; }
  int64_t group(int64_t block) const { return blocks_[block].group; }
  // Sources in a plane for each group: they are read so often that copying them so is little.
  bool wants_planes() const { return runs_ != TapRuns::none; }

  bool writes_runs() const { return writes_neighbours(sides_); }

  // Weights are packed beforehand, or by whoever runs a block.
  void plan(Workspace& shared, bool packed = true) const {
    if (packed) packed_.plan(shared);
    shared.plan<T>(sums_);
    shared.plan<int64_t>(reads_ * sides_.taps);
    shared.plan<int64_t>(sides_.taps);
    shared.plan<Block>(count_);
  }

  // Tells in `places` where each destination channel is found among the sums.
  void prepare(Workspace& shared, const PixelSource<Stored, X>& source, bool dest_direct, int32_t* places,
               bool packed = true) {
    X* weights = packed ? packed_.take(shared) : packed_.kept();
    T* bias = shared.take<T>(sums_);
    int64_t* offsets = shared.take<int64_t>(reads_ * sides_.taps);
    int64_t* at_tap = shared.take<int64_t>(sides_.taps);
    blocks_ = shared.take<Block>(count_);
    Block* block = blocks_;
    int64_t read = 0, sum = 0;
    for (int64_t g = 0; g < sides_.groups; ++g) {
      const int64_t reads = operands_for<X>(sides_.sources.count(g)), depth = reads * sides_.taps;
      const PixelPlane plane = source.plane(g);
      for (int64_t t = 0; t < sides_.taps; ++t) at_tap[t] = source.tap_offset(tap(t), plane);
      for (int64_t i = 0, j = 0; i < reads; ++i, ++read) {
        const int64_t place = source.place(read) - plane.first_read;
        for (int64_t t = 0; t < sides_.taps; ++t) offsets[j++] = at_tap[t] + place;
      }
      for_each_lane_block<T>(sides_.dests.count(g), [&](int64_t first, int64_t channels, int64_t width) {
        const int32_t* to = sides_.dests.of(g) + first;
        *block++ = {nullptr, bias, offsets, depth, channels, width, g, first, dest_direct ? to[0] : sum};
        for (int64_t r = 0; r < channels; ++r) places[to[r]] = static_cast<int32_t>(sum + r);
        for (int64_t r = 0; r < width; ++r) bias[r] = r < channels ? sides_.bias(to[r]) : T(0);
        bias += width;
        sum += width;
      });
      offsets += depth;
    }
    for (int64_t b = 0; b < count_ && weights; weights += packed_size(b), ++b) blocks_[b].weight = weights;
    if (!packed || packed_.filled()) return;
    const Weights<Stored, X> unpacked(sides_);
    for (int64_t b = 0; b < count_; ++b) pack(unpacked, b, blocks_[b].weight);
    packed_.keep();
  }

  int64_t packed_size(int64_t index) const { return blocks_[index].depth * blocks_[index].width; }
  void pack(int64_t index, X* weights) const { pack(Weights<Stored, X>(sides_), index, weights); }
  // Where a block is kept that is not packed beforehand, or null. Of several that pack it one `fills` it.
  X* kept(int64_t index, bool fills) const { return filled() || fills ? blocks_[index].weight : nullptr; }
  bool filled() const { return packed_.filled(); }
  void keep() { packed_.keep(); }

  template <class Out>
  void run(int64_t index, const PixelRun<X, Out>& run) const {
    this->run(index, blocks_[index].weight, run);
  }
  template <class Out>
  void run(int64_t index, const X* weight, const PixelRun<X, Out>& run) const {
    const Block& block = blocks_[index];
    PixelTile<X, Out> tile;
    tile.source = run.source;
    tile.pixel_stride = run.pixel_stride;
    tile.offsets = block.offsets;
    tile.depth = block.depth;
    tile.weight = weight;
    tile.bias = block.bias;
    tile.set_dest(run, block.dest);
    tile.channels = block.channels;
    if (block.channels > lanes) {
      runs_ == TapRuns::none ? multiply_pixel_row<X, 2, 1>(tile, run.pixels)
                             : multiply_pixel_row<X, 2, taps_together>(tile, run.pixels);
    } else {
      runs_ == TapRuns::none ? multiply_pixel_row<X, 1, 1>(tile, run.pixels)
                             : multiply_pixel_row<X, 1, taps_together>(tile, run.pixels);
    }
  }

 private:
  // The sweep's taps, those that are taken together in the order of the pixels that they read.
  const Tap& tap(int64_t index) const {
    const int64_t in_run = index % taps_together;
    const int64_t at = runs_ == TapRuns::descending ? index - in_run + taps_together - 1 - in_run : index;
    return sides_.problem.sweep->taps[static_cast<size_t>(at)];
  }

  // weights[j · width + r], zero where no channel is.
  void pack(const Weights<Stored, X>& unpacked, int64_t index, X* weights) const {
    const Block& block = blocks_[index];
    const int64_t row = unpacked.dest_step(block.group);
    pack_lanes(
        unpacked.of(block.group) + block.first * row, row, unpacked.source_step(block.group),
        operands_for<X>(sides_.sources.count(block.group)), sides_.taps, sides_.problem.window_area,
        [&](int64_t t) { return tap(t).weight; }, block.channels, block.width, weights);
  }

  const Sides<Stored>& sides_;
  int64_t reads_;
  TapRuns runs_;
  int64_t count_ = 0, sums_ = 0;
  PackedMemory<X> packed_;
  Block* blocks_ = nullptr;
};

}  // namespace
}  // namespace groupconv::cpu
