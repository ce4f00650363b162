// Rows of 32 pixels multiplied by matrix registers, for convolve_pixel_rows.h: sums of 32 destinations at a time, four
// registers. Weights are left operands (matrix_weights.h), groups filled up to 32 channels; neighbouring groups of few
// channels share registers (group_sets.h).
#pragma once

#include "cpu/drivers/convolve_pixel_rows.h"
#include "cpu/staging/matrix_weights.h"
#include "cpu/staging/unstage.h"
#include "cpu/vector/sums_seen.h"

namespace groupconv::cpu {
namespace {

class MatrixRowProducts {
  using V_ = Vec<float>;
  static constexpr int64_t span = 2 * block_rows;  // pixels, and destinations
  static_assert(span == RowsOfPixels::pixels);

 public:
  static constexpr int64_t sources_together = block_depth;

  static bool suits(const ConvolveProblem<BFloat16>& p) { return fills_registers(Sides(p), block_rows); }
  template <class Body>
  static void for_each(const Sides<BFloat16>& sides, const Body& body) {
    for_each_set(sides, body);
  }

  explicit MatrixRowProducts(const Sides<BFloat16>& sides) : weights_(sides) {
    for_each_set(sides, [&](const GroupSet& set) { joins_ = joins_ || set.joins(); });
  }

  // A group's weights serve as many blocks as there may be.
  static bool one_block_at_a_time() { return false; }

  // What a thread multiplies. Sums wait to be finished until those behind them are multiplied.
  class Run {
   public:
    explicit Run(const MatrixRowProducts& of) : of_(of) {}

    // Fetching ahead makes it slower (benches/NOTES.md).
    void fetch_meanwhile(const FetchedLines&, int64_t) {}

    template <class Finish>
    void multiply(const RowGroup& group, const char* operands, const RowsOfPixels& rows,
                  const Finish& finish) {
      const int64_t depth = 2 * group.pairs / block_depth;
      for (int64_t row = 0; row < group.dests; row += span) {
        const bool wide = row + block_rows < group.dests;
        const BFloat16* upper = of_.weights_.of(group.set, row);
        if (wide) {
          multiply_registers_of<true>(upper, of_.weights_.of(group.set, row + block_rows), depth, operands);
        } else {
          multiply_registers_of<false>(upper, upper, depth, operands);
        }
        finish_last(finish);  // the sums before, while these are multiplied
        constexpr int64_t distance = span * sizeof(float);
        store_register<0>(sums_, distance);
        store_register<1>(sums_ + block_cols, distance);
        if (wide) {
          store_register<2>(sums_ + block_rows * span, distance);
          store_register<3>(sums_ + block_rows * span + block_cols, distance);
        }
        rows_ = &rows;
        first_ = group.first_sum + row;
        count_ = smaller(span, group.dests - row);
      }
    }

    template <class Finish>
    void finish_last(const Finish& finish) {
      of_.joins_ ? finish_rows<true>(finish) : finish_rows<false>(finish);
    }

    // False where a sum was infinite or none and groups share registers, see sums_seen.h.
    bool holds() const { return seen_.all_finite(); }

   private:
    template <bool Looks, class Finish>
    GROUPCONV_INLINE void finish_rows(const Finish& finish) {
      const float* from = sums_;
      for (int64_t r = 0; r < count_; ++r, from += span) {
        V_ x[2] = {V_::load(from), V_::load(from + block_cols)};
        if constexpr (Looks) {
          seen_.look(x[1]);
          seen_.look(x[0]);
        }
        finish(*rows_, first_ + r, x);
      }
      count_ = 0;
    }

    // Registers 0 to 3 are sums, 4 and 5 weights, 6 and 7 pixels.
    template <bool Wide>
    static GROUPCONV_INLINE void multiply_registers_of(const BFloat16* upper, const BFloat16* lower,
                                                       int64_t depth, const char* operands) {
      constexpr int64_t operand_row = RowsOfPixels::operand_row;
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

    const MatrixRowProducts& of_;
    const MatrixRegisters registers_;
    alignas(64) float sums_[span * span];
    const RowsOfPixels* rows_ = nullptr;  // whose sums they are
    int64_t first_ = 0, count_ = 0;
    SumsSeen seen_;
  };

 private:
  MatrixWeights weights_;
  bool joins_ = false;  // groups share registers
};

}  // namespace
}  // namespace groupconv::cpu
