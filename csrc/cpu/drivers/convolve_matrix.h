// The driver of a sweep for matrix registers: forward pass and input gradient of bfloat16, destinations in NCHW.
//
// Sums are blocks of 16 destination channels × 16 pixels, four of them at a time. Weights are the left operands
// (matrix_weights.h); the right ones are rows of pairs of a group's channels, staged as every other driver stages
// them, where a tap of a window is only another place to read from.
#pragma once

#include "cpu/staging/matrix_weights.h"
#include "cpu/staging/stage.h"
#include "cpu/staging/unstage.h"
#include "cpu/staging/workspace.h"
#include "cpu/vector/sums_seen.h"

namespace groupconv::cpu {
namespace {

class MatrixConvolution {
  using Operand = Pair<BFloat16>;
  static constexpr int64_t pairs_deep = block_depth / 2;
  static constexpr int64_t span = 2 * block_cols;  // pixels that are multiplied at once, and destinations

 public:
  static bool suits(const ConvolveProblem<BFloat16>& p) {
    if (p.source.channels_last() || p.dest.channels_last()) return false;
    return p.dest.batch * p.sweep->rows * p.sweep->cols >= span && fills_registers(Sides(p), span);
  }

  explicit MatrixConvolution(const ConvolveProblem<BFloat16>& problem)
      : p_(problem), sweep_(*problem.sweep), sides_(problem), planes_(sweep_), finish_(p_.activation) {
    for_each_set(sides_, [&](const GroupSet& set) {
      ++sets_;
      joins_ = joins_ || set.joins();
      most_sources_ = larger(most_sources_, set.of(sides_.sources).count);
      most_dests_ = larger(most_dests_, set.of(sides_.dests).count);
    });
    pairs_ = divide_up(most_sources_, block_depth) * pairs_deep;
    const bool dest_flat = p_.dest.stride_w == 1 && p_.dest.flat() && sweep_.dest_step_h == 1 &&
                           sweep_.dest_step_w == 1 && is_clamp(p_.activation);
    dest_direct_ = dest_flat && (sweep_.halo_cols == 0 || sweep_.rows == 1);
    dest_gaps_ = dest_flat && !dest_direct_ && tiling(1).across == 1;
    source_flat_ = sweep_.rows > 1 && tiling(1).across == 1 &&
                   stages_vectors<BFloat16, Operand>(p_.source, planes_, sweep_.cols + sweep_.halo_cols);
  }

  // False where a sum was infinite or none and groups share registers, see sums_seen.h.
  bool run() const {
    const int64_t units = p_.dest.batch * sets_;
    const Tiling tiles = tiling(p_.threads.run ? divide_up(pieces_for_threads, units) : int64_t{1});
    const MatrixWeights weights(sides_);
    const PlaneShape shape(sweep_, tiles.tile(sweep_, 0));  // no other is larger
    const int64_t vectors = divide_up(shape.size, block_cols);
    Workspace shared;
    shared.plan<GroupSet>(sets_);
    shared.plan<GapVector>(vectors);
    shared.plan<GapVector>(vectors);
    const SharedScratch memory(shared.bytes());
    shared.open(memory);
    GroupSet* sets = shared.take<GroupSet>(sets_);
    int64_t listed = 0;
    for_each_set(sides_, [&](const GroupSet& set) { sets[listed++] = set; });
    Gaps gaps;
    if (source_flat_) {
      const int64_t left = -planes_.first_col - planes_.phases[0].col;
      list_gaps<float>(gaps.source = shared.take<GapVector>(vectors), vectors, shape.pitch, left,
                       left + p_.source.width);
    }
    if (dest_gaps_) {
      list_gaps<float>(gaps.dest = shared.take<GapVector>(vectors), vectors, shape.pitch, 0, sweep_.cols);
    }
    bool finite = true;
    for_each_item(p_.threads, units * tiles.count, [&](int64_t item) {
      const int64_t unit = item / tiles.count;
      const bool sums_are =
          run_tile(weights, gaps, unit / sets_, sets[unit % sets_], tiles.tile(sweep_, item % tiles.count));
      if (!sums_are) __atomic_store_n(&finite, false, __ATOMIC_RELAXED);
    });
    return finite || !joins_;
  }

