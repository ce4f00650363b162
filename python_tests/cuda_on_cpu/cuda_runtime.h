// Just enough of CUDA's language to run our kernels on a CPU, for machines without a GPU.
//
// A block's threads are fibers that take turns: one runs until it reaches a barrier or its end, then the
// next. Taking the turns in both directions shows a missing barrier, which a real GPU may hide.
#pragma once

#include <ucontext.h>

#include <cstddef>
#include <functional>
#include <memory>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __shared__ static  // one block at a time
#define __launch_bounds__(threads)

struct Index {
  unsigned x = 0;
};
inline Index threadIdx, blockIdx, gridDim;

namespace cuda_on_cpu {

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  bool finished = false;
};

inline ucontext_t scheduler;
inline std::vector<Fiber> fibers;
inline std::function<void()> body;
inline bool ballot, ballot_result;

inline void wait() {
  const unsigned me = threadIdx.x;
  swapcontext(&fibers[me].context, &scheduler);
  threadIdx.x = me;
}

inline void enter() {
  const unsigned me = threadIdx.x;
  body();
  fibers[me].finished = true;
  swapcontext(&fibers[me].context, &scheduler);
}

// Each fiber once, up to its next barrier; false when all have finished.
inline bool run_to_barrier(bool backwards) {
  bool running = false;
  ballot = true;
  for (size_t i = 0; i < fibers.size(); ++i) {
    const size_t thread = backwards ? fibers.size() - 1 - i : i;
    if (fibers[thread].finished) continue;
    threadIdx.x = static_cast<unsigned>(thread);
    swapcontext(&scheduler, &fibers[thread].context);
    running |= !fibers[thread].finished;
  }
  ballot_result = ballot;
  return running;
}

template <class Kernel>
void launch(unsigned blocks, unsigned threads, bool backwards, Kernel kernel) {
  constexpr size_t stack_bytes = 64 << 10;
  gridDim.x = blocks;
  body = kernel;
  for (blockIdx.x = 0; blockIdx.x < blocks; ++blockIdx.x) {
    fibers = std::vector<Fiber>(threads);
    for (Fiber& fiber : fibers) {
      fiber.stack = std::make_unique<char[]>(stack_bytes);
      getcontext(&fiber.context);
      fiber.context.uc_stack.ss_sp = fiber.stack.get();
      fiber.context.uc_stack.ss_size = stack_bytes;
      makecontext(&fiber.context, enter, 0);
    }
    while (run_to_barrier(backwards)) {
    }
  }
}

}  // namespace cuda_on_cpu

inline void __syncthreads() { cuda_on_cpu::wait(); }

inline bool __syncthreads_and(bool vote) {
  cuda_on_cpu::ballot &= vote;
  cuda_on_cpu::wait();
  return cuda_on_cpu::ballot_result;
}

inline unsigned long long atomicAdd(unsigned long long* address, unsigned long long value) {
  const unsigned long long before = *address;
  *address += value;
  return before;
}
