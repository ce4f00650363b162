#include "torch/threads.h"

#include <pthread.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>

#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

namespace groupconv::ops {
namespace {

// A pool does not survive a fork: a child that waited for its threads would wait forever.
std::atomic<bool> forked{false};
[[maybe_unused]] const int watching = pthread_atfork(nullptr, nullptr, [] { forked = true; });

// A worker flushes denormals exactly when its caller does.
#if defined(__x86_64__)
unsigned flush_mode() { return _mm_getcsr(); }
void set_flush_mode(unsigned mode) { _mm_setcsr(mode); }
#else
unsigned flush_mode() { return 0; }
void set_flush_mode(unsigned) {}
#endif

void run(int64_t items, void (*body)(void*, int64_t), void* context) {
  std::atomic<int64_t> next{0};
  const unsigned mode = flush_mode();
  const int64_t workers = std::min<int64_t>(items, torch::stable::get_num_threads());
  torch::stable::parallel_for(0, workers, 1, [&](int64_t begin, int64_t end) {
    const unsigned own_mode = flush_mode();
    set_flush_mode(mode);
    for (; begin < end; ++begin) {
      for (int64_t item = next++; item < items; item = next++) body(context, item);
    }
    set_flush_mode(own_mode);
  });
}

}  // namespace

cpu::Threads torch_threads() {
  if (forked) return {1, run};  // the same pieces as elsewhere, and so the same bits
  return {static_cast<int64_t>(torch::stable::get_num_threads()), run};
}

}  // namespace groupconv::ops