 private:
  // The weights of 32 destinations and so many steps stay in L1 while all pixels of a tile pass.
  static constexpr int64_t most_steps = 12;

  Tiling tiling(int64_t wanted) const {
    const int64_t summed = dest_direct_ || dest_gaps_ ? 0 : most_dests_;
    return Tiling(sweep_, pairs_ * planes_.count, summed, sizeof(float), wanted);
  }

  // Between rows of operands, and of sums, where an image has none; null where rows are taken one by one.
  struct Gaps {
    GapVector *source = nullptr, *dest = nullptr;
  };

  // 32 destinations × 32 pixels.
  struct Block {
    int64_t row, pixel;
  };

  // A set of groups in a tile.
  struct Job {
    GroupSet set;
    int64_t rows, depth, steps, length;
    BFloat16** dests;  // [rows], where the tile begins; else there are sums
    const BFloat16** residuals;
    float* sums;
    float* bias;
    const Operand* operands;
    int64_t distance;  // of rows of operands
    float* partial;    // [32][sum_distance] sums of a part of the steps
    int64_t sum_distance;
    float* block;           // [32][32] sums
    const GapVector* gaps;  // of dests' vectors, or null
    SumsSeen seen;
    Block done;  // whose sums they are; pixel < 0: nobody's
  };

  // Whether all sums are finite.
  bool run_tile(const MatrixWeights& weights, const Gaps& gaps, int64_t n, const GroupSet& set,
                const Tile& tile) const {
    const PlaneShape shape(sweep_, tile);
    Job job{};
    const ChannelSet sources = set.of(sides_.sources), dests = set.of(sides_.dests);
    job.set = set;
    job.rows = dests.count;
    job.depth = divide_up(sources.count, block_depth);
    job.steps = sides_.taps * job.depth;
    job.length = tile_length(tile, shape.pitch);
    job.distance = row_distance<float>(planes_.count * shape.size + span);
    job.sum_distance = row_distance<float>(divide_up(job.length, span) * span);
    job.done.pixel = -1;
    job.gaps = gaps.dest;
    const bool direct = dest_direct_ || dest_gaps_;
    const int64_t summed = direct ? 0 : job.rows * job.sum_distance;
    const int64_t partial = job.steps > most_steps ? span * job.sum_distance : 0;

    Workspace space;
    space.plan<Operand>(pairs_ * job.distance + span);
    space.plan<float>(summed);
    space.plan<float>(partial);
    space.plan<float>(span * span);
    space.plan<BFloat16*>(job.rows);
    space.plan<const BFloat16*>(job.rows);
    space.plan<float>(job.rows);
    space.open();
    Operand* operands = space.take<Operand>(pairs_ * job.distance + span);
    job.operands = operands;
    job.sums = space.take<float>(summed);
    job.partial = space.take<float>(partial);
    job.block = space.take<float>(span * span);
    job.dests = space.take<BFloat16*>(job.rows);
    job.residuals = space.take<const BFloat16*>(job.rows);
    job.bias = space.take<float>(job.rows);

    if (gaps.source) {
      stage_vectors(p_.source, n, sources, planes_, tile, shape, gaps.source, operands, job.distance);
    } else {
      stage(p_.source, n, sources, planes_, tile, shape, operands, job.distance, shape.size);
    }
    const int64_t pairs = operands_for<Operand>(sources.count);
    fill_zero(operands + pairs * job.distance, (job.depth * pairs_deep - pairs) * job.distance);

    for (int64_t r = 0; r < job.rows; ++r) {
      const int64_t channel = dests[r];
      job.bias[r] = sides_.bias(channel);
      job.dests[r] = p_.dest.at(n, channel, tile.row, tile.col);
      job.residuals[r] = p_.residual.data ? p_.residual.at(n, channel, tile.row, tile.col) : nullptr;
    }
    const MatrixRegisters registers;
    multiply_tile(weights, shape, job);
    if (!direct) {
      unstage(job.sums, job.sum_distance, shape.pitch, dests, sweep_, tile, finish_, p_.residual, p_.dest, n);
    }
    return job.seen.all_finite();
  }

