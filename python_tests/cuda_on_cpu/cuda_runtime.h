// Just enough of CUDA to run our kernels and launchers on a CPU, for machines without a GPU.
//
// A block's threads are fibers that take turns: one runs until it reaches a barrier or its end, then the
// next. Taking the turns in both directions shows a missing barrier, which a real GPU may hide. Threads of a warp that do something together (a shuffle, a product of matrices) leave what
// they bring in a place of their own, wait for the other 31, and take what they need: a warp that is not
// whole there ends the program. Shared memory holds garbage when a block begins: no NaN, since kernels
// compute again what is none.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <utility>
#include <vector>

#include "cuda_runtime_api.h"
#include "warp_group.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __noinline__
#define __align__(bytes) alignas(bytes)
#define __shared__ static  // one block at a time
#define __launch_bounds__(...)

struct Index {
  unsigned x = 0;
};
inline Index threadIdx, blockIdx, blockDim, gridDim;

namespace cuda_on_cpu {

constexpr unsigned warp_size = 32;
constexpr char garbage = 0x5a;  // of every type something large
constexpr size_t stack_bytes = 64 << 10;
constexpr size_t brought_bytes = 64;  // the most that a thread brings to a warp's common work

enum class State { ready, at_block_barrier, at_warp_barrier, finished };

struct Fiber {
  ucontext_t start;
  jmp_buf place;
  bool started = false;
  State state = State::ready;
  std::unique_ptr<char[]> stack = std::make_unique<char[]>(stack_bytes);
  alignas(16) char brought[2][brought_bytes];
  unsigned rounds = 0;  // of common work; what was brought before the last round is still read
  std::vector<std::vector<std::function<void()>>> copies = {{}};  // groups of asynchronous copies
  WarpGroupThread products;
};

inline jmp_buf scheduler;
inline std::vector<Fiber> fibers;
inline std::function<void()> body;
inline bool ballot, ballot_result;
inline std::vector<char> dynamic_memory;
inline std::vector<char> unshown;  // by sixteen bytes: written, and not shown to the asynchronous proxy since
inline bool backwards = false;     // the order in which threads take their turns
inline std::map<const void*, int64_t> launches;  // of every kernel

inline Fiber& me() { return fibers[threadIdx.x]; }

[[noreturn]] inline void fail(const char* what) {
  std::fprintf(stderr, "CUDA on CPU: %s\n", what);
  std::abort();
}

// Shared memory by its addresses there: it begins in the heap at the multiple of 1024 before dynamic_memory.
inline char* shared_window() {
  char* const memory = dynamic_memory.data();
  return memory - reinterpret_cast<uintptr_t>(memory) % 1024;
}
inline size_t shared_unit(const void* address) {
  return static_cast<size_t>(static_cast<const char*>(address) - shared_window()) / 16;
}
inline void note_written(void* sixteen_bytes) {
  me().products.written.push_back(shared_unit(sixteen_bytes));
  unshown.at(me().products.written.back()) = true;
}
inline void show_written() {
  for (const size_t unit : me().products.written) unshown[unit] = false;
  me().products.written.clear();
}
// For a product to read.
inline const char* shared_bytes(unsigned address, size_t count) {
  const char* const from = shared_window() + address;
  const char* const memory = dynamic_memory.data();
  if (from < memory || from + count > memory + dynamic_memory.size())
    fail("a product reads beyond its memory");
  if (unshown[shared_unit(from)]) fail("a product reads what was not shown to it");
  return from;
}

inline void stop(State state) {
  me().state = state;
  if (_setjmp(me().place) == 0) _longjmp(scheduler, 1);
}

inline void enter() {
  body();
  me().state = State::finished;
  _longjmp(scheduler, 1);
}

inline void resume(unsigned thread) {
  threadIdx.x = thread;
  if (_setjmp(scheduler) != 0) return;
  Fiber& fiber = fibers[thread];
  fiber.state = State::ready;
  if (fiber.started) _longjmp(fiber.place, 1);
  fiber.started = true;
  setcontext(&fiber.start);
}

// A warp's threads, until all have finished or wait for the block.
inline void run_warp(unsigned first, unsigned last) {
  for (bool together = true; together;) {
    unsigned waiting = 0;
    for (unsigned i = first; i < last; ++i) {
      const unsigned thread = backwards ? last - 1 - (i - first) : i;
      const State state = fibers[thread].state;
      if (state == State::ready || state == State::at_warp_barrier) resume(thread);
      waiting += fibers[thread].state == State::at_warp_barrier;
    }
    if (waiting != 0 && waiting != warp_size) fail("a warp does something together and is not whole");
    together = waiting != 0;
  }
}

inline void run_block(unsigned threads) {
  const unsigned warps = (threads + warp_size - 1) / warp_size;
  for (bool running = true; running;) {
    ballot = true;
    running = false;
    for (unsigned i = 0; i < warps; ++i) {
      const unsigned warp = backwards ? warps - 1 - i : i;
      run_warp(warp * warp_size, std::min(threads, (warp + 1) * warp_size));
    }
    unsigned waiting = 0;
    for (Fiber& fiber : fibers) {
      if (fiber.state != State::at_block_barrier) continue;
      fiber.state = State::ready;
      ++waiting;
    }
    if (waiting != 0 && waiting != threads) fail("some threads of a block left before a barrier");
    running = waiting != 0;
    ballot_result = ballot;
  }
}

inline void launch(unsigned blocks, unsigned threads, size_t shared_bytes, std::function<void()> kernel) {
  gridDim.x = blocks;
  blockDim.x = threads;
  body = std::move(kernel);
  if (fibers.size() != threads) fibers = std::vector<Fiber>(threads);
  for (blockIdx.x = 0; blockIdx.x < blocks; ++blockIdx.x) {
    dynamic_memory.assign(shared_bytes + 16, garbage);
    unshown.assign(shared_bytes / 16 + 66, false);
    started_products.assign(threads / warp_group_size + 1, {});
    for (Fiber& fiber : fibers) {
      fiber.started = false;
      fiber.state = State::ready;
      fiber.rounds = 0;
      fiber.copies.resize(1);
      fiber.copies.front().clear();
      fiber.products = {};
      getcontext(&fiber.start);
      fiber.start.uc_stack.ss_sp = fiber.stack.get();
      fiber.start.uc_stack.ss_size = stack_bytes;
      makecontext(&fiber.start, enter, 0);
    }
    run_block(threads);
    for (const Fiber& fiber : fibers) {
      if (!fiber.products.sums.empty()) fail("a block ended with products under way");
    }
  }
}

// What every thread of the warp brings, by lane; valid until the caller's next but one.
template <class T>
struct Brought {
  unsigned first, half;
  const T& operator[](unsigned lane) const {
    return *reinterpret_cast<const T*>(fibers[first + lane].brought[half]);
  }
};

template <class T>
Brought<T> bring(const T& mine) {
  static_assert(sizeof(T) <= brought_bytes);
  const unsigned half = me().rounds++ % 2;
  std::memcpy(me().brought[half], &mine, sizeof(T));
  stop(State::at_warp_barrier);
  return {threadIdx.x / warp_size * warp_size, half};
}

}  // namespace cuda_on_cpu

