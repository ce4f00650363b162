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

thread_local Buffer buffer;

}  // namespace

void* thread_scratch(size_t bytes) {
  if (bytes > buffer.bytes) {
    buffer.release();
    buffer.memory = allocate(bytes);
    buffer.bytes = bytes;
  }
  return buffer.memory;
}

ScratchUse::~ScratchUse() {
  if (buffer.bytes > scratch_keep) buffer.release();
}

SharedScratch::SharedScratch(size_t bytes) : memory_(allocate(bytes)) {}
SharedScratch::~SharedScratch() { std::free(memory_); }

}  // namespace groupconv::cpu
