// Hopper's products of matrices by warp-groups, four neighbouring warps each. They run on while the threads do,
// read both factors from shared memory by descriptor (swizzled.cuh) and add to registers of the group's threads.
//
// They exist in code for sm_90a alone; GROUPCONV_WGMMA says whether this is such code. The tests have a file of
// this name that does the same on a CPU (python_tests/cuda_on_cpu/cuda).
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define GROUPCONV_WGMMA 1
#else
#define GROUPCONV_WGMMA 0
#endif

namespace groupconv::cuda {

#if GROUPCONV_WGMMA

// Shows what this thread stored in shared memory, or has waited for a copy of, to the products; other threads'
// products after a barrier.
__device__ inline void show_to_products() { asm volatile("fence.proxy.async.shared::cta;\n" ::: "memory"); }

// Before the first product on registers that were used for something else.
__device__ inline void begin_products() { asm volatile("wgmma.fence.sync.aligned;\n" ::: "memory"); }

__device__ inline void commit_products() { asm volatile("wgmma.commit_group.sync.aligned;\n" ::: "memory"); }

// Until at most `Left` of the latest commits are still under way. The sums may be read and the factors
// overwritten, the latter after a barrier, when all products on them have ended; they go in and out, so that
// nothing is done to them before.
template <int Left, int Count>
__device__ void wait_products(float (&sums)[Count]) {
#pragma unroll
  for (int i = 0; i < Count; ++i) asm volatile("" : "+f"(sums[i])::"memory");
  asm volatile("wgmma.wait_group.sync.aligned %0;\n" ::"n"(Left) : "memory");
#pragma unroll
  for (int i = 0; i < Count; ++i) asm volatile("" : "+f"(sums[i])::"memory");
}

// sums [64][N] (+)= a [64][16] · b [16][N]: added where `adds`, else in their place. Both factors lie with what is
// summed over next to each other, a with `ATransposed` with its lines. Thread t of the group has of the sums
// (16 (t / 32) + t % 32 / 4, 2 (t % 4) + {0, 1}), the same eight rows on, then all that eight columns on, …
#define GROUPCONV_EIGHT_SUMS(i)                                                              \
  "+f"(sums[i]), "+f"(sums[i + 1]), "+f"(sums[i + 2]), "+f"(sums[i + 3]), "+f"(sums[i + 4]), \
      "+f"(sums[i + 5]), "+f"(sums[i + 6]), "+f"(sums[i + 7])
#define GROUPCONV_PRODUCT_64(type)                                                                           \
  asm volatile(                                                                                              \
      "{\n.reg .pred adds;\nsetp.ne.b32 adds, %34, 0;\n"                                                     \
      "wgmma.mma_async.sync.aligned.m64n64k16.f32." type "." type                                            \
      " {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, "    \
      "%21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, %32, %33, adds, 1, 1, %35, 0;\n}\n"           \
      : GROUPCONV_EIGHT_SUMS(0), GROUPCONV_EIGHT_SUMS(8), GROUPCONV_EIGHT_SUMS(16), GROUPCONV_EIGHT_SUMS(24) \
      : "l"(a), "l"(b), "r"(static_cast<int>(adds)), "n"(ATransposed ? 1 : 0)                                \
      : "memory")
#define GROUPCONV_PRODUCT_128(type)                                                                          \
  asm volatile(                                                                                              \
      "{\n.reg .pred adds;\nsetp.ne.b32 adds, %66, 0;\n"                                                     \
      "wgmma.mma_async.sync.aligned.m64n128k16.f32." type "." type                                           \
      " {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, "    \
      "%21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, " \
      "%41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, " \
      "%61, %62, %63}, %64, %65, adds, 1, 1, %67, 0;\n}\n"                                                   \
      : GROUPCONV_EIGHT_SUMS(0), GROUPCONV_EIGHT_SUMS(8), GROUPCONV_EIGHT_SUMS(16),                          \
        GROUPCONV_EIGHT_SUMS(24), GROUPCONV_EIGHT_SUMS(32), GROUPCONV_EIGHT_SUMS(40),                        \
        GROUPCONV_EIGHT_SUMS(48), GROUPCONV_EIGHT_SUMS(56)                                                   \
      : "l"(a), "l"(b), "r"(static_cast<int>(adds)), "n"(ATransposed ? 1 : 0)                                \
      : "memory")

template <bool ATransposed>
__device__ void multiply_async(float (&sums)[32], uint64_t a, uint64_t b, bool adds, __half) {
  GROUPCONV_PRODUCT_64("f16");
}
template <bool ATransposed>
__device__ void multiply_async(float (&sums)[32], uint64_t a, uint64_t b, bool adds, __nv_bfloat16) {
  GROUPCONV_PRODUCT_64("bf16");
}
template <bool ATransposed>
__device__ void multiply_async(float (&sums)[64], uint64_t a, uint64_t b, bool adds, __half) {
  GROUPCONV_PRODUCT_128("f16");
}
template <bool ATransposed>
__device__ void multiply_async(float (&sums)[64], uint64_t a, uint64_t b, bool adds, __nv_bfloat16) {
  GROUPCONV_PRODUCT_128("bf16");
}

#undef GROUPCONV_PRODUCT_128
#undef GROUPCONV_PRODUCT_64
#undef GROUPCONV_EIGHT_SUMS

#endif

}  // namespace groupconv::cuda
