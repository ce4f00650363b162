#include "cpu/scratch.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

namespace groupconv::cpu {
namespace {

void* allocate(size_t bytes) {
  void* memory = nullptr;
  if (bytes <= PTRDIFF_MAX - 4096) memory = std::aligned_alloc(64, (bytes + 4095) / 4096 * 4096);
  if (!memory) throw std::runtime_error("no memory for " + std::to_string(bytes) + " bytes of scratch");
  return memory;
}

struct Buffer {
  void* memory = nullptr;
  size_t bytes = 0;

  void release() {
    std::free(memory);
    memory = nullptr;
    bytes = 0;
  }
  ~Buffer() { release(); }
};

struct Buffers {
  Buffer of_use[most_scratch_uses];
  int uses = 0;

  Buffer& current() { return of_use[uses - 1]; }
};
thread_local Buffers buffers;

}  // namespace

void* thread_scratch(size_t bytes) {
  Buffer& buffer = buffers.current();
  if (bytes > buffer.bytes) {
    buffer.release();
    buffer.memory = allocate(bytes);
    buffer.bytes = bytes;
  }
  return buffer.memory;
}

ScratchUse::ScratchUse() {
  if (buffers.uses == most_scratch_uses) throw std::logic_error("kernels are nested too deeply");
  ++buffers.uses;
}

ScratchUse::~ScratchUse() {
  if (buffers.current().bytes > scratch_keep) buffers.current().release();
  --buffers.uses;
}

SharedScratch::SharedScratch(size_t bytes) : memory_(bytes > 0 ? allocate(bytes) : nullptr) {}
SharedScratch::~SharedScratch() { std::free(memory_); }

}  // namespace groupconv::cpu
