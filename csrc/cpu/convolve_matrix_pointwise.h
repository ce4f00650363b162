// Pointwise convolutions by matrix registers between channels_last images: forward pass and input gradient of bfloat16.
//
// Here a permutation costs next to nothing: what a block of 32 pixels goes through is transposed once on the way in and
// once on the way out (pixel_rows.h), and between the two every channel is a row, wherever it lies.
//   pixels     → rows of a channel each, 16 pixels wide
//   rows       → right operands: pairs of a group's rows interleaved, filled up with rows of zeros to 32 channels;
//                neighbouring groups of few channels share registers (group_sets.h)
//   operands   → sums of 16 destinations × 16 columns, four at a time; weights are left operands (matrix_weights.h)
//   sums       → rows again, finished and rounded, of a destination each
//   rows       → pixels, in the order of the image's channels
// Interleaving takes the 32 pixels apart into two times 16 columns by fours; what rounds the sums puts them together.
#pragma once

#include "cpu/matrix_weights.h"
#include "cpu/pixel_rows.h"
#include "cpu/sums_seen.h"

namespace groupconv::cpu {
namespace {

class MatrixPointwise {
  using V_ = Vec<float>;
  static constexpr int64_t span = 2 * block_rows;  // pixels, and destinations that are multiplied at once
  static constexpr int64_t operand_row = 2 * register_row_bytes;  // of 32 pairs

  struct Group {  // or some that share registers
    GroupSet set;
    int64_t first_read, depth;  // of a pixel; registers
    int64_t first_sum, dests;
  };

 public:
  static bool suits(const ConvolveProblem<BFloat16>& p) {
    if (!p.source.channels_last() || !p.dest.channels_last()) return false;
    if (!p.sweep->pointwise() || p.sweep->rows != 1) return false;
    return p.dest.batch * p.sweep->cols >= span && fills_registers(Sides(p), block_rows);
  }

  explicit MatrixPointwise(const ConvolveProblem<BFloat16>& problem)
      : p_(problem),
        sides_(problem),
        finish_(p_.activation),
        sources_(p_.source.channels),
        residuals_(p_.dest.channels),
        batch_(p_.dest.batch),
        pixels_(p_.sweep->cols) {
    for_each_set(sides_, [&](const GroupSet& set) {
      const int64_t reads = round_up(set.of(sides_.sources).count, block_depth);
      ++sets_;
      joins_ = joins_ || set.joins();
      reads_ += reads;
      most_reads_ = larger(most_reads_, reads);
    });
    sums_ = sides_.dests.offsets[sides_.groups];
    if (images_follow(p_, pixels_)) {
      pixels_ *= batch_;
      batch_ = 1;
    }
  }

  // False where a sum was infinite or none and groups share registers, see sums_seen.h.
  bool run() {
    Workspace shared;
    shared.plan<Group>(sets_);
    shared.plan<int32_t>(reads_);
    shared.plan<int32_t>(round_up(p_.dest.channels, 16));
    shared.plan<int32_t>(sums_);
    shared.plan<float>(sums_);
    const SharedScratch memory(shared.bytes());
    shared.open(memory);
    list_rows(shared);
    const MatrixWeights weights(sides_);

    const int64_t blocks = divide_up(pixels_, span);
    const int64_t pieces = p_.threads.run ? smaller(blocks, divide_up(pieces_for_threads, batch_)) : 1;
    bool finite = true;
    for_each_item(p_.threads, batch_ * pieces, [&](int64_t item) {
      const int64_t piece = item % pieces;
      const bool sums_are = run_piece(weights, item / pieces, blocks * piece / pieces * span,
                                      smaller(blocks * (piece + 1) / pieces * span, pixels_));
      if (!sums_are) __atomic_store_n(&finite, false, __ATOMIC_RELAXED);
    });
    return finite;
  }