  void multiply_tile(const MatrixWeights& weights, const PlaneShape& shape, Job& job) const {
    const int64_t at_once = divide_up(job.steps, larger(divide_up(job.steps, most_steps), int64_t{1}));
    for (int64_t row = 0; row < job.rows; row += span) {
      int64_t first = 0, end = 0;
      do {  // once where a group reads nothing
        end = smaller(first + at_once, job.steps);
        for (int64_t pixel = 0; pixel < job.length; pixel += span) {
          float* so_far = job.partial + pixel;
          multiply(weights, shape, job, {row, pixel}, first, end, so_far);
          if (end < job.steps) {
            store_sums(so_far, job.sum_distance);
          } else {
            finish_block(job);  // the one before, while this one is multiplied
            store_sums(job.block, span);
            job.done = {row, pixel};
          }
        }
        first = end;
      } while (end < job.steps);
    }
    finish_block(job);
  }

  // Registers 0 to 3 are sums, 4 and 5 weights, 6 and 7 pixels.
  void multiply(const MatrixWeights& weights, const PlaneShape& shape, const Job& job, const Block& at,
                int64_t first, int64_t end, const float* so_far) const {
    const BFloat16* upper = weights.of(job.set, at.row) + first * register_numbers;
    const BFloat16* lower = upper;  // where there are no more than 16 destinations left
    if (at.row + block_rows < job.rows)
      lower = weights.of(job.set, at.row + block_rows) + first * register_numbers;
    const int64_t operand_bytes = job.distance * static_cast<int64_t>(sizeof(Operand));
    if (first == 0) {
      clear_register<0>();
      clear_register<1>();
      clear_register<2>();
      clear_register<3>();
    } else {
      load_sums(so_far, job.sum_distance);
    }
    int64_t t = first > 0 ? first / job.depth : 0, k = first - t * job.depth;
    for (int64_t step = first; step < end; ++step, upper += register_numbers, lower += register_numbers) {
      const Tap& tap = sweep_.taps[static_cast<size_t>(t)];
      const Operand* from = job.operands + k * pairs_deep * job.distance + at.pixel + tap.plane * shape.size +
                            tap.row * shape.pitch + tap.col;
      if (++k == job.depth) k = 0, ++t;
      load_register<4>(upper, register_row_bytes);
      load_register<6>(from, operand_bytes);
      multiply_registers<0, 4, 6>();
      load_register<7>(from + block_cols, operand_bytes);
      multiply_registers<1, 4, 7>();
      load_register<5>(lower, register_row_bytes);
      multiply_registers<2, 5, 6>();
      multiply_registers<3, 5, 7>();
    }
  }

  static void load_sums(const float* from, int64_t distance) {
    const int64_t row_bytes = distance * static_cast<int64_t>(sizeof(float));
    load_register<0>(from, row_bytes);
    load_register<1>(from + block_cols, row_bytes);
    load_register<2>(from + block_rows * distance, row_bytes);
    load_register<3>(from + block_rows * distance + block_cols, row_bytes);
  }
  static void store_sums(float* to, int64_t distance) {
    const int64_t row_bytes = distance * static_cast<int64_t>(sizeof(float));
    store_register<0>(to, row_bytes);
    store_register<1>(to + block_cols, row_bytes);
    store_register<2>(to + block_rows * distance, row_bytes);
    store_register<3>(to + block_rows * distance + block_cols, row_bytes);
  }

