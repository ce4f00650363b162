// Scratch memory of a thread: a buffer, grown on demand, reused by every call, split by bumping.
#pragma once

#include <cstddef>
#include <cstdint>

namespace groupconv::cpu {

// At least `bytes`, 64-byte aligned, for the calling thread until its next call under the same ScratchUse.
// Throws std::runtime_error, with the size, where there is no memory.
void* thread_scratch(size_t bytes);

// A thread has one of these while it works on a call, and another, with a buffer of its own, while that calls
// kernels, which may do so once more. At its end a buffer beyond scratch_keep is given back; one within it is kept for the
// next call.
constexpr size_t scratch_keep = size_t{1} << 20;
constexpr int most_scratch_uses = 3;
struct ScratchUse {
  ScratchUse();
  ScratchUse(const ScratchUse&) = delete;
  ~ScratchUse();
};

// Memory that all threads of one call share, for what is prepared once: packed weights and their tables.
class SharedScratch {
 public:
  explicit SharedScratch(size_t bytes);
  ~SharedScratch();
  SharedScratch(const SharedScratch&) = delete;
  void* memory() const { return memory_; }

 private:
  void* memory_;
};

}  // namespace groupconv::cpu
