// Preloaded by test_scratch.py: what is allocated by aligned_alloc, as the kernels' scratch is and no tensor.
#include <dlfcn.h>
#include <malloc.h>
#include <stddef.h>

#include <mutex>
#include <unordered_map>

namespace {

std::mutex mutex;
size_t live = 0, peak = 0;

std::unordered_map<void*, size_t>& sizes() {
  static auto* map =
      new std::unordered_map<void*, size_t>;  // never destroyed: memory is freed after main as well
  return *map;
}

}  // namespace

extern "C" {

void* aligned_alloc(size_t alignment, size_t bytes) {
  void* memory = memalign(alignment, bytes);
  const std::lock_guard lock(mutex);
  if (memory) {
    sizes()[memory] = bytes;
    live += bytes;
    peak = live > peak ? live : peak;
  }
  return memory;
}

void free(void* memory) {
  using Free = void (*)(void*);
  static const Free next = reinterpret_cast<Free>(dlsym(RTLD_NEXT, "free"));
  static thread_local bool counting = false;  // the map itself frees memory
  if (memory && live > 0 && !counting) {
    counting = true;
    {
      const std::lock_guard lock(mutex);
      const auto found = sizes().find(memory);
      if (found != sizes().end()) {
        live -= found->second;
        sizes().erase(found);
      }
    }
    counting = false;
  }
  next(memory);
}

size_t scratch_peak() { return peak; }
void scratch_forget() { peak = live; }
}