 private:
  // 32 pixels on their way.
  struct Rows {
    char* sources[2];    // of 16 pixels each
    char* residuals[2];  // the same
    char* sums;          // of all 32
  };
  // Some of these, for which the weights of a group stay in L1.
  struct Job {
    Rows* rows;
    int64_t count;
    char* operands[2];  // of a group, and of what is multiplied next
    float* block;       // [32][32] sums
    SumsSeen seen;
  };
  // Destinations whose sums are in `block`.
  struct Done {
    const Rows* rows = nullptr;
    int64_t first_sum = 0, count = 0;
  };

  void list_rows(Workspace& shared) {
    groups_ = shared.take<Group>(sets_);
    reads_at_ = shared.take<int32_t>(reads_);
    dests_at_ = shared.take<int32_t>(round_up(p_.dest.channels, 16));
    residuals_at_ = shared.take<int32_t>(sums_);
    bias_ = shared.take<float>(sums_);
    // What no group writes is zero: a row behind the last.
    for (int64_t c = 0; c < round_up(p_.dest.channels, 16); ++c) dests_at_[c] = sum_at(sums_);
    int64_t read = 0, sum = 0;
    Group* group = groups_;
    for_each_set(sides_, [&](const GroupSet& set) {
      const ChannelSet sources = set.of(sides_.sources), dests = set.of(sides_.dests);
      const int64_t depth = divide_up(sources.count, block_depth);
      *group++ = {set, read, depth, sum, dests.count};
      for (int64_t i = 0; i < depth * block_depth; ++i) {
        reads_at_[read++] = sources_[i < sources.count ? sources[i] : no_channel];
      }
      for (int64_t r = 0; r < dests.count; ++r, ++sum) {
        dests_at_[dests[r]] = sum_at(sum);
        residuals_at_[sum] = residuals_[dests[r]];
        bias_[sum] = sides_.bias(dests[r]);
      }
    });
  }
  static int32_t sum_at(int64_t sum) { return static_cast<int32_t>(sum * row_register); }

  // Pixels that go through each step together, in blocks of 32, have their rows in L2.
  int64_t blocks_at_once(int64_t pixels) const {
    constexpr int64_t bytes = 256 << 10, most = 8;
    const int64_t fit = larger(bytes / (2 * sources_.bytes() + sums_ * row_register), int64_t{1});
    return smaller(smaller(most, fit), divide_up(pixels, span));
  }

  // Whether all sums are finite; true, unseen, where no groups share registers.
  bool run_piece(const MatrixWeights& weights, int64_t n, int64_t first, int64_t end) const {
    const int64_t at_once = blocks_at_once(end - first);
    const int64_t residual_bytes = p_.residual.data ? residuals_.bytes() : 0;
    Workspace space;
    space.plan<Rows>(at_once);
    for (int64_t b = 0; b < at_once; ++b) {
      for (int h = 0; h < 2; ++h) {
        space.plan<char>(sources_.bytes());
        space.plan<char>(residual_bytes);
      }
      space.plan<char>(sum_at(sums_ + 1));
    }
    for (int i = 0; i < 2; ++i) space.plan<char>(most_reads_ / 2 * operand_row);
    space.plan<float>(span * span);
    space.open();
    Job job{};
    job.rows = space.take<Rows>(at_once);
    for (int64_t b = 0; b < at_once; ++b) {
      Rows& rows = job.rows[b];
      for (int h = 0; h < 2; ++h) {
        rows.sources[h] = space.take<char>(sources_.bytes());
        rows.residuals[h] = space.take<char>(residual_bytes);
        sources_.clear_zero_row(rows.sources[h]);
      }
      rows.sums = space.take<char>(sum_at(sums_ + 1));
      std::memset(rows.sums + sum_at(sums_), 0, row_register);
    }
    for (char*& operands : job.operands) operands = space.take<char>(most_reads_ / 2 * operand_row);
    job.block = space.take<float>(span * span);

    const MatrixRegisters registers;
    for (int64_t pixel = first; pixel < end; pixel += at_once * span) {
      const int64_t count = smaller(at_once * span, end - pixel);
      // body(rows of 32 pixels, which half of them, where in the image, from one pixel to the next, how many)
      const auto each_half = [&](const auto& image, const auto& body) GROUPCONV_INLINE_LAMBDA {
        for (int64_t p = 0; p < count; p += pixels_of_rows) {
          body(job.rows[p / span], p % span / pixels_of_rows, image.at(n, 0, 0, pixel + p), image.stride_w,
               count - p);
        }
      };
      each_half(p_.source, [&](Rows& rows, int64_t h, const BFloat16* from, int64_t stride, int64_t left) {
        sources_.fill(from, stride, left, rows.sources[h]);
      });
      if (p_.residual.data) {
        each_half(p_.residual, [&](Rows& rows, int64_t h, const BFloat16* from, int64_t stride,
                                   int64_t left) { residuals_.fill(from, stride, left, rows.residuals[h]); });
      }
      job.count = divide_up(count, span);
      if (count % span > 0 &&
          count % span <= pixels_of_rows) {  // else sums of what is no pixel would be seen
        std::memset(job.rows[count / span].sources[1], 0, static_cast<size_t>(sources_.bytes()));
      }
      multiply_blocks(weights, job);
      each_half(p_.dest, [&](Rows& rows, int64_t h, BFloat16* to, int64_t stride, int64_t left) {
        rows_to_pixels(rows.sums + h * row_part, dests_at_, p_.dest.channels, to, stride, left);
      });
    }
    return job.seen.all_finite();
  }

