// Groups too small for a vector of their own: as many neighbouring groups as fit one vector, both their
// sources and their destinations. A source vector is loaded whole; the k-th source of every lane's own group
// is brought to that lane by one permutation, which serves all taps of a window row that meet the pixel.
//
// Tile: P pixels of one vector, W neighbouring taps. A permutation and W multiply-adds for each pixel and
// source: at W = 3 a quarter of the vector operations are permutations.
#pragma once

#include "cpu/pixels.h"
#include "cpu/sides.h"
#include "cpu/strides.h"
#include "cpu/workspace.h"

namespace groupconv::cpu {
namespace {

template <class T>
struct SmallTile {
  const T* source;  // the block's first source channel of the first pixel
  int64_t pixel_stride;
  int64_t sources, depth;   // channels to load, and of the largest group
  const int32_t* indices;   // [depth][lanes] where the lane's source lies
  const uint32_t* present;  // [depth] lanes whose group has such a source
  const int64_t* offsets;   // of runs of taps: first those of `together` taps, then single ones
  int64_t long_runs, short_runs;
  const T* weight;  // [run][depth][taps of the run][lanes]
  const T* bias;
  T* dest;
  int64_t dest_stride;
  const T* residual;
  int64_t channels;
  bool clamped;
  T low, high;
};

constexpr int most_small_pixels = vector_registers == 32 ? 14 : 8;

template <int Count>
struct Taps {
  static constexpr int count = Count;
};

template <class T, int P>
void multiply_small(const SmallTile<T>& tile) {
  using V_ = Vec<T>;
  constexpr int lanes = V_::lanes;
  V_ sums[P];
  const V_ start = V_::load(tile.bias);
#pragma GCC unroll 16
  for (int p = 0; p < P; ++p) sums[p] = start;

  const Strides strides(tile.pixel_stride * static_cast<int64_t>(sizeof(T)));
  const auto loaded = V_::first(tile.sources);
  const T* weight = tile.weight;
  const auto add_run = [&](const T* from, auto taps) GROUPCONV_INLINE_LAMBDA {
    constexpr int W = decltype(taps)::count;
    const T* beyond = strides.at(from, 8);
    for (int64_t k = 0; k < tile.depth; ++k, weight += W * lanes) {
      const auto index = V_::load_index(tile.indices + k * lanes);
      const auto present = V_::from_bits(tile.present[k]);
      V_ w[W];
#pragma GCC unroll 3
      for (int t = 0; t < W; ++t) w[t] = V_::load(weight + t * lanes);
#pragma GCC unroll 16
      for (int q = 0; q < P + W - 1; ++q) {
        const T* at = q < 8 ? strides.at(from, q) : strides.at(beyond, q - 8);
        const V_ x = permute(V_::load(at, loaded), index, present);
#pragma GCC unroll 3
        for (int t = 0; t < W; ++t) {
          if (q - t >= 0 && q - t < P) sums[q - t] = multiply_add(w[t], x, sums[q - t]);
        }
      }
    }
  };
  int64_t run = 0;
  for (; run < tile.long_runs; ++run) add_run(tile.source + tile.offsets[run], Taps<taps_together>{});
  for (; run < tile.long_runs + tile.short_runs; ++run) add_run(tile.source + tile.offsets[run], Taps<1>{});

  const auto mask = V_::first(tile.channels);
  const V_ low = V_::broadcast(tile.low), high = V_::broadcast(tile.high);
#pragma GCC unroll 16
  for (int p = 0; p < P; ++p) {
    if (tile.residual) sums[p] = sums[p] + V_::load(tile.residual + p * tile.dest_stride, mask);
    if (tile.clamped) sums[p] = clamp(low, high, sums[p]);
    sums[p].store(tile.dest + p * tile.dest_stride, mask);
  }
}

template <class T, int P = most_small_pixels>
void multiply_small_run(const SmallTile<T>& tile, int64_t pixels) {
  if constexpr (P > 1) {
    if (pixels < P) return multiply_small_run<T, P - 1>(tile, pixels);
  }
  multiply_small<T, P>(tile);
}

template <class Stored>
class SmallBlocks {
  using T = compute_t<Stored>;
  static constexpr int64_t lanes = Vec<T>::lanes;

