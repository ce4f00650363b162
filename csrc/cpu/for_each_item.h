// The loop over the caller's threads.
#pragma once

#include "cpu/kernels.h"
#include "cpu/scratch.h"

namespace groupconv::cpu {
namespace {

// Work worth several threads is cut into at least so many pieces, however many threads there are: where a
// tile ends decides how its last pixels are summed, and results must not depend on the machine's load.
constexpr int64_t pieces_for_threads = 8;

template <class Body>
void for_each_item(const Threads& threads, int64_t items, const Body& body) {
  const auto call = [](void* context, int64_t item) { (*static_cast<const Body*>(context))(item); };
  if (threads.count > 1 && items > 1) {
    threads.run(items, call, const_cast<void*>(static_cast<const void*>(&body)));
  } else {
    const ScratchUse scratch;
    for (int64_t item = 0; item < items; ++item) body(item);
  }
}

}  // namespace
}  // namespace groupconv::cpu
