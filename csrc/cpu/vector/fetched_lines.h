// What a tile of registers fetches while it multiplies: lines that will be read and lines that will be written, no more at
// once than a core keeps in flight.
#pragma once

#include "cpu/vector/stores.h"
#include "cpu/vector/vec.h"

namespace groupconv::cpu {
namespace {

// How far ahead of itself what gathers pixels asks memory for more: numbers.
constexpr int64_t fetched_ahead = 1024;

constexpr int into_l2 = 2;  // as __builtin_prefetch calls it

struct FetchedLines {
  const char* read;
  char* written;
  int64_t per_tile;

  GROUPCONV_INLINE void fetch() {
    __builtin_prefetch(read, 0, into_l2);
    __builtin_prefetch(written, 1);
    read += line_bytes;
    written += line_bytes;
  }
};

}  // namespace
}  // namespace groupconv::cpu
