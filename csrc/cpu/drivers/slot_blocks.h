// Windows over groups too small for a vector of their own: lanes over the destinations of several groups. A vector has
// N slots, and a slot up to lanes / N destinations of one group; the pixels of a tile are copied with the k-th sources
// of a vector's N slots side by side, so that one load brings N numbers and repeats them in all lanes: slot s is lanes s,
// s + N, s + 2 N, …, and each finds its own group's source. No multiplier's port is taken for it.
//
// Tile: P pixels of one vector, W neighbouring taps. A load serves all taps of a window row that meet the pixel:
// at W = 3 16 loads of sources and 3 of weights for 42 multiply-adds.
//
// N is whichever of 1, 2, 4, … takes least: groups of 8 destinations make two slots, groups of 9 five of eight.
#pragma once

#include <type_traits>

#include "cpu/staging/packed_memory.h"
#include "cpu/staging/pixels.h"
#include "cpu/staging/sides.h"
#include "cpu/staging/workspace.h"
#include "cpu/vector/strides.h"

namespace groupconv::cpu {
namespace {

template <class T>
struct SlotTile : PixelDest<T> {
  const T* source;  // the block's first number of the first pixel
  int64_t pixel_stride, depth;
  const int64_t* offsets;  // of runs of taps: first those of `together` taps, then single ones
  int64_t long_runs, short_runs;
  const T* weight;         // [run][depth][taps of the run][lanes]
  const T* bias;           // [lanes]
  const int32_t* arrange;  // [lanes] which lane is stored in this place; null: as they are
  int64_t channels;
};

constexpr int most_slot_pixels = vector_registers == 32 ? 14 : 8;

// N numbers in lanes 0 … N - 1, N … 2 N - 1 and so on.
template <int N>
GROUPCONV_INLINE Vec<float> load_repeated(const float* p) {
  if constexpr (N == 1) {
    return Vec<float>::broadcast(*p);
  } else if constexpr (N == Vec<float>::lanes) {
    return Vec<float>::load(p);
  } else {
#if defined(__AVX512F__)
    if constexpr (N == 2) return {_mm512_castpd_ps(_mm512_set1_pd(*reinterpret_cast<const double*>(p)))};
    if constexpr (N == 4) return {_mm512_broadcast_f32x4(_mm_loadu_ps(p))};
    if constexpr (N == 8) return {_mm512_broadcast_f32x8(_mm256_loadu_ps(p))};
#elif defined(__AVX2__)
    if constexpr (N == 2) return {_mm256_castpd_ps(_mm256_set1_pd(*reinterpret_cast<const double*>(p)))};
    if constexpr (N == 4) return {_mm256_broadcast_ps(reinterpret_cast<const __m128*>(p))};
#endif
  }
}

template <int Count>
using TapCount = std::integral_constant<int, Count>;

template <class T, int N, int P>
void multiply_slots(const SlotTile<T>& tile) {
  using V_ = Vec<T>;
  constexpr int lanes = V_::lanes;
  V_ sums[P];
  const V_ start = V_::load(tile.bias);
#pragma GCC unroll 16
  for (int p = 0; p < P; ++p) sums[p] = start;

  const Strides strides(tile.pixel_stride * static_cast<int64_t>(sizeof(T)));
  const T* weight = tile.weight;
  const auto add_run = [&](const T* from, auto taps) GROUPCONV_INLINE_LAMBDA {
    constexpr int W = decltype(taps)::value;
    const T* beyond = strides.at(from, 8);
    for (int64_t k = 0; k < tile.depth; ++k, from += N, beyond += N, weight += W * lanes) {
      V_ w[W];
#pragma GCC unroll 3
      for (int t = 0; t < W; ++t) w[t] = V_::load(weight + t * lanes);
#pragma GCC unroll 16
      for (int q = 0; q < P + W - 1; ++q) {
        V_ x = load_repeated<N>(q < 8 ? strides.at(from, q) : strides.at(beyond, q - 8));
        if constexpr (W > 1) pin(x);
#pragma GCC unroll 3
        for (int t = 0; t < W; ++t) {
          if (q - t >= 0 && q - t < P) sums[q - t] = multiply_add(w[t], x, sums[q - t]);
        }
      }
    }
  };
  int64_t run = 0;
  for (; run < tile.long_runs; ++run) add_run(tile.source + tile.offsets[run], TapCount<taps_together>{});
  for (; run < tile.long_runs + tile.short_runs; ++run)
    add_run(tile.source + tile.offsets[run], TapCount<1>{});

  const auto mask = V_::first(tile.channels);
  const V_ low = V_::broadcast(tile.low), high = V_::broadcast(tile.high);
  if (tile.arrange) {
    const auto index = V_::load_index(tile.arrange);
#pragma GCC unroll 16
    for (int p = 0; p < P; ++p) sums[p] = permute(sums[p], index, V_::all());
  }
#pragma GCC unroll 16
  for (int p = 0; p < P; ++p) {
    finish_pixel(tile, p, mask, low, high, sums[p]);
  }
}

template <class T, int N, int P = most_slot_pixels>
void multiply_slots_run(const SlotTile<T>& tile, int64_t pixels) {
  if constexpr (P > 1) {
    if (pixels < P) return multiply_slots_run<T, N, P - 1>(tile, pixels);
  }
  multiply_slots<T, N, P>(tile);
}

template <class Stored>
class SlotBlocks {
  using T = compute_t<Stored>;
  static constexpr int64_t lanes = Vec<T>::lanes;

