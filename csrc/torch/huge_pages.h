// Large new tensors ask for huge pages before anything touches them.
//
// glibc gives the memory of a freed large tensor back, so the next one faults in again, page by page: at 4 KiB
// that takes longer than a 1×1 convolution takes to fill it. Where the system leaves the choice to the program
// (`madvise`, what most distributions ship), one call makes it a fault for every 2 MiB. It is a hint about the
// tensor's own pages: nothing grows, and where it means nothing nothing happens.
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace groupconv::ops {

inline void ask_for_huge_pages([[maybe_unused]] void* data, [[maybe_unused]] size_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr size_t worthwhile = 4 << 20;  // holds a whole huge page wherever it begins
  if (bytes < worthwhile) return;
  static const auto page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
  const auto begin = reinterpret_cast<uintptr_t>(data);
  const uintptr_t first = (begin + page - 1) / page * page, last = (begin + bytes) / page * page;
  madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}

}  // namespace groupconv::ops
