// csrc/cuda/wgmma.cuh on a CPU.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#define GROUPCONV_WGMMA 1

namespace groupconv::cuda {

inline void show_to_products() { cuda_on_cpu::show_written(); }
inline void begin_products() {
  __syncwarp();
  cuda_on_cpu::me().products.fenced = true;
}
inline void commit_products() { cuda_on_cpu::me().products.groups.emplace_back(); }

template <int Left, int Count>
void wait_products(float (&)[Count]) {
  __syncwarp();
  cuda_on_cpu::finish_products(cuda_on_cpu::me().products, Left);
}

constexpr unsigned product_depth = 16;

// The lines of a factor that a thread's sums need.
template <class T>
std::vector<T> read_factor(const cuda_on_cpu::MatrixDescriptor& factor, const std::vector<unsigned>& lines,
                           bool k_major) {
  std::vector<T> elements(lines.size() * product_depth);
  const unsigned at_once = k_major ? 16 / sizeof(T) : 1;
  for (size_t i = 0; i < lines.size(); ++i) {
    for (unsigned k = 0; k < product_depth; k += at_once) {
      const char* from =
          cuda_on_cpu::shared_bytes(factor.address(lines[i], k, k_major, sizeof(T)), at_once * sizeof(T));
      std::memcpy(elements.data() + i * product_depth + k, from, at_once * sizeof(T));
    }
  }
  return elements;
}

template <bool ATransposed, class T, int Count>
void multiply_async(float (&sums)[Count], uint64_t a, uint64_t b, bool adds, T) {
  const unsigned thread = threadIdx.x % cuda_on_cpu::warp_group_size;
  if (blockDim.x % cuda_on_cpu::warp_group_size != 0) cuda_on_cpu::fail("a warp-group is not whole");
  const std::vector<unsigned> lines = {cuda_on_cpu::line_of_sum(thread, 0),
                                       cuda_on_cpu::line_of_sum(thread, 2)};
  std::vector<unsigned> columns;
  for (int i = 0; i < Count; i += 4) {
    columns.push_back(cuda_on_cpu::column_of_sum(thread, i));
    columns.push_back(cuda_on_cpu::column_of_sum(thread, i + 1));
  }
  const auto read = [=] {
    return std::pair(read_factor<T>(cuda_on_cpu::MatrixDescriptor(a), lines, !ATransposed),
                     read_factor<T>(cuda_on_cpu::MatrixDescriptor(b), columns, true));
  };
  const auto add = [read, adds, early = read()](std::vector<float>& results) {
    const auto& [left, right] = early;
    const auto late = read();
    if (std::memcmp(left.data(), late.first.data(), left.size() * sizeof(T)) != 0 ||
        std::memcmp(right.data(), late.second.data(), right.size() * sizeof(T)) != 0) {
      cuda_on_cpu::fail("a factor changed under a product");
    }
    for (int i = 0; i < Count; ++i) {
      const T* const line = left.data() + i / 2 % 2 * product_depth;
      const T* const column = right.data() + (i / 4 * 2 + i % 2) * product_depth;
      float sum = adds ? results[i] : 0;
      for (unsigned k = 0; k < product_depth; ++k) {
        sum += static_cast<float>(line[k]) * static_cast<float>(column[k]);
      }
      results[i] = sum;
    }
  };
  cuda_on_cpu::start_product(cuda_on_cpu::me().products, threadIdx.x,
                             {a, b, uint64_t{adds} | uint64_t{ATransposed} << 1 | uint64_t{Count} << 2}, sums,
                             Count, add);
}

}  // namespace groupconv::cuda