inline void __syncthreads() { cuda_on_cpu::stop(cuda_on_cpu::State::at_block_barrier); }
inline void __syncwarp() { cuda_on_cpu::bring(0); }

inline bool __syncthreads_and(bool vote) {
  cuda_on_cpu::ballot &= vote;
  __syncthreads();
  return cuda_on_cpu::ballot_result;
}
inline bool __syncthreads_or(bool vote) { return !__syncthreads_and(!vote); }

template <class T>
T __shfl_down_sync(unsigned, T value, int distance) {
  const auto all = cuda_on_cpu::bring(value);
  const unsigned lane = threadIdx.x % cuda_on_cpu::warp_size, from = lane + distance;
  return all[from < cuda_on_cpu::warp_size ? from : lane];
}

template <class T>
T atomicAdd(T* address, T value) {
  const T before = *address;
  *address += value;
  return before;
}
inline int atomicMin(int* address, int value) { return std::exchange(*address, std::min(*address, value)); }
inline int atomicMax(int* address, int value) { return std::exchange(*address, std::max(*address, value)); }

template <class T>
T __ldg(const T* address) {
  return *address;
}

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* configuration, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  const auto* const address = reinterpret_cast<const void*>(kernel);
  const int given = std::max(cuda_on_cpu::shared_bytes_of_kernels[address], cuda_on_cpu::modest_bytes);
  const int most = std::min(given, cuda_on_cpu::shared_bytes_of_a_block());
  if (configuration->dynamicSmemBytes > static_cast<size_t>(most)) return cudaErrorInvalidValue;
  ++cuda_on_cpu::launches[address];
  cuda_on_cpu::launch(configuration->gridDim.x, configuration->blockDim.x, configuration->dynamicSmemBytes,
                      [=] { kernel(arguments...); });
  return cudaSuccess;
}
