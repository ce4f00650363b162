// Scratch memory of a thread: one buffer, grown on demand, reused by every call, split by bumping.
#pragma once

#include <cstddef>
#include <cstdint>

namespace groupconv::cpu {

// At least `bytes`, 64-byte aligned, private to the calling thread until its next call.
// A buffer beyond scratch_keep is released by release_scratch; one within it is kept for the next call.
constexpr size_t scratch_keep = size_t{1} << 20;
void* thread_scratch(size_t bytes);
void release_scratch();

}  // namespace groupconv::cpu
