#include "cpu/scratch.h"

#include <cstdlib>
#include <new>

namespace groupconv::cpu {
namespace {

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
    if (bytes > PTRDIFF_MAX - 4096) throw std::bad_alloc();
    buffer.release();
    const size_t rounded = (bytes + 4095) / 4096 * 4096;
    buffer.memory = std::aligned_alloc(64, rounded);
    if (!buffer.memory) throw std::bad_alloc();
    buffer.bytes = rounded;
  }
  return buffer.memory;
}

void release_scratch() {
  if (buffer.bytes > scratch_keep) buffer.release();
}

}  // namespace groupconv::cpu