  struct Block {
    const T* weight;
    const T* bias;
    const int32_t* indices;
    const uint32_t* present;
    int64_t first_read, reads, depth, channels;
    int64_t dest;  // first channel: of the image, or among the sums
  };

 public:
  using Operand = T;
  static constexpr bool side_by_side = true;
  static constexpr int64_t most = most_small_pixels;
  static constexpr int64_t least_pixels_of_window = 64;

  static bool suits(const ConvolveProblem<Stored>& p) {
    const Sides<Stored> sides(p);
    // With one tap, bringing pixels into the groups' order and back would cost more than the products.
    if (sides.taps == 1 && !in_order(sides.sources, sides.groups)) return false;
    int64_t useful = 0, done = 0;
    bool fits = true;
    for_each_block(sides, [&](int64_t first, int64_t last) {
      int64_t reads = 0, depth = 0;
      for (int64_t g = first; g < last; ++g) {
        fits = fits && sides.sources.count(g) <= lanes && sides.dests.count(g) <= lanes;
        reads += sides.sources.count(g);
        depth = larger(depth, sides.sources.count(g));
        useful += sides.sources.count(g) * sides.dests.count(g);
      }
      done += depth * lanes;
    });
    return fits && 4 * useful >= done;
  }

  explicit SmallBlocks(const Sides<Stored>& sides) : sides_(sides) {
    for_each_block(sides_, [&](int64_t first, int64_t last) {
      ++count_;
      depths_ += deepest(first, last);
    });
    // A row of taps one pixel apart is taken three at a time; the rest one by one.
    const Sweep& sweep = *sides_.problem.sweep;
    for (size_t t = 0; t < sweep.taps.size();) {
      const bool together = starts_run(sweep, t);
      ++(together ? long_runs_ : short_runs_);
      t += together ? taps_together : 1;
    }
  }

  int64_t sums() const { return count_ * lanes; }
  int64_t count() const { return count_; }

  bool writes_runs() const {
    bool runs = true;
    for_each_block(sides_, [&](int64_t first, int64_t last) {
      int64_t next = -1;
      for (int64_t g = first; g < last; ++g) {
        for (int64_t r = 0; r < sides_.dests.count(g); ++r) {
          runs = runs && (next < 0 || sides_.dests.of(g)[r] == next);
          next = sides_.dests.of(g)[r] + 1;
        }
      }
    });
    return runs;
  }

  void plan(Workspace& shared) const {
    shared.plan<T>(depths_ * sides_.taps * lanes);
    shared.plan<T>(sums());
    shared.plan<int32_t>(depths_ * lanes);
    shared.plan<uint32_t>(depths_);
    shared.plan<int64_t>(long_runs_ + short_runs_);
    shared.plan<Block>(count_);
  }

  void prepare(Workspace& shared, const PixelSource<Stored>& source, bool dest_direct, int32_t* places) {
    T* weights = shared.take<T>(depths_ * sides_.taps * lanes);
    T* bias = shared.take<T>(sums());
    int32_t* indices = shared.take<int32_t>(depths_ * lanes);
    uint32_t* present = shared.take<uint32_t>(depths_);
    offsets_ = shared.take<int64_t>(long_runs_ + short_runs_);
    blocks_ = shared.take<Block>(count_);
    const Sweep& sweep = *sides_.problem.sweep;
    int64_t longs = 0, shorts = long_runs_;
    for (size_t t = 0; t < sweep.taps.size();) {
      const bool together = starts_run(sweep, t);
      offsets_[together ? longs++ : shorts++] = source.tap_offset(sweep.taps[t]);
      t += together ? taps_together : 1;
    }
    fill_zero(weights, depths_ * sides_.taps * lanes);
    fill_zero(bias, sums());
    fill_zero(indices, depths_ * lanes);
    fill_zero(present, depths_);

    Block* block = blocks_;
    int64_t read = 0, sum = 0;
    for_each_block(sides_, [&](int64_t first, int64_t last) {
      const int64_t depth = deepest(first, last), first_read = read;
      int64_t lane = 0;
      int64_t dest = sum;
      for (int64_t g = first; g < last; ++g) {
        const int32_t* to = sides_.dests.of(g);
        for (int64_t r = 0; r < sides_.dests.count(g); ++r, ++lane) {
          if (dest_direct && lane == 0) dest = to[r];
          places[to[r]] = static_cast<int32_t>(sum + lane);
          bias[lane] = sides_.bias(to[r]);
          for (int64_t k = 0; k < sides_.sources.count(g); ++k) {
            indices[k * lanes + lane] = static_cast<int32_t>(read - first_read + k);
            present[k] |= uint32_t{1} << lane;
          }
          pack(g, r, lane, depth, weights);
        }
        read += sides_.sources.count(g);
      }
      *block++ = {weights, bias, indices, present, first_read, read - first_read, depth, lane, dest};
      weights += depth * sides_.taps * lanes;
      bias += lanes;
      indices += depth * lanes;
      present += depth;
      sum += lanes;
    });
  }