  void multiply_blocks(const MatrixWeights& weights, Job& job) const {
    Done done;
    interleave(job, 0);
    for (int64_t i = 0; i < sets_ * job.count; ++i) {
      const Group& group = groups_[i / job.count];
      // What comes next, so that it is in cache and no longer on its way there when it is read.
      if (i + 1 < sets_ * job.count) interleave(job, i + 1);
      const char* operands = job.operands[i % 2];
      for (int64_t row = 0; row < group.dests; row += span) {
        const bool wide = row + block_rows < group.dests;
        const BFloat16* upper = weights.of(group.set, row);
        if (wide) {
          multiply<true>(upper, weights.of(group.set, row + block_rows), group.depth, operands);
        } else {
          multiply<false>(upper, upper, group.depth, operands);
        }
        finish_block(job, done);  // the one before, while this one is multiplied
        constexpr int64_t distance = span * sizeof(float);
        store_register<0>(job.block, distance);
        store_register<1>(job.block + block_cols, distance);
        if (wide) {
          store_register<2>(job.block + block_rows * span, distance);
          store_register<3>(job.block + block_rows * span + block_cols, distance);
        }
        done = {&job.rows[i % job.count], group.first_sum + row, smaller(span, group.dests - row)};
      }
    }
    finish_block(job, done);
  }

  // The i-th: all blocks of pixels for a group, then for the next.
  void interleave(const Job& job, int64_t i) const {
    const Group& group = groups_[i / job.count];
    const Rows& rows = job.rows[i % job.count];
    const int32_t* at = reads_at_ + group.first_read;
    char* to = job.operands[i % 2];
    for (const int32_t* end = at + group.depth * block_depth; at < end; at += 2, to += operand_row) {
      const __m512i first = load_two_rows(rows.sources[0] + at[0], rows.sources[1] + at[0]);
      const __m512i second = load_two_rows(rows.sources[0] + at[1], rows.sources[1] + at[1]);
      _mm512_store_si512(to, _mm512_unpacklo_epi16(first, second));
      _mm512_store_si512(to + register_row_bytes, _mm512_unpackhi_epi16(first, second));
    }
  }

