// Between rows of scratch, which have gaps where an image has none, and an image's pixels, which follow each other:
// for each vector of scratch which of its lanes are pixels, and how many pixels come before it. One permutation a
// vector then takes out the gaps on the way to the image, or puts them in on the way from it, wherever rows end.
#pragma once

#include "cpu/vector/vec.h"

namespace groupconv::cpu {
namespace {

struct GapVector {
  uint32_t lanes;  // a bit for each
  int32_t before;
};

// The vectors of rows `pitch` long of which the columns [begin, end) are pixels.
template <class T>
void list_gaps(GapVector* gaps, int64_t vectors, int64_t pitch, int64_t begin, int64_t end) {
  int32_t before = 0;
  int64_t col = 0;
  for (int64_t v = 0; v < vectors; ++v) {
    uint32_t lanes = 0;
    for (int64_t lane = 0; lane < Vec<T>::lanes; ++lane) {
      lanes |= static_cast<uint32_t>(begin <= col && col < end) << lane;
      if (++col == pitch) col = 0;
    }
    gaps[v] = {lanes, before};
    before += __builtin_popcount(lanes);
  }
}

}  // namespace
}  // namespace groupconv::cpu
