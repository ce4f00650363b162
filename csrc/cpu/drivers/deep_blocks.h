// Groups with many sources and few destinations: lanes over the sources, which lie side by side in a pixel, so that
// no lane idles however few destinations there are. A sum stays spread over a vector while the taps pass, and is
// added up across lanes once, several sums together.
//
// Tile: P pixels × R destinations. Each step loads P vectors of sources and R of weights for P · R multiply-adds:
// 4 × 6 with 32 registers (24 sums, 4 sources, 1 weight), 4 × 2 with 16. Adding up takes about three
// instructions a sum, against 1.5 a vector of sources before.
#pragma once

#include "cpu/drivers/pixel_costs.h"
#include "cpu/products/multiply.h"
#include "cpu/staging/packed_memory.h"
#include "cpu/staging/pixels.h"
#include "cpu/staging/sides.h"
#include "cpu/staging/workspace.h"
#include "cpu/vector/strides.h"

namespace groupconv::cpu {
namespace {

template <class T>
struct DeepTile : PixelDest<T> {
  const T* source;  // the group's first channel of the first pixel
  int64_t pixel_stride;
  const int64_t* offsets;  // [taps]
  int64_t taps, sources;
  const T* weight;  // [taps][vectors of sources][R][lanes], zero where no source is
  const T* bias;    // [lanes]
};

constexpr int deep_pixels = 4;

template <class T, int R, int P>
void multiply_deep(const DeepTile<T>& tile) {
  using V_ = Vec<T>;
  constexpr int lanes = V_::lanes;
  constexpr int at_once = 8;  // that sum_each adds up together
  constexpr int count = (P * R + at_once - 1) / at_once * at_once;
  V_ sums[count];
#pragma GCC unroll 24
  for (int i = 0; i < count; ++i) sums[i] = zero<T>();

  const Strides strides(tile.pixel_stride * static_cast<int64_t>(sizeof(T)));
  const T* weight = tile.weight;
  const auto step = [&](const T* from, auto load) GROUPCONV_INLINE_LAMBDA {
    V_ x[P];
#pragma GCC unroll 4
    for (int p = 0; p < P; ++p) x[p] = load(strides.at(from, p));
#pragma GCC unroll 6
    for (int r = 0; r < R; ++r) {
      V_ w = V_::load(weight + r * lanes);
      pin(w);
#pragma GCC unroll 4
      for (int p = 0; p < P; ++p) sums[p * R + r] = multiply_add(w, x[p], sums[p * R + r]);
    }
    weight += R * lanes;
  };
  const int64_t whole = tile.sources / lanes * lanes;
  const auto rest = V_::first(tile.sources - whole);
  for (int64_t t = 0; t < tile.taps; ++t) {
    const T* from = tile.source + tile.offsets[t];
    const T* const end = from + whole;
    for (; from < end; from += lanes) {
      step(from, [](const T* p) GROUPCONV_INLINE_LAMBDA { return V_::load(p); });
    }
    if (whole < tile.sources) {
      step(from, [&](const T* p) GROUPCONV_INLINE_LAMBDA { return V_::load(p, rest); });
    }
  }

  T totals[count + lanes];
  sum_each<count>(sums, totals);
  const auto mask = V_::first(R);
  const V_ bias = V_::load(tile.bias, mask);
  const V_ low = V_::broadcast(tile.low), high = V_::broadcast(tile.high);
#pragma GCC unroll 4
  for (int p = 0; p < P; ++p) {
    finish_pixel(tile, p, mask, low, high, V_::load(totals + p * R, mask) + bias);
  }
}

template <class T, int R, int P = deep_pixels>
void multiply_deep_run(DeepTile<T> tile, int64_t pixels) {
  for (; pixels >= P; pixels -= P) {
    multiply_deep<T, R, P>(tile);
    tile.source += P * tile.pixel_stride;
    tile.dest += P * tile.dest_stride;
    if (tile.residual) tile.residual += P * tile.dest_stride;
  }
  if constexpr (P > 1) {
    if (pixels > 0) multiply_deep_run<T, R, P - 1>(tile, pixels);
  }
}

template <class T, int R = deep_rows>
void multiply_deep_rows(const DeepTile<T>& tile, int64_t rows, int64_t pixels) {
  if constexpr (R > 1) {
    if (rows < R) return multiply_deep_rows<T, R - 1>(tile, rows, pixels);
  }
  multiply_deep_run<T, R>(tile, pixels);
}

template <class Stored>
class DeepBlocks {
  using T = compute_t<Stored>;
  static constexpr int64_t lanes = Vec<T>::lanes;

  struct Block {
    const T* weight;
    const T* bias;
    int64_t first_read, sources, rows;
    int64_t dest;  // first channel: of the image, or among the sums
  };

