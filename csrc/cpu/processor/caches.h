// What kernels have to know of the processor's caches to choose how they store, what they keep and what they fetch.
#pragma once

#include <cstdint>

namespace groupconv::cpu {

struct Caches {
  int64_t nearest;    // L1, in bytes
  int64_t own;        // a core's largest one that is its own, in bytes
  int64_t far;        // what is written to more memory than that is best written past all caches
  bool own_is_slow;   // beside the nearest one: what stays there is worth narrower tiles of registers
  bool follows_rows;  // those that lie behind each other in memory come in time, unasked
};

const Caches& caches();

}  // namespace groupconv::cpu
