#include "torch/threads.h"

#include <pthread.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <exception>
#include <mutex>

#include "cpu/scratch.h"

#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

namespace groupconv::ops {
namespace {

// A pool does not survive a fork: a child that waited for its threads would wait forever.
// Whether a pool was made since then cannot be asked, so a forked process stays on one thread for good.
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

// The caller's mode, while it lasts.
class BorrowedFlushMode {
 public:
  explicit BorrowedFlushMode(unsigned mode) : own_(flush_mode()) { set_flush_mode(mode); }
  BorrowedFlushMode(const BorrowedFlushMode&) = delete;
  ~BorrowedFlushMode() { set_flush_mode(own_); }

 private:
  unsigned own_;
};

void run(int64_t items, void (*body)(void*, int64_t), void* context) {
  std::atomic<int64_t> next{0};
  // Through torch's interface an exception would come without its text, so it goes around it.
  std::exception_ptr error;
  std::mutex error_mutex;
  const unsigned mode = flush_mode();
  const int64_t workers = std::min<int64_t>(items, torch::stable::get_num_threads());
  torch::stable::parallel_for(0, workers, 1, [&](int64_t begin, int64_t end) {
    const BorrowedFlushMode borrowed(mode);
    const cpu::ScratchUse scratch;
    try {
      for (; begin < end; ++begin) {
        // Neighbours are taken together, fewer and fewer towards the end: what lies side by side stays with one core,
        // whose prefetching would else take lines away from another that writes them.
        for (int64_t item = next; item < items;) {
          const int64_t last = item + std::max<int64_t>((items - item) / (4 * workers), 1);
          if (!next.compare_exchange_weak(item, last)) continue;
          for (; item < last; ++item) body(context, item);
          item = next;
        }
      }
    } catch (...) {
      next = items;
      const std::lock_guard lock(error_mutex);
      if (!error) error = std::current_exception();
    }
  });
  if (error) std::rethrow_exception(error);
}

}  // namespace

cpu::Threads torch_threads() {
  if (forked) return {1, run};  // the same pieces as elsewhere, and so the same bits
  return {static_cast<int64_t>(torch::stable::get_num_threads()), run};
}

}  // namespace groupconv::ops
