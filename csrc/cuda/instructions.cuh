// The instructions that CUDA C++ has no words for: matrices from shared memory to registers, products of
// matrices, copies that run on while the thread does. From sm_80 up.
//
// The tests have a file of this name that does the same on a CPU (python_tests/cuda_on_cpu/cuda).
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace groupconv::cuda {

// The shared memory that was asked for at launch.
__device__ inline char* dynamic_shared() {
  extern __shared__ __align__(16) char memory[];
  return memory;
}

__device__ inline unsigned shared_address(const void* pointer) {
  return static_cast<unsigned>(__cvta_generic_to_shared(pointer));
}

// Sixteen bytes from global to shared memory, zeros where they do not exist; both addresses are multiples
// of sixteen. They are there when wait_copies says so, for this thread, and after a barrier for all.
__device__ inline void copy_16_async(void* to, const void* from, bool exists) {
  // The instruction wants an aligned address also where it reads nothing from it.
  const uintptr_t aligned = reinterpret_cast<uintptr_t>(from) & ~uintptr_t{15};
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(shared_address(to)), "l"(aligned),
               "r"(exists ? 16 : 0));
}
__device__ inline void commit_copies() { asm volatile("cp.async.commit_group;\n"); }
// Until at most `Left` of the latest commits are still under way.
template <int Left>
__device__ void wait_copies() {
  asm volatile("cp.async.wait_group %0;\n" ::"n"(Left) : "memory");
}

// Sixteen bytes to shared memory, there at once for this thread and after a barrier for all.
template <class SixteenBytes>
__device__ void store_16(void* to, const SixteenBytes& from) {
  static_assert(sizeof(SixteenBytes) == 16);
  *static_cast<SixteenBytes*>(to) = from;
}

// Four 8 × 8 matrices of 16-bit elements. Lane l brings the address of row l % 8 of matrix l / 8, and gets,
// of every matrix, elements 2 (l % 4) and 2 (l % 4) + 1 of row l / 4; transposed, of column l / 4.
__device__ inline void load_matrices(unsigned (&to)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(shared_address(row))
               : "memory");
}
__device__ inline void load_matrices_transposed(unsigned (&to)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(shared_address(row))
               : "memory");
}

// sums [16][8] += a [16][16] · b [16][8]. Lane l has of sums (l / 4, 2 (l % 4) + {0, 1}), then the same of
// row l / 4 + 8; of a the pairs of columns 2 (l % 4) in rows l / 4 and l / 4 + 8, then the same eight columns
// on; of b the pairs of rows 2 (l % 4) and eight on in column l / 4.
__device__ inline void multiply(float (&sums)[4], const unsigned (&a)[4], unsigned b0, unsigned b1,
                                __nv_bfloat16) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};\n"
      : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
__device__ inline void multiply(float (&sums)[4], const unsigned (&a)[4], unsigned b0, unsigned b1, __half) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};\n"
      : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ inline unsigned bits_of(float x) { return __float_as_uint(x); }

// The same over eight elements in TF32, to which the floats are rounded here: of a columns l % 4 and four on in
// rows l / 4 and l / 4 + 8, of b rows l % 4 and four on in column l / 4.
__device__ inline unsigned round_to_tf32(unsigned bits) {
  unsigned rounded;
  asm("cvt.rna.tf32.f32 %0, %1;\n" : "=r"(rounded) : "f"(__uint_as_float(bits)));
  return rounded;
}
__device__ inline void multiply(float (&sums)[4], const unsigned (&a)[4], unsigned b0, unsigned b1, float) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};\n"
      : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
      : "r"(round_to_tf32(a[0])), "r"(round_to_tf32(a[1])), "r"(round_to_tf32(a[2])),
        "r"(round_to_tf32(a[3])), "r"(round_to_tf32(b0)), "r"(round_to_tf32(b1)));
}

}  // namespace groupconv::cuda