  // The block that is done leaves for the image, or for the sums of the tile.
  void finish_block(Job& job) const {
    if (job.done.pixel < 0) return;
    const int64_t end = smaller(job.done.row + span, job.rows), pixel = job.done.pixel;
    const int64_t count = smaller(span, job.length - pixel);
    const float* from = job.block;
    SumsSeen seen = job.seen;  // in a register
    for (int64_t r = job.done.row; r < end; ++r, from += span) {
      if (job.gaps) {
        finish_between_gaps(job, from, r, seen);
      } else if (dest_direct_) {
        finish_row(from, job.bias[r], job.residuals[r] + pixel, job.dests[r] + pixel, count, seen);
      } else {
        const float* no_residual = nullptr;
        finish_row(from, job.bias[r], no_residual, job.sums + r * job.sum_distance + pixel, count, seen);
      }
    }
    job.seen = seen;
  }

  // Where rows of pixels follow each other in the image, and those of the block do not.
  GROUPCONV_INLINE void finish_between_gaps(const Job& job, const float* from, int64_t row,
                                            SumsSeen& seen) const {
    const Vec<float> bias = Vec<float>::broadcast(job.bias[row]);
    const Vec<float> low = Vec<float>::broadcast(finish_.range.low),
                     high = Vec<float>::broadcast(finish_.range.high);
    for (int64_t i = 0; i < span; i += block_cols) {
      const int64_t left = job.length - job.done.pixel - i;
      if (left <= 0) return;
      const GapVector& gap = job.gaps[(job.done.pixel + i) / block_cols];
      const uint32_t lanes = gap.lanes & Vec<float>::first(smaller(left, block_cols));
      const auto present = Vec<float>::first(__builtin_popcount(lanes));
      const Vec<float> sum = compress(Vec<float>::load(from + i), lanes);
      Vec<float> x = seen.look(sum) + bias;
      if (p_.residual.data) x = x + Vec<float>::load(job.residuals[row] + gap.before, present);
      clamp(low, high, x).store(job.dests[row] + gap.before, present);
    }
  }

  template <class Out>
  GROUPCONV_INLINE void finish_row(const float* from, float bias_number, const Out* residual, Out* to,
                                   int64_t count, SumsSeen& seen) const {
    constexpr bool last = __is_same(Out, BFloat16);
    const Vec<float> bias = Vec<float>::broadcast(bias_number);
    const Vec<float> low = Vec<float>::broadcast(finish_.range.low),
                     high = Vec<float>::broadcast(finish_.range.high);
    const bool adds = last && p_.residual.data, clamps = last && p_.activation != Activation::none;
    const auto finish = [&](int64_t i, auto... mask) GROUPCONV_INLINE_LAMBDA {
      Vec<float> x = seen.look(Vec<float>::load(from + i, mask...)) + bias;
      if (adds) x = x + Vec<float>::load(residual + i, mask...);
      if (clamps) x = clamp(low, high, x);
      x.store(to + i, mask...);
    };
    if (count == span) {
      finish(0);
      finish(block_cols);
      return;
    }
    for (int64_t i = 0; i < count; i += block_cols)
      finish(i, Vec<float>::first(smaller(count - i, block_cols)));
  }

  const ConvolveProblem<BFloat16>& p_;
  const Sweep& sweep_;
  Sides<BFloat16> sides_;
  Planes planes_;
  Finish<float> finish_;
  bool source_flat_ = false;
  bool dest_direct_ = false, dest_gaps_ = false;  // dest_gaps_: direct, but for the gaps between rows
  bool joins_ = false;                            // groups share registers
  int64_t sets_ = 0, most_sources_ = 0, most_dests_ = 0, pairs_;
};

}  // namespace
}  // namespace groupconv::cpu
