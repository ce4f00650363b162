// float32 to uint8: clamp(round(value · inverse_scale) + zero_point, 0, 255), with the conversions of rescale.h.
// Bound by what is read.
#pragma once

#include "cpu/for_each_item.h"
#include "cpu/products/rescale.h"

namespace groupconv::cpu {
namespace {

inline void quantize(const QuantizeProblem& problem) {
  constexpr int64_t piece = int64_t{1} << 16, vectors = 64;
  const float low = static_cast<float>(-problem.zero_point);
  const Rescaling to{low, low + 255.0f, problem.zero_point};
  for_each_item(problem.threads, divide_up(problem.count, piece), [&](int64_t item) {
    const int64_t end = smaller(problem.count, (item + 1) * piece);
    int64_t i = item * piece;
    for (; i + vectors <= end; i += vectors) {
      quantize_vectors(problem.source + i, problem.inverse_scale, to, problem.dest + i);
    }
    if (i == end) return;
    float last[vectors] = {};
    uint8_t bytes[vectors];
    std::memcpy(last, problem.source + i, static_cast<size_t>(end - i) * sizeof(float));
    quantize_vectors(last, problem.inverse_scale, to, bytes);
    std::memcpy(problem.dest + i, bytes, static_cast<size_t>(end - i));
  });
}

}  // namespace
}  // namespace groupconv::cpu