  struct Block {
    const T* weight;
    const T* bias;
    const int32_t* arrange;
    int64_t first_read, depth, channels;
    int64_t dest;  // first channel: of the image, or among the sums
  };
  // Destinations of one group that share a slot.
  struct Part {
    int64_t group, first, count;
  };

 public:
  using Operand = T;
  static constexpr bool side_by_side = true;
  static constexpr int64_t most = most_slot_pixels;
  static constexpr int64_t least_pixels_of_window = 64;

  static bool suits(const ConvolveProblem<Stored>& p) {
    const Sides<Stored> sides(p);
    if (sides.taps < 2) return false;
    int64_t useful = 0, done = 0;
    for (int64_t g = 0; g < sides.groups; ++g) useful += sides.sources.count(g) * sides.dests.count(g);
    for_each_block(sides, best_slots(sides),
                   [&](const Part*, int64_t, int64_t depth) { done += depth * lanes; });
    return 4 * useful >= done;
  }

  explicit SlotBlocks(const Sides<Stored>& sides)
      : sides_(sides), slots_(best_slots(sides)), memory_(list_size()) {
    const Sweep& sweep = *sides_.problem.sweep;
    for (size_t t = 0; t < sweep.taps.size();) {
      const bool together = starts_run(sweep, t);
      ++(together ? long_runs_ : short_runs_);
      t += together ? taps_together : 1;
    }
    auto* offset = static_cast<int32_t*>(memory_.memory());
    int32_t* channel = offset + count_ + 1;
    reads_list_ = {offset, channel};
    *offset++ = 0;
    int32_t reads = 0;
    for_each_block(sides_, slots_, [&](const Part* parts, int64_t count, int64_t depth) {
      for (int64_t k = 0; k < depth; ++k) {
        for (int64_t s = 0; s < slots_; ++s) {
          const bool exists = s < count && k < sides_.sources.count(parts[s].group);
          channel[reads++] = exists ? sides_.sources.of(parts[s].group)[k] : no_channel;
        }
      }
      *offset++ = reads;
    });
    packed_.open(sides_, &packer<SlotBlocks>, depths_ * sides_.taps * lanes, slots_);
  }

  // What is to lie side by side in a pixel, block after block; no_channel where nothing is.
  const ChannelLists& reads() const { return reads_list_; }
  int64_t read_lists() const { return count_; }

  int64_t sums() const { return count_ * lanes; }
  int64_t count() const { return count_; }

  bool writes_runs() const {
    bool runs = true;
    for_each_block(sides_, slots_, [&](const Part* parts, int64_t count, int64_t) {
      int64_t next = -1;
      for_each_dest(parts, count, [&](int64_t dest, int64_t) {
        runs = runs && (next < 0 || dest == next);
        next = dest + 1;
      });
    });
    return runs;
  }

  void plan(Workspace& shared) const {
    packed_.plan(shared);
    shared.plan<T>(sums());
    shared.plan<int32_t>(sums());
    shared.plan<int64_t>(long_runs_ + short_runs_);
    shared.plan<Block>(count_);
  }

  void prepare(Workspace& shared, const PixelSource<Stored>& source, bool dest_direct, int32_t* places) {
    T* weights = packed_.take(shared);
    T* bias = shared.take<T>(sums());
    int32_t* arrange = shared.take<int32_t>(sums());
    offsets_ = shared.take<int64_t>(long_runs_ + short_runs_);
    blocks_ = shared.take<Block>(count_);
    const Sweep& sweep = *sides_.problem.sweep;
    int64_t longs = 0, shorts = long_runs_;
    for (size_t t = 0; t < sweep.taps.size();) {
      const bool together = starts_run(sweep, t);
      offsets_[together ? longs++ : shorts++] = source.tap_offset(sweep.taps[t]);
      t += together ? taps_together : 1;
    }
    const bool packs = !packed_.filled();
    if (packs) fill_zero(weights, depths_ * sides_.taps * lanes);
    fill_zero(bias, sums());
    fill_zero(arrange, sums());

    Block* block = blocks_;
    int64_t read = 0, sum = 0;
    for_each_block(sides_, slots_, [&](const Part* parts, int64_t count, int64_t depth) {
      int64_t channels = 0, first = sum;
      for_each_dest(parts, count, [&](int64_t dest, int64_t lane) {
        if (dest_direct && channels == 0) first = dest;
        places[dest] = static_cast<int32_t>(sum + lane);
        bias[lane] = sides_.bias(dest);
        arrange[channels++] = static_cast<int32_t>(lane);
      });
      for (int64_t s = 0; s < count; ++s) {
        for (int64_t r = 0; r < parts[s].count && packs; ++r) {
          pack(parts[s].group, parts[s].first + r, s + r * slots_, depth, weights);
        }
      }
      *block++ = {weights, bias, dest_direct ? arrange : nullptr, read, depth, dest_direct ? channels : lanes,
                  first};
      weights += depth * sides_.taps * lanes;
      bias += lanes;
      arrange += lanes;
      read += depth * slots_;
      sum += lanes;
    });
    packed_.keep();
  }

