// A sweep: the one loop that forward, input gradient and weight gradient share.
//
// It visits a lattice of rows × cols destination pixels and, for each, the taps of the window:
//
//   dest(row · dest_step + dest_origin) += Σ_tap  weight(tap) · source(row · source_step + offset(tap))
//
// (and the same for columns). The forward pass is one sweep over the output with source_step = stride.
// The input gradient of a stride-s convolution is s_h · s_w sweeps, one for each residue of the input
// pixel modulo the stride, each with source_step = 1 and only the taps that can reach that residue.
//
// To read neighbouring lattice pixels from neighbouring memory, the source is cut into planes, one per
// residue of its coordinates modulo source_step ("phases"). Inside a plane every tap is a constant
// shift, so a K×K convolution becomes a pointwise one over shifted rows.
#pragma once

#include <cstdint>
#include <vector>

#include "core/problem.h"

namespace groupconv {

struct Phase {
  int64_t row, col;  // source coordinate modulo source_step
  bool operator==(const Phase&) const = default;
};

struct Tap {
  int64_t plane;     // which phase it reads
  int64_t row, col;  // shift inside the plane, counted from first_row, first_col; never negative
  int64_t weight;    // position in the kh × kw window
};

struct Sweep {
  int64_t rows = 0, cols = 0;
  int64_t dest_step_h = 1, dest_step_w = 1, dest_origin_h = 0, dest_origin_w = 0;
  int64_t source_step_h = 1, source_step_w = 1;
  int64_t first_row = 0, first_col = 0;  // plane coordinate that lattice pixel (0, 0) starts to read at
  int64_t halo_rows = 0, halo_cols = 0;  // how much further than its own size a tile reads
  std::vector<Phase> phases;
  std::vector<Tap> taps;

  // Destination pixel (r, c) reads source pixel (r, c) and nothing else.
  bool pointwise() const {
    return taps.size() == 1 && source_step_h == 1 && source_step_w == 1 && first_row == 0 && first_col == 0 &&
           dest_step_h == 1 && dest_step_w == 1;
  }
  // A pointwise sweep does not care where the rows of an image end.
  void make_one_row() {
    cols *= rows;
    rows = 1;
  }
};

struct Size {
  int64_t height, width;
};

// Taps that only ever meet padding are left out, so a halo is never wider than the image.
Sweep forward_sweep(const Window& window, Size input, Size output);

// Only residues that some tap can reach; `covers_input` says whether that is all of them.
struct InputGradSweeps {
  std::vector<Sweep> sweeps;
  bool covers_input;
};
InputGradSweeps input_grad_sweeps(const Window& window, Size input, Size output);

}  // namespace groupconv
