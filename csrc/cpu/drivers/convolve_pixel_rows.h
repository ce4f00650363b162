// Pointwise convolutions between channels_last images of bfloat16, multiplied in pairs: forward pass and input gradient.
//
// Here a permutation costs next to nothing: what a block of 32 pixels goes through is transposed once on the way in and
// once on the way out (pixel_rows.h), and between the two every channel is a row, wherever it lies.
//   pixels     → rows of a channel each, 16 pixels wide
//   rows       → operands: pairs of a group's rows interleaved, filled up with rows of zeros
//   operands   → sums of rows of 32 pixels, by matrix registers (row_products_matrix.h) or vectors
//                (row_products_vector.h), whichever `Products` are
//   sums       → rows again, finished and rounded, of a destination each
//   rows       → pixels, in the order of the image's channels
// Interleaving takes the 32 pixels apart into two times 16 columns by fours; what rounds the sums puts them together.
#pragma once

#include "cpu/staging/group_sets.h"
#include "cpu/staging/pixel_rows.h"
#include "cpu/staging/unstage.h"
#include "cpu/staging/workspace.h"
#include "cpu/vector/fetched_lines.h"

namespace groupconv::cpu {
namespace {

// 32 pixels on their way.
struct RowsOfPixels {
  static constexpr int64_t pixels = 2 * pixels_of_rows;
  static constexpr int64_t operand_row = pixels * static_cast<int64_t>(sizeof(Pair<BFloat16>));  // bytes
  char* sources[2];    // of 16 pixels each
  char* residuals[2];  // the same
  char* sums;          // of all 32
};

// What is multiplied together: a group, or a set of some.
struct RowGroup {
  GroupSet set;
  int64_t first_read, pairs;  // of a pixel
  int64_t first_sum, dests;
};

template <class Products>
class PixelRowsConvolution {
  using V_ = Vec<float>;
  using Rows = RowsOfPixels;
  static constexpr int64_t span = Rows::pixels, operand_row = Rows::operand_row;

 public:
  static bool suits(const ConvolveProblem<BFloat16>& p) {
    if (p.transposed && p.partition->inputs_overlap) return false;  // sums of several groups are not added up
    if (!p.source.channels_last() || !p.dest.channels_last()) return false;
    if (!p.sweep->pointwise() || p.sweep->rows != 1) return false;
    return p.dest.batch * p.sweep->cols >= span && Products::suits(p);
  }

  explicit PixelRowsConvolution(const ConvolveProblem<BFloat16>& problem)
      : p_(problem),
        sides_(problem),
        finish_(p_.activation),
        sources_(p_.source.channels),
        residuals_(p_.dest.channels),
        batch_(p_.dest.batch),
        pixels_(p_.sweep->cols) {
    Products::for_each(sides_, [&](const GroupSet& set) {
      const int64_t reads = round_up(set.of(sides_.sources).count, Products::sources_together);
      ++sets_;
      reads_ += reads;
      most_reads_ = larger(most_reads_, reads);
    });
    sums_ = sides_.dests.offsets[sides_.groups];
    if (images_follow(pixels_, p_.source, p_.dest, p_.residual)) {
      pixels_ *= batch_;
      batch_ = 1;
    }
  }

  // False where the products cannot vouch for the sums, and all has to be done another way.
  bool run() {
    Workspace shared;
    shared.plan<RowGroup>(sets_);
    shared.plan<int32_t>(reads_);
    shared.plan<int32_t>(round_up(p_.dest.channels, 16));
    shared.plan<int32_t>(sums_);
    shared.plan<float>(sums_);
    const SharedScratch memory(shared.bytes());
    shared.open(memory);
    list_rows(shared);
    const Products products(sides_);

    const int64_t blocks = divide_up(pixels_, span);
    const int64_t pieces = p_.threads.run ? smaller(blocks, divide_up(pieces_for_threads, batch_)) : 1;
    bool all_hold = true;
    for_each_item(p_.threads, batch_ * pieces, [&](int64_t item) {
      const int64_t piece = item % pieces;
      const bool hold = run_piece(products, item / pieces, blocks * piece / pieces * span,
                                  smaller(blocks * (piece + 1) / pieces * span, pixels_));
      if (!hold) __atomic_store_n(&all_hold, false, __ATOMIC_RELAXED);
    });
    return all_hold;
  }