  // Registers 0 to 3 are sums, 4 and 5 weights, 6 and 7 pixels.
  template <bool Wide>
  static GROUPCONV_INLINE void multiply(const BFloat16* upper, const BFloat16* lower, int64_t depth,
                                        const char* operands) {
    clear_register<0>();
    clear_register<1>();
    if constexpr (Wide) {
      clear_register<2>();
      clear_register<3>();
    }
    for (int64_t k = 0; k < depth; ++k, operands += block_depth / 2 * operand_row) {
      load_register<4>(upper, register_row_bytes);
      load_register<6>(operands, operand_row);
      multiply_registers<0, 4, 6>();
      load_register<7>(operands + register_row_bytes, operand_row);
      multiply_registers<1, 4, 7>();
      if constexpr (Wide) {
        load_register<5>(lower, register_row_bytes);
        multiply_registers<2, 5, 6>();
        multiply_registers<3, 5, 7>();
      }
      upper += register_numbers;
      lower += register_numbers;
    }
  }

  void finish_block(Job& job, const Done& done) const {
    if (!done.rows) return;
    if (p_.residual.data) {
      joins_ ? finish_rows<true, true>(job, done) : finish_rows<true, false>(job, done);
    } else {
      joins_ ? finish_rows<false, true>(job, done) : finish_rows<false, false>(job, done);
    }
  }
  template <bool Adds, bool Looks>
  GROUPCONV_INLINE void finish_rows(Job& job, const Done& done) const {
    const V_ low = V_::broadcast(finish_.range.low), high = V_::broadcast(finish_.range.high);
    const bool clamps = p_.activation != Activation::none && is_clamp(p_.activation);
    const bool others = !is_clamp(p_.activation);
    const __m512i by_fours = _mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7);
    float* from = job.block;
    char* to = done.rows->sums + sum_at(done.first_sum);
    for (int64_t r = done.first_sum; r < done.first_sum + done.count; ++r, from += span, to += row_register) {
      const V_ bias = V_::broadcast(bias_[r]);
      V_ x[2] = {V_::load(from), V_::load(from + block_cols)};
      if constexpr (Looks) {
        job.seen.look(x[1]);
        job.seen.look(x[0]);
      }
      x[0] = x[0] + bias;
      x[1] = x[1] + bias;
      if constexpr (Adds) {
        const int64_t at = residuals_at_[r];
        const __m512i residual = load_two_rows(done.rows->residuals[0] + at, done.rows->residuals[1] + at);
        const __m512i zeros = _mm512_setzero_si512();
        x[0] = x[0] + V_{_mm512_castsi512_ps(_mm512_unpacklo_epi16(zeros, residual))};
        x[1] = x[1] + V_{_mm512_castsi512_ps(_mm512_unpackhi_epi16(zeros, residual))};
      }
      if (clamps) {
        x[0] = clamp(low, high, x[0]);
        x[1] = clamp(low, high, x[1]);
      } else if (others) {
        x[0].store(from);
        x[1].store(from + block_cols);
        finish_run(finish_, from, 1, static_cast<const float*>(nullptr), from, 1, span);
        x[0] = V_::load(from);
        x[1] = V_::load(from + block_cols);
      }
      const __m512bh words = _mm512_cvtne2ps_pbh(x[1].v, x[0].v);
      __m512i bits;
      std::memcpy(&bits, &words, sizeof bits);
      _mm512_store_si512(to, _mm512_permutexvar_epi64(by_fours, bits));
    }
  }

  const ConvolveProblem<BFloat16>& p_;
  Sides<BFloat16> sides_;
  Finish<float> finish_;
  PixelRows sources_, residuals_;
  int64_t batch_, pixels_;  // of one row each
  int64_t sets_ = 0;
  bool joins_ = false;
  int64_t reads_ = 0, most_reads_ = 0, sums_ = 0;  // of a pixel, and of a group of it
  Group* groups_ = nullptr;
  int32_t *reads_at_ = nullptr, *dests_at_ = nullptr;  // rows of each read, and of each channel of dest
  int32_t* residuals_at_ = nullptr;                    // rows of each sum
  float* bias_ = nullptr;                              // of each sum
};

}  // namespace
}  // namespace groupconv::cpu
