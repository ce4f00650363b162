// How finished sums reach an image that is larger than a core's own caches.
//
// An ordinary store to a line that lies further away reads the line first, to change a part of it that is all
// of it. A tile's rows are two dozen such lines at once, more than a core keeps in flight, and the multiply-adds
// behind them wait. Two ways out, neither of which changes what is stored:
//   fetched   the lines are asked for when a tile begins, and have come when its sums are done;
//   streamed  past the caches, which neither read the line nor keep it: for whole lines, by kernels that compute
//             longer on a line than memory takes to write it.
#pragma once

#include "core/problem.h"
#include "cpu/processor/caches.h"
#include "cpu/vector/vec.h"

namespace groupconv::cpu {
namespace {

enum class Stores { plain, fetched, streamed };

constexpr int64_t line_bytes = 64;
template <class T>
constexpr bool fills_lines = Vec<T>::lanes * sizeof(T) == line_bytes;
template <>
constexpr bool fills_lines<BFloat16> = false;  // a vector of sums is half a line of them

// For sums of `depth` products each.
template <class T>
Stores stores_to(const Image<T>& dest, int64_t depth) {
  constexpr int64_t enough_depth = 32;
  const auto whole_lines = [](int64_t elements) {
    return elements * static_cast<int64_t>(sizeof(T)) % line_bytes == 0;
  };
  const int64_t elements = dest.batch * dest.channels * dest.height * dest.width;
  const int64_t bytes = elements * static_cast<int64_t>(sizeof(T));
  if (2 * bytes < caches().own) return Stores::plain;
  const bool streams = depth >= enough_depth && bytes >= caches().far && fills_lines<T> &&
                       whole_lines(dest.stride_n) && whole_lines(dest.stride_c) &&
                       reinterpret_cast<uintptr_t>(dest.data) % line_bytes == 0;
  return streams ? Stores::streamed : Stores::fetched;
}

// Streamed stores are in no order with others: after them, before another thread is told that a tile is done.
GROUPCONV_INLINE void finish_stores([[maybe_unused]] Stores stores) {
#if defined(__AVX512F__)
  if (stores == Stores::streamed) _mm_sfence();
#endif
}

}  // namespace
}  // namespace groupconv::cpu