 private:
  // Some blocks, for which the weights of a group stay in L1.
  struct Job {
    Rows* rows;
    int64_t count;
    char* operands[2];  // of a group, and of what is multiplied next
  };

  void list_rows(Workspace& shared) {
    groups_ = shared.take<RowGroup>(sets_);
    reads_at_ = shared.take<int32_t>(reads_);
    dests_at_ = shared.take<int32_t>(round_up(p_.dest.channels, 16));
    residuals_at_ = shared.take<int32_t>(sums_);
    bias_ = shared.take<float>(sums_);
    // What no group writes is zero: a row behind the last.
    for (int64_t c = 0; c < round_up(p_.dest.channels, 16); ++c) dests_at_[c] = sum_at(sums_);
    int64_t read = 0, sum = 0;
    RowGroup* group = groups_;
    Products::for_each(sides_, [&](const GroupSet& set) {
      const ChannelSet sources = set.of(sides_.sources), dests = set.of(sides_.dests);
      const int64_t reads = round_up(sources.count, Products::sources_together);
      *group++ = {set, read, reads / 2, sum, dests.count};
      for (int64_t i = 0; i < reads; ++i) {
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

  // Pixels that go through each step together, in blocks of 32, have their rows in a cache of a core.
  int64_t blocks_at_once(const Products& products, int64_t pixels) const {
    constexpr int64_t bytes = 256 << 10, most = 8;
    const int64_t fit = larger(bytes / (2 * sources_.bytes() + sums_ * row_register), int64_t{1});
    const int64_t wanted = products.one_block_at_a_time() ? 1 : smaller(most, fit);
    return smaller(wanted, divide_up(pixels, span));
  }

  // Whether the sums hold.
  bool run_piece(const Products& products, int64_t n, int64_t first, int64_t end) const {
    const int64_t at_once = blocks_at_once(products, end - first);
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

    typename Products::Run run(products);
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
      run.fetch_meanwhile(lines_between(n, pixel, count, smaller(pixel + count + at_once * span, end)),
                          job.count);
      p_.residual.data ? multiply_blocks<true>(job, run) : multiply_blocks<false>(job, run);
      each_half(p_.dest, [&](Rows& rows, int64_t h, BFloat16* to, int64_t stride, int64_t left) {
        rows_to_pixels(rows.sums + h * row_part, dests_at_, p_.dest.channels, to, stride, left);
      });
    }
    return run.holds();
  }

  // Those of the `count` pixels from `pixel` on that are written next, and of the pixels behind them that are read then.
  FetchedLines lines_between(int64_t n, int64_t pixel, int64_t count, int64_t end) const {
    const int64_t numbers = larger(count * p_.dest.stride_w, (end - pixel - count) * p_.source.stride_w);
    return {reinterpret_cast<const char*>(p_.source.at(n, 0, 0, pixel + count)),
            reinterpret_cast<char*>(p_.dest.at(n, 0, 0, pixel)),
            numbers * static_cast<int64_t>(sizeof(BFloat16)) / line_bytes};
  }

  template <bool Adds>
  void multiply_blocks(const Job& job, typename Products::Run& run) const {
    const RowFinish<Adds> finish(*this);
    interleave(job, 0);
    for (int64_t i = 0; i < sets_ * job.count; ++i) {
      // What comes next, so that it is in cache and no longer on its way there when it is read.
      if (i + 1 < sets_ * job.count) interleave(job, i + 1);
      run.multiply(groups_[i / job.count], job.operands[i % 2], job.rows[i % job.count], finish);
    }
    run.finish_last(finish);
  }

  // The i-th: all blocks of pixels for a group, then for the next.
  void interleave(const Job& job, int64_t i) const {
    const RowGroup& group = groups_[i / job.count];
    const Rows& rows = job.rows[i % job.count];
    const int32_t* at = reads_at_ + group.first_read;
    char* to = job.operands[i % 2];
    for (const int32_t* end = at + 2 * group.pairs; at < end; at += 2, to += operand_row) {
      const __m512i first = load_two_rows(rows.sources[0] + at[0], rows.sources[1] + at[0]);
      const __m512i second = load_two_rows(rows.sources[0] + at[1], rows.sources[1] + at[1]);
      _mm512_store_si512(to, _mm512_unpacklo_epi16(first, second));
      _mm512_store_si512(to + operand_row / 2, _mm512_unpackhi_epi16(first, second));
    }
  }

  // Sums of a destination to its row, for the two times 16 columns: bias, residual, activation, rounded.
  template <bool Adds>
  class RowFinish {
   public:
    explicit RowFinish(const PixelRowsConvolution& of)
        : bias_(of.bias_),
          residuals_at_(of.residuals_at_),
          others_(of.finish_),
          low_(V_::broadcast(of.finish_.range.low)),
          high_(V_::broadcast(of.finish_.range.high)) {}

    GROUPCONV_INLINE void operator()(const Rows& rows, int64_t sum, V_ (&x)[2]) const {
      const V_ bias = V_::broadcast(bias_[sum]);
      x[0] = x[0] + bias;
      x[1] = x[1] + bias;
      if constexpr (Adds) {
        const int64_t at = residuals_at_[sum];
        const __m512i residual = load_two_rows(rows.residuals[0] + at, rows.residuals[1] + at);
        const __m512i zeros = _mm512_setzero_si512();
        x[0] = x[0] + V_{_mm512_castsi512_ps(_mm512_unpacklo_epi16(zeros, residual))};
        x[1] = x[1] + V_{_mm512_castsi512_ps(_mm512_unpackhi_epi16(zeros, residual))};
      }
      if (is_clamp(others_.activation)) {
        x[0] = clamp(low_, high_, x[0]);
        x[1] = clamp(low_, high_, x[1]);
      } else {
        activate(x);
      }
      const __m512bh words = _mm512_cvtne2ps_pbh(x[1].v, x[0].v);
      __m512i bits;
      std::memcpy(&bits, &words, sizeof bits);
      const __m512i by_fours = _mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7);
      _mm512_store_si512(rows.sums + sum_at(sum), _mm512_permutexvar_epi64(by_fours, bits));
    }

   private:
    void activate(V_ (&x)[2]) const {
      float numbers[span];
      x[0].store(numbers);
      x[1].store(numbers + V_::lanes);
      finish_run(others_, numbers, 1, static_cast<const float*>(nullptr), numbers, 1, span);
      x[0] = V_::load(numbers);
      x[1] = V_::load(numbers + V_::lanes);
    }

    const float* bias_;
    const int32_t* residuals_at_;
    Finish<float> others_;  // than clamps
    V_ low_, high_;
  };

  const ConvolveProblem<BFloat16>& p_;
  Sides<BFloat16> sides_;
  Finish<float> finish_;
  PixelRows sources_, residuals_;
  int64_t batch_, pixels_;  // of one row each
  int64_t sets_ = 0;
  int64_t reads_ = 0, most_reads_ = 0, sums_ = 0;  // of a pixel, and of a group of it
  RowGroup* groups_ = nullptr;
  int32_t *reads_at_ = nullptr, *dests_at_ = nullptr;  // rows of each read, and of each channel of dest
  int32_t* residuals_at_ = nullptr;                    // rows of each sum
  float* bias_ = nullptr;                              // of each sum
};

}  // namespace
}  // namespace groupconv::cpu
