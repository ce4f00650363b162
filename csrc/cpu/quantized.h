// What the kernels for uint8 images and int8 weights are given.
//
//   total = start[n] + Σ weight · input                                int32, exact
//   value = clamp(total · multiplier[n], low, high)                    a float32 output
//   round(value) + zero_point                                          a uint8 output, ties to even
//
// `start` holds the bias and what the input's zero point adds, −zero · Σ weight over all taps: so padding, which
// stands for 0.0, is the input's zero point. Nothing is added after the one multiplication in floating point, so
// that every instruction set gives the same result.
#pragma once

#include "core/quantized_layout.h"
#include "cpu/kernels.h"

namespace groupconv::cpu {

// The bounds are those of the value, before the zero point is added; of bytes they are whole numbers.
struct Rescaling {
  float low, high;
  int32_t zero_point = 0;
};

// Out: uint8_t or float.
template <class Out>
struct QuantizedProblem {
  Image<const uint8_t> source;
  uint8_t source_zero = 0;
  Image<Out> dest;
  const int8_t* weight = nullptr;  // as layout packs it
  const int32_t* start = nullptr;  // one per output channel, like multiplier
  const float* multiplier = nullptr;
  Rescaling output{};
  const QuantizedLayout* layout = nullptr;
  Window window;
  Threads threads;
};

// clamp(round(value · inverse_scale) + zero_point, 0, 255) of memory without gaps; NaN becomes 0.
struct QuantizeProblem {
  const float* source = nullptr;
  uint8_t* dest = nullptr;
  int64_t count = 0;
  float inverse_scale = 1.0f;
  int32_t zero_point = 0;
  Threads threads;
};

}  // namespace groupconv::cpu
