#include "cpu/processor/caches.h"

#include <unistd.h>

#include <algorithm>
#include <fstream>

namespace groupconv::cpu {
namespace {

int64_t ask([[maybe_unused]] int level, int64_t otherwise) {
#if defined(_SC_LEVEL1_DCACHE_SIZE) && defined(_SC_LEVEL2_CACHE_SIZE) && defined(_SC_LEVEL3_CACHE_SIZE)
  const int names[] = {_SC_LEVEL1_DCACHE_SIZE, _SC_LEVEL2_CACHE_SIZE, _SC_LEVEL3_CACHE_SIZE};
  const int64_t bytes = sysconf(names[level - 1]);
  if (bytes > 0) return bytes;
#endif
  return otherwise;
}

// As the kernel knows it, or 0: on a virtual EPYC of 32 MiB the C library says 320.
int64_t shared_cache() {
  std::ifstream file("/sys/devices/system/cpu/cpu0/cache/index3/size");
  int64_t kibibytes = 0;
  char unit = 0;
  return file >> kibibytes >> unit && unit == 'K' ? kibibytes << 10 : 0;
}

// On a Xeon that was measured, lines come from the shared cache little faster than from memory, and stores
// past it pay from the core's own cache on; rows of weights are there in time. On a Zen 4 a layer and the next one,
// which reads its result, are together faster with stores past it from a sixth of it on, and a network waits for the
// weights of every eight rows. Nobody measured others.
bool is_like_xeon() {
#if defined(GROUPCONV_X86)
  return __builtin_cpu_is("intel");
#else
  return false;
#endif
}

// On a Zen 4, which moves half a line in a cycle between both, rows of pixels that stay in the nearest one make up for
// tiles of registers a third as wide. On a Xeon that was measured, which moves a line and has half as much again of the
// nearest one, they do not.
bool own_cache_is_slow() {
#if defined(GROUPCONV_X86)
  return __builtin_cpu_is("amd");
#else
  return false;
#endif
}

Caches find() {
  const int64_t nearest = ask(1, int64_t{32} << 10);
  const int64_t own = ask(2, int64_t{1} << 20);
  const int64_t known = shared_cache(), shared = known > 0 ? known : ask(3, int64_t{32} << 20);
  const bool xeon = is_like_xeon();
  return {nearest, own, xeon ? own : std::max(own, shared / 6), own_cache_is_slow(), xeon};
}

}  // namespace

const Caches& caches() {
  static const Caches found = find();
  return found;
}

}  // namespace groupconv::cpu