 public:
  using Operand = T;
  static constexpr bool side_by_side = true;
  static constexpr int64_t most = 4 * deep_pixels;
  static constexpr int64_t least_pixels_of_window = 64;

  // Where the other ways take more time.
  static bool suits(const ConvolveProblem<Stored>& p) {
    const Sides<Stored> sides(p);
    if (p.partition->entries() * p.window_area > INT32_MAX) return false;  // gathered by 32 bits
    const int64_t reads = sides.sources.offsets[sides.groups];
    const bool gathered = !in_order(sides.sources, sides.groups);
    if (reads < (gathered ? 64 : 32) * sides.groups) return false;
    return PixelCosts<Stored>(sides).deep_pays();
  }

  explicit DeepBlocks(const Sides<Stored>& sides) : sides_(sides) {
    int64_t weights = 0;
    for (int64_t g = 0; g < sides_.groups; ++g) {
      for_each_deep_block(sides_.dests.count(g), [&](int64_t, int64_t) { ++count_; });
      weights += sides_.dests.count(g) * row_size(g);
      sums_ += sides_.dests.count(g);
      most_sources_ = larger(most_sources_, sides_.sources.count(g));
    }
    packed_.open(sides_, &packer<DeepBlocks>, weights);
  }

  int64_t sums() const { return sums_; }
  int64_t count() const { return count_; }
  bool writes_runs() const { return writes_neighbours(sides_); }

  void plan(Workspace& shared) const {
    packed_.plan(shared);
    shared.plan<T>(sums_);
    shared.plan<int32_t>(divide_up(most_sources_, lanes) * lanes);
    shared.plan<int64_t>(sides_.taps);
    shared.plan<Block>(count_);
  }

  void prepare(Workspace& shared, const PixelSource<Stored>& source, bool dest_direct, int32_t* places) {
    T* weights = packed_.take(shared);
    T* bias = shared.take<T>(sums_);
    int32_t* columns = shared.take<int32_t>(divide_up(most_sources_, lanes) * lanes);
    offsets_ = shared.take<int64_t>(sides_.taps);
    blocks_ = shared.take<Block>(count_);
    for (int64_t t = 0; t < sides_.taps; ++t) {
      offsets_[t] = source.tap_offset(sides_.problem.sweep->taps[static_cast<size_t>(t)]);
    }
    Block* block = blocks_;
    int64_t read = 0, sum = 0;
    for (int64_t g = 0; g < sides_.groups; ++g) {
      const int64_t sources = sides_.sources.count(g);
      for (int64_t i = 0; i < sources; ++i) columns[i] = static_cast<int32_t>(i * sides_.source_step(g));
      for_each_deep_block(sides_.dests.count(g), [&](int64_t first, int64_t rows) {
        const int32_t* to = sides_.dests.of(g) + first;
        *block++ = {weights, bias, read, sources, rows, dest_direct ? to[0] : sum};
        for (int64_t r = 0; r < rows; ++r) {
          places[to[r]] = static_cast<int32_t>(sum + r);
          bias[r] = sides_.bias(to[r]);
          if (!packed_.filled()) pack(g, first + r, columns, rows, weights + r * lanes);
        }
        weights += rows * row_size(g);
        bias += rows;
        sum += rows;
      });
      read += sources;
    }
    packed_.keep();
  }

  void run(int64_t index, const PixelRun<T>& run) const {
    const Block& block = blocks_[index];
    DeepTile<T> tile;
    tile.source = run.source + block.first_read;
    tile.pixel_stride = run.pixel_stride;
    tile.offsets = offsets_;
    tile.taps = sides_.taps;
    tile.sources = block.sources;
    tile.weight = block.weight;
    tile.bias = block.bias;
    tile.set_dest(run, block.dest);
    multiply_deep_rows<T>(tile, block.rows, run.pixels);
  }

 private:
  // What a destination's weights take.
  int64_t row_size(int64_t group) const {
    return sides_.taps * divide_up(sides_.sources.count(group), lanes) * lanes;
  }

  // The weights of a destination, `rows` vectors apart.
  void pack(int64_t group, int64_t dest, const int32_t* columns, int64_t rows, T* to) const {
    const T* from = sides_.weight(group) + dest * sides_.dest_step(group);
    for (const Tap& tap : sides_.problem.sweep->taps) {
      for (int64_t i = 0; i < sides_.sources.count(group); i += lanes, to += rows * lanes) {
        const auto mask = Vec<T>::first(smaller(lanes, sides_.sources.count(group) - i));
        Vec<T>::gather(from + tap.weight, columns + i, mask).store(to);
      }
    }
  }

  const Sides<Stored>& sides_;
  int64_t count_ = 0, sums_ = 0, most_sources_ = 0;
  PackedMemory<T> packed_;
  int64_t* offsets_ = nullptr;
  Block* blocks_ = nullptr;
};

}  // namespace
}  // namespace groupconv::cpu