  void run(int64_t index, const PixelRun<T>& run) const {
    const Block& block = blocks_[index];
    SmallTile<T> tile;
    tile.source = run.source + block.first_read;
    tile.pixel_stride = run.pixel_stride;
    tile.sources = block.reads;
    tile.depth = block.depth;
    tile.indices = block.indices;
    tile.present = block.present;
    tile.offsets = offsets_;
    tile.long_runs = long_runs_;
    tile.short_runs = short_runs_;
    tile.weight = block.weight;
    tile.bias = block.bias;
    tile.dest = run.dest + block.dest;
    tile.dest_stride = run.dest_stride;
    tile.residual = run.residual ? run.residual + block.dest : nullptr;
    tile.channels = block.channels;
    tile.clamped = run.clamped;
    tile.low = run.low;
    tile.high = run.high;
    multiply_small_run<T>(tile, run.pixels);
  }

 private:
  // body(first group, one past the last)
  template <class Body>
  static void for_each_block(const Sides<Stored>& sides, const Body& body) {
    int64_t first = 0, reads = 0, writes = 0;
    for (int64_t g = 0; g < sides.groups; ++g) {
      reads += sides.sources.count(g);
      writes += sides.dests.count(g);
      if (g > first && (reads > lanes || writes > lanes)) {
        body(first, g);
        first = g;
        reads = sides.sources.count(g);
        writes = sides.dests.count(g);
      }
    }
    if (sides.groups > 0) body(first, sides.groups);
  }

  int64_t deepest(int64_t first, int64_t last) const {
    int64_t depth = 0;
    for (int64_t g = first; g < last; ++g) depth = larger(depth, sides_.sources.count(g));
    return depth;
  }

  // Taps t, t + 1 and t + 2 read neighbouring lattice pixels.
  static bool starts_run(const Sweep& sweep, size_t t) {
    if (t + taps_together > sweep.taps.size()) return false;
    for (size_t i = t + 1; i < t + taps_together; ++i) {
      const Shift before = shift_of(sweep, sweep.taps[i - 1]), after = shift_of(sweep, sweep.taps[i]);
      if (after.row != before.row || after.col != before.col + sweep.source_step_w) return false;
    }
    return true;
  }

  // One destination channel's weights, to its lane.
  void pack(int64_t group, int64_t dest, int64_t lane, int64_t depth, T* weights) const {
    const T* from = sides_.weight(group) + dest * sides_.dest_step(group);
    const Sweep& sweep = *sides_.problem.sweep;
    const auto pack_run = [&](size_t first, int64_t width, T* to) {
      for (int64_t k = 0; k < sides_.sources.count(group); ++k) {
        for (int64_t t = 0; t < width; ++t) {
          to[(k * width + t) * lanes + lane] =
              from[k * sides_.source_step(group) + sweep.taps[first + static_cast<size_t>(t)].weight];
        }
      }
    };
    T* longs = weights;
    T* shorts = weights + long_runs_ * taps_together * depth * lanes;
    for (size_t t = 0; t < sweep.taps.size();) {
      if (starts_run(sweep, t)) {
        pack_run(t, taps_together, longs);
        longs += taps_together * depth * lanes;
        t += taps_together;
      } else {
        pack_run(t, 1, shorts);
        shorts += depth * lanes;
        ++t;
      }
    }
  }

  const Sides<Stored>& sides_;
  int64_t count_ = 0, depths_ = 0, long_runs_ = 0, short_runs_ = 0;
  int64_t* offsets_ = nullptr;
  Block* blocks_ = nullptr;
};

}  // namespace
}  // namespace groupconv::cpu
