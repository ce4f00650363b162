// csrc/cuda/instructions.cuh on a CPU. Asynchronous copies are made as late as they may be, when a thread
// waits for them, and what they will overwrite is garbage from their start on: so is a tile that is read too
// early, and one that is still read when the next takes its place.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

namespace groupconv::cuda {

inline char* dynamic_shared() {
  char* memory = cuda_on_cpu::dynamic_memory.data();
  return memory + (16 - reinterpret_cast<uintptr_t>(memory) % 16) % 16;
}

inline unsigned shared_address(const void* pointer) {
  return static_cast<unsigned>(static_cast<const char*>(pointer) - cuda_on_cpu::shared_window());
}

inline void check_aligned(const void* address) {
  if (reinterpret_cast<uintptr_t>(address) % 16 != 0) cuda_on_cpu::fail("an address is no multiple of 16");
}

inline void copy_16_async(void* to, const void* from, bool exists) {
  check_aligned(to);
  if (exists) check_aligned(from);
  std::memset(to, cuda_on_cpu::garbage, 16);
  cuda_on_cpu::me().copies.back().push_back([=] {
    exists ? (void)std::memcpy(to, from, 16) : (void)std::memset(to, 0, 16);
    cuda_on_cpu::note_written(to);
  });
}
template <class SixteenBytes>
void store_16(void* to, const SixteenBytes& from) {
  static_assert(sizeof(SixteenBytes) == 16);
  check_aligned(to);
  *static_cast<SixteenBytes*>(to) = from;
  cuda_on_cpu::note_written(to);
}
inline void commit_copies() { cuda_on_cpu::me().copies.emplace_back(); }

template <int Left>
void wait_copies() {
  auto& copies = cuda_on_cpu::me().copies;  // the last group is not committed yet
  while (copies.size() > Left + 1) {
    for (const auto& copy : copies.front()) copy();
    copies.erase(copies.begin());
  }
}

inline void load_matrices_as(unsigned (&to)[4], const void* row, bool transposed) {
  check_aligned(row);
  const unsigned lane = threadIdx.x % 32;
  const auto rows = cuda_on_cpu::bring(row);
  for (unsigned matrix = 0; matrix < 4; ++matrix) {
    uint16_t pair[2];
    for (unsigned i = 0; i < 2; ++i) {
      const unsigned r = transposed ? lane % 4 * 2 + i : lane / 4,
                     c = transposed ? lane / 4 : lane % 4 * 2 + i;
      pair[i] = static_cast<const uint16_t*>(rows[matrix * 8 + r])[c];
    }
    std::memcpy(&to[matrix], pair, sizeof pair);
  }
}
inline void load_matrices(unsigned (&to)[4], const void* row) { load_matrices_as(to, row, false); }
inline void load_matrices_transposed(unsigned (&to)[4], const void* row) { load_matrices_as(to, row, true); }

template <class T>
void multiply(float (&sums)[4], const unsigned (&a)[4], unsigned b0, unsigned b1, T) {
  struct Fragments {
    T a[4][2], b[2][2];
  } mine;
  std::memcpy(mine.a, a, sizeof mine.a);
  std::memcpy(mine.b[0], &b0, sizeof b0);
  std::memcpy(mine.b[1], &b1, sizeof b1);
  const unsigned lane = threadIdx.x % 32;
  const auto all = cuda_on_cpu::bring(mine);
  for (unsigned i = 0; i < 4; ++i) {
    const unsigned row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
    for (unsigned k = 0; k < 16; ++k) {
      const float left = all[row % 8 * 4 + k % 8 / 2].a[k / 8 * 2 + row / 8][k % 2];
      const float right = all[column * 4 + k % 8 / 2].b[k / 8][k % 2];
      sums[i] += left * right;
    }
  }
}

inline unsigned bits_of(float x) {
  unsigned bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

// To the nearest of eleven significant bits, halves away from zero.
inline float round_to_tf32(unsigned bits) {
  const unsigned rounded = (bits & 0x7f800000u) == 0x7f800000u ? bits : (bits + 0x1000u) & ~0x1fffu;
  float value;
  std::memcpy(&value, &rounded, sizeof value);
  return value;
}

inline void multiply(float (&sums)[4], const unsigned (&a)[4], unsigned b0, unsigned b1, float) {
  struct Fragments {
    float a[4], b[2];
  } mine;
  for (int i = 0; i < 4; ++i) mine.a[i] = round_to_tf32(a[i]);
  mine.b[0] = round_to_tf32(b0);
  mine.b[1] = round_to_tf32(b1);
  const unsigned lane = threadIdx.x % 32;
  const auto all = cuda_on_cpu::bring(mine);
  for (unsigned i = 0; i < 4; ++i) {
    const unsigned row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
    for (unsigned k = 0; k < 8; ++k) {
      sums[i] += all[row % 8 * 4 + k % 4].a[k / 4 * 2 + row / 8] * all[column * 4 + k % 4].b[k / 4];
    }
  }
}

}  // namespace groupconv::cuda
