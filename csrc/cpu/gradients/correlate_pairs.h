// What multiplies rows of a gradient by pairs of pixels of inputs, for weight_grad_pairs.h: 16 outputs' sums for 16
// inputs, and several taps or blocks of inputs.
#pragma once

#include "cpu/staging/lines_ahead.h"
#include "cpu/vector/matrix_registers.h"
#include "cpu/vector/pair.h"

namespace groupconv::cpu {
namespace {

constexpr int64_t block_sums = block_rows * block_cols;

// Where 16 inputs' pairs begin that some tap reads, and the sums of that tap.
struct RightOperand {
  int64_t pairs, sums;
};

// Places that follow each other and hold pixels of the gradient.
struct PlaceRun {
  int64_t first, pairs;
};

// Both images' part of what is multiplied next, fetched evenly by what is multiplied now.
struct ReadsAhead {
  LinesAhead input, grad;
  int64_t lines_a_run = 0;

  void share(int64_t runs) {
    lines_a_run = divide_up(input.lines() + grad.lines(), larger(runs, int64_t{1}));
  }
  GROUPCONV_INLINE void fetch() {
    for (int64_t i = 0; i < lines_a_run; ++i) {
      if (!input.fetch() && !grad.fetch()) return;
    }
  }
};

struct CorrelatePairsJob {
  const BFloat16* grads;  // of the first output
  int64_t grad_distance;
  int64_t outputs;              // 16 at most
  const Pair<BFloat16>* pairs;  // [pair][16 inputs]
  int64_t places;               // of all, a whole number of products
  const PlaceRun* runs;         // the same without what holds no pixel, where this is asked for
  int64_t run_count;
  ReadsAhead* ahead;  // fetched between runs
  float* sums;
  bool begins;  // nothing has been summed yet
};

}  // namespace
}  // namespace groupconv::cpu
