// multiply_quads by matrix registers: two runs of up to 16 pixels × 32 outputs at a time, where groups have enough
// sources to fill them.
//
// The packed weight is what a right operand looks like: a row for each quad, in it 16 outputs of four bytes. A left
// operand is a run of pixels where it lies, 4 · depth of a pixel's bytes in a row. Sums start from `start`, 16 rows of
// which are read from one place, and go through memory on their way out (rescale.h).
#pragma once

#include "cpu/products/rescale.h"
#include "cpu/vector/matrix_registers.h"

namespace groupconv::cpu {
namespace {

#if defined(GROUPCONV_MATRIX_REGISTERS)
constexpr bool has_byte_matrices = true;
#else
constexpr bool has_byte_matrices = false;
#endif

constexpr int64_t most_depth = register_row_bytes / quad;      // quads of a product
constexpr int64_t right_row_bytes = quad_lanes * quad;         // what a quad's weights are
constexpr int64_t right_bytes = most_depth * right_row_bytes;  // a full right operand
constexpr int64_t most_panel_blocks = 4;

// Runs of pixels × up to four blocks of outputs.
template <class Out>
struct QuadPanel {
  const uint8_t* sources[2];  // first pixel of each run, at the group's first byte
  Out* dests[2];
  int64_t runs, pixels;  // of each run
  int64_t pixel_stride, dest_stride;
  const int64_t* tap_offsets;  // [taps], bytes
  int64_t taps;
  int64_t quads;         // of a tap
  int64_t depth;         // quads of a product; the registers are made for it
  const int8_t* weight;  // [blocks][taps][quads][16 lanes][4]
  const int8_t* rest;    // [blocks][taps] operands, filled up with zeros: the quads beyond whole products
  const int32_t* start;
  const float* multiplier;
  Rescaling output;
  int64_t blocks;  // 1, 2 or 4
  int64_t last_lanes;
};

template <int Runs, int Blocks>
GROUPCONV_INLINE void multiply_step(const uint8_t* const (&from)[2], int64_t pixel_stride,
                                    const int8_t* weight, int64_t block_bytes) {
  load_register<4>(from[0], pixel_stride);
  load_register<6>(weight, right_row_bytes);
  multiply_bytes<0, 4, 6>();
  if constexpr (Blocks == 2) {
    load_register<7>(weight + block_bytes, right_row_bytes);
    multiply_bytes<1, 4, 7>();
  }
  if constexpr (Runs == 2) {
    load_register<5>(from[1], pixel_stride);
    multiply_bytes<2, 5, 6>();
    if constexpr (Blocks == 2) multiply_bytes<3, 5, 7>();
  }
}

// sums: [2][16 pixels][row_bytes].
template <int Runs, int Blocks, class Out>
void multiply_quad_blocks(const QuadPanel<Out>& panel, int64_t first_block, char* sums, int64_t row_bytes) {
  const int32_t* start = panel.start + first_block * quad_lanes;
  load_register<0>(start, 0);
  if constexpr (Blocks == 2) load_register<1>(start + quad_lanes, 0);
  if constexpr (Runs == 2) load_register<2>(start, 0);
  if constexpr (Runs * Blocks == 4) load_register<3>(start + quad_lanes, 0);

  const int64_t tap_bytes = panel.quads * right_row_bytes, block_bytes = panel.taps * tap_bytes;
  const int64_t products = panel.quads / panel.depth, product_bytes = panel.depth * right_row_bytes;
  const int8_t* weight = panel.weight + first_block * block_bytes;
  const int8_t* rest = panel.rest + (panel.rest ? first_block * panel.taps * right_bytes : 0);
  for (int64_t tap = 0; tap < panel.taps; ++tap, weight += tap_bytes) {
    const uint8_t* from[2] = {panel.sources[0] + panel.tap_offsets[tap],
                              panel.sources[1] + panel.tap_offsets[tap]};
    const int8_t* right = weight;
    for (int64_t i = 0; i < products; ++i, right += product_bytes) {
      multiply_step<Runs, Blocks>(from, panel.pixel_stride, right, block_bytes);
      from[0] += panel.depth * quad;
      from[1] += panel.depth * quad;
    }
    if (panel.rest) {
      multiply_step<Runs, Blocks>(from, panel.pixel_stride, rest, panel.taps * right_bytes);
      rest += right_bytes;
    }
  }

  char* const second = sums + block_rows * row_bytes;
  store_register<0>(sums, row_bytes);
  if constexpr (Blocks == 2) store_register<1>(sums + register_row_bytes, row_bytes);
  if constexpr (Runs == 2) store_register<2>(second, row_bytes);
  if constexpr (Runs * Blocks == 4) store_register<3>(second + register_row_bytes, row_bytes);
}

// A run's totals, [pixels][V · 16], leave. What is read in the loop is no one's but this function's: stores of bytes
// could otherwise change it.
template <int V, class Out>
void finish_run(const QuadPanel<Out>& panel, const int32_t* totals, Out* dest) {
  constexpr int together = 4 / V;  // pixels that are narrowed at once
  const float* const multiplier = panel.multiplier;
  const Rescaling output = panel.output;
  const int64_t stride = panel.dest_stride, last_lanes = panel.last_lanes, pixels = panel.pixels;
  const auto finish = [&](auto& sums) GROUPCONV_INLINE_LAMBDA {
    constexpr int count = sizeof sums / sizeof sums[0];
#pragma GCC unroll 4
    for (int i = 0; i < count * V; ++i) sums[i / V][i % V] = QuadSums::starting(totals + i * quad_lanes);
    store(sums, multiplier, output, dest, stride, last_lanes);
    totals += count * V * quad_lanes;
    dest += count * stride;
  };
  int64_t p = 0;
  for (; p + together <= pixels; p += together) {
    QuadSums sums[together][V];
    finish(sums);
  }
  for (; p < pixels; ++p) {
    QuadSums sums[1][V];
    finish(sums);
  }
}

template <int V, class Out>
void multiply_quad_panel(const QuadPanel<Out>& panel) {
  constexpr int64_t row = V * quad_lanes, row_bytes = row * static_cast<int64_t>(sizeof(int32_t));
  alignas(64) int32_t totals[2 * block_rows * row];
  constexpr int wide = V > 1 ? 2 : 1;
  for (int block = 0; block < V; block += 2) {
    char* sums = reinterpret_cast<char*>(totals + block * quad_lanes);
    if (panel.runs == 2) {
      multiply_quad_blocks<2, wide>(panel, block, sums, row_bytes);
    } else {
      multiply_quad_blocks<1, wide>(panel, block, sums, row_bytes);
    }
  }
  for (int64_t run = 0; run < panel.runs; ++run)
    finish_run<V>(panel, totals + run * block_rows * row, panel.dests[run]);
}

template <class Out>
void multiply_quad_panel(const QuadPanel<Out>& panel) {
  switch (panel.blocks) {
    case 1: return multiply_quad_panel<1>(panel);
    case 2: return multiply_quad_panel<2>(panel);
    default: return multiply_quad_panel<4>(panel);
  }
}

}  // namespace
}  // namespace groupconv::cpu