  void run(int64_t index, const PixelRun<T>& run) const {
    const Block& block = blocks_[index];
    SlotTile<T> tile;
    tile.source = run.source + block.first_read;
    tile.pixel_stride = run.pixel_stride;
    tile.depth = block.depth;
    tile.offsets = offsets_;
    tile.long_runs = long_runs_;
    tile.short_runs = short_runs_;
    tile.weight = block.weight;
    tile.bias = block.bias;
    tile.arrange = block.arrange;
    tile.set_dest(run, block.dest);
    tile.channels = block.channels;
    switch (slots_) {
      case 1: return multiply_slots_run<T, 1>(tile, run.pixels);
      case 2: return multiply_slots_run<T, 2>(tile, run.pixels);
      case 4: return multiply_slots_run<T, 4>(tile, run.pixels);
      case 8: return multiply_slots_run<T, 8>(tile, run.pixels);
      default: return multiply_slots_run<T, lanes>(tile, run.pixels);
    }
  }

 private:
  // body(parts, how many, sources of the largest group among them)
  template <class Body>
  static void for_each_block(const Sides<Stored>& sides, int64_t slots, const Body& body) {
    Part parts[lanes];
    int64_t count = 0, depth = 0;
    const auto close = [&] {
      if (count > 0) body(static_cast<const Part*>(parts), count, depth);
      count = depth = 0;
    };
    for (int64_t g = 0; g < sides.groups; ++g) {
      const int64_t most_dests = lanes / slots, dests = sides.dests.count(g);
      for (int64_t first = 0; first < dests; first += most_dests) {
        parts[count++] = {g, first, smaller(most_dests, dests - first)};
        depth = larger(depth, sides.sources.count(g));
        if (count == slots) close();
      }
    }
    close();
  }

  // body(destination channel, lane), in the groups' order.
  template <class Body>
  void for_each_dest(const Part* parts, int64_t count, const Body& body) const {
    for (int64_t s = 0; s < count; ++s) {
      for (int64_t r = 0; r < parts[s].count; ++r) {
        body(sides_.dests.of(parts[s].group)[parts[s].first + r], s + r * slots_);
      }
    }
  }

  // In cycles for a lattice pixel: multiply-adds of vectors, and numbers that are gathered.
  static int64_t best_slots(const Sides<Stored>& sides) {
    constexpr double multiply_add = 0.6, gathered = 0.5;
    const Sweep& sweep = *sides.problem.sweep;
    const auto pixels = static_cast<double>(sweep.source_step_h * sweep.source_step_w);
    int64_t best = 1;
    double least = 0;
    for (int64_t slots = 1; slots <= lanes; slots *= 2) {
      double cost = 0;
      for_each_block(sides, slots, [&](const Part*, int64_t, int64_t depth) {
        cost += static_cast<double>(depth) * (multiply_add * static_cast<double>(sides.taps) +
                                              gathered * pixels * static_cast<double>(slots));
      });
      if (slots == 1 || cost < least) {
        best = slots;
        least = cost;
      }
    }
    return best;
  }

  // Counts blocks, their depths and reads on the way.
  size_t list_size() {
    for_each_block(sides_, slots_, [&](const Part*, int64_t, int64_t depth) {
      ++count_;
      depths_ += depth;
      reads_ += depth * slots_;
    });
    return static_cast<size_t>(reads_ + count_ + 1) * sizeof(int32_t);
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
  int64_t slots_;
  int64_t count_ = 0, depths_ = 0, reads_ = 0, long_runs_ = 0, short_runs_ = 0;
  SharedScratch memory_;  // of reads_list_
  ChannelLists reads_list_{};
  PackedMemory<T> packed_;
  int64_t* offsets_ = nullptr;
  Block* blocks_ = nullptr;
};

}  // namespace
}  // namespace groupconv::cpu
