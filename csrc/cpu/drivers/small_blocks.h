// Pointwise groups too small for a vector of their own: as many neighbouring groups as fit one vector, both their
// sources and their destinations. A source vector is loaded whole, where the image has it; the k-th source of every
// lane's own group is brought to that lane by one permutation, which one multiply-add follows. Windows, whose pixels
// are copied anyway, go another way (slot_blocks.h).
#pragma once

#include "cpu/staging/pixels.h"
#include "cpu/staging/sides.h"
#include "cpu/staging/workspace.h"
#include "cpu/vector/strides.h"

namespace groupconv::cpu {
namespace {

template <class T>
struct SmallTile : PixelDest<T> {
  const T* source;  // the block's first source channel of the first pixel
  int64_t pixel_stride;
  int64_t sources, depth;   // channels to load, and of the largest group
  const int32_t* indices;   // [depth][lanes] where the lane's source lies
  const uint32_t* present;  // [depth] lanes whose group has such a source
  const T* weight;          // [depth][lanes]
  const T* bias;
  int64_t channels;
};

constexpr int most_small_pixels = vector_registers == 32 ? 14 : 8;

template <class T, int P>
void multiply_small(const SmallTile<T>& tile) {
  using V_ = Vec<T>;
  constexpr int lanes = V_::lanes;
  V_ sums[P];
  const V_ start = V_::load(tile.bias);
#pragma GCC unroll 16
  for (int p = 0; p < P; ++p) sums[p] = start;

  const Strides strides(tile.pixel_stride * static_cast<int64_t>(sizeof(T)));
  const T* beyond = strides.at(tile.source, 8);
  const auto loaded = V_::first(tile.sources);
  for (int64_t k = 0; k < tile.depth; ++k) {
    const auto index = V_::load_index(tile.indices + k * lanes);
    const auto present = V_::from_bits(tile.present[k]);
    const V_ w = V_::load(tile.weight + k * lanes);
#pragma GCC unroll 16
    for (int p = 0; p < P; ++p) {
      const T* at = p < 8 ? strides.at(tile.source, p) : strides.at(beyond, p - 8);
      sums[p] = multiply_add(w, permute(V_::load(at, loaded), index, present), sums[p]);
    }
  }

  const auto mask = V_::first(tile.channels);
  const V_ low = V_::broadcast(tile.low), high = V_::broadcast(tile.high);
#pragma GCC unroll 16
  for (int p = 0; p < P; ++p) {
    finish_pixel(tile, p, mask, low, high, sums[p]);
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
    // Bringing pixels into the groups' order and back would cost more than the products.
    if (sides.taps != 1 || !in_order(sides.sources, sides.groups)) return false;
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
    shared.plan<T>(depths_ * lanes);
    shared.plan<T>(sums());
    shared.plan<int32_t>(depths_ * lanes);
    shared.plan<uint32_t>(depths_);
    shared.plan<Block>(count_);
  }

  void prepare(Workspace& shared, const PixelSource<Stored>& source, bool dest_direct, int32_t* places) {
    T* weights = shared.take<T>(depths_ * lanes);
    T* bias = shared.take<T>(sums());
    int32_t* indices = shared.take<int32_t>(depths_ * lanes);
    uint32_t* present = shared.take<uint32_t>(depths_);
    blocks_ = shared.take<Block>(count_);
    const Tap& tap = sides_.problem.sweep->taps[0];
    offset_ = source.tap_offset(tap);
    fill_zero(weights, depths_ * lanes);
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
          const T* from = sides_.weight(g) + r * sides_.dest_step(g) + tap.weight;
          for (int64_t k = 0; k < sides_.sources.count(g); ++k) {
            weights[k * lanes + lane] = from[k * sides_.source_step(g)];
          }
        }
        read += sides_.sources.count(g);
      }
      *block++ = {weights, bias, indices, present, first_read, read - first_read, depth, lane, dest};
      weights += depth * lanes;
      bias += lanes;
      indices += depth * lanes;
      present += depth;
      sum += lanes;
    });
  }

  void run(int64_t index, const PixelRun<T>& run) const {
    const Block& block = blocks_[index];
    SmallTile<T> tile;
    tile.source = run.source + offset_ + block.first_read;
    tile.pixel_stride = run.pixel_stride;
    tile.sources = block.reads;
    tile.depth = block.depth;
    tile.indices = block.indices;
    tile.present = block.present;
    tile.weight = block.weight;
    tile.bias = block.bias;
    tile.set_dest(run, block.dest);
    tile.channels = block.channels;
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

  const Sides<Stored>& sides_;
  int64_t count_ = 0, depths_ = 0;
  int64_t offset_ = 0;  // of the tap's pixel
  Block* blocks_ = nullptr;
};

}  // namespace
}  // namespace groupconv::cpu
