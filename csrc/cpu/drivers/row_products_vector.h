// Rows of 32 pixels multiplied in pairs by vectors, for convolve_pixel_rows.h.
//
// Tile: 8 destinations × 2 vectors of pixels; 16 sums, 2 sources, 1 weight. A step takes a pair of channels: 10 loads for
// 16 instructions that multiply. Weights are read where they lie (strides.h), and sums are finished in their registers.
#pragma once

#include "cpu/drivers/convolve_pixel_rows.h"
#include "cpu/processor/caches.h"
#include "cpu/staging/unstage.h"
#include "cpu/staging/weights.h"
#include "cpu/vector/strides.h"

namespace groupconv::cpu {
namespace {

class VectorRowProducts {
  using V_ = Vec<float>;
  using Operand = Pair<BFloat16>;
  static constexpr int most_rows = 8;

 public:
  static constexpr int64_t sources_together = channels_in<Operand>;

  static bool suits(const ConvolveProblem<BFloat16>&) { return true; }
  template <class Body>
  static void for_each(const Sides<BFloat16>& sides, const Body& body) {
    for (int64_t g = 0; g < sides.groups; ++g) body(GroupSet{g, g + 1});
  }

  explicit VectorRowProducts(const Sides<BFloat16>& sides)
      : weights_(sides, true),
        bytes_(sides.problem.partition->entries() * static_cast<int64_t>(sizeof(BFloat16))) {
    for (int64_t g = 0; g < sides.groups; ++g) tiles_ += divide_up(sides.dests.count(g), int64_t{most_rows});
  }

  // Rows stay in L1, where weights come from L2.
  bool one_block_at_a_time() const { return bytes_ <= caches().own / 4; }

  class Run {
   public:
    explicit Run(const VectorRowProducts& of) : weights_(of.weights_), tiles_(of.tiles_) {}

    // While so many blocks are multiplied.
    void fetch_meanwhile(const FetchedLines& lines, int64_t blocks) {
      lines_ = lines;
      lines_.per_tile = divide_up(lines.per_tile, larger(blocks * tiles_, int64_t{1}));
    }

    template <class Finish>
    void multiply(const RowGroup& group, const char* operands, const RowsOfPixels& rows,
                  const Finish& finish) {
      const int64_t g = group.set.first;
      Tile tile{weights_.of(g),
                weights_.source_step(g),
                Strides(weights_.dest_step(g) * static_cast<int64_t>(sizeof(Operand))),
                reinterpret_cast<const Operand*>(operands),
                group.pairs,
                rows,
                group.first_sum};
      for (int64_t left = group.dests; left > 0; left -= most_rows) {
        for (int64_t i = 0; i < lines_.per_tile; ++i) lines_.fetch();
        multiply_some<most_rows>(tile, left, finish);
        tile.weight += most_rows * weights_.dest_step(g);
        tile.sum += most_rows;
      }
    }
    template <class Finish>
    void finish_last(const Finish&) const {}
    bool holds() const { return true; }

   private:
    struct Tile {
      const Operand* weight;
      int64_t weight_step;  // from one pair's to the next's
      Strides rows_apart;
      const Operand* operands;
      int64_t pairs;
      RowsOfPixels rows;
      int64_t sum;  // the first
    };

    template <int R, class Finish>
    static void multiply_some(const Tile& tile, int64_t left, const Finish& finish) {
      if constexpr (R > 1) {
        if (left < R) return multiply_some<R - 1>(tile, left, finish);
      }
      multiply_tile<R>(tile, finish);
    }

    template <int R, class Finish>
    static void multiply_tile(const Tile& tile, const Finish& sums_finish) {
      const Finish finish = sums_finish;  // which no store can change
      const RowsOfPixels rows = tile.rows;
      const int64_t sum = tile.sum;
      V_ sums[R][2];
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) sums[r][0] = sums[r][1] = zero<float>();
      const Strides rows_apart = tile.rows_apart;
      const int64_t step = tile.weight_step;
      const Operand *weight = tile.weight, *from = tile.operands;
      for (const Operand* end = from + tile.pairs * RowsOfPixels::pixels; from < end;
           from += RowsOfPixels::pixels, weight += step) {
        const auto low = Vec<Operand>::load(from), high = Vec<Operand>::load(from + Vec<Operand>::lanes);
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
          const auto w = Vec<Operand>::broadcast(*rows_apart.at(weight, r));
          sums[r][0] = multiply_add(w, low, sums[r][0]);
          sums[r][1] = multiply_add(w, high, sums[r][1]);
        }
      }
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) finish(rows, sum + r, sums[r]);
    }

    const Weights<BFloat16, Operand>& weights_;
    int64_t tiles_;
    FetchedLines lines_{};
  };

 private:
  Weights<BFloat16, Operand> weights_;
  int64_t bytes_;
  int64_t tiles_ = 0;  // of a block
};

}  // namespace
}  // namespace groupconv::cpu
