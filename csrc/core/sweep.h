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
// To read neighbouring lattice pixels from neighbouring memory, the source is cut into planes. Taps whose
// offsets agree modulo source_step read the same plane, each at a constant shift, so a K×K convolution
// becomes a pointwise one over shifted rows. Only taps so far apart that a tile would stage mostly the
// pixels between them (a large dilation) get planes of their own, which hold what that tap reads.
#pragma once

#include <cstdint>
#include <vector>

#include "core/problem.h"

namespace groupconv {

struct Phase {
  int64_t row, col;  // source coordinate of a plane's pixel (0, 0); of any sign
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
  int64_t shared_cols = 0;               // of the halo: padding behind a whole row and before the next alike
  bool far_taps = false;                 // the window spans many more source pixels than it has taps
  std::vector<Phase> phases;
  std::vector<Tap> taps;

  Sweep() = default;
  Sweep(Sweep&&) = default;
  ~Sweep();  // not inline: the files of the instruction sets, which have sweeps too, must not emit it

  // Destination pixel (r, c) reads source pixel (r, c) and nothing else, through the first weight of its window: a
  // larger window, whose other taps meet no image, may have another.
  bool pointwise() const {
    return taps.size() == 1 && taps[0].weight == 0 && source_step_h == 1 && source_step_w == 1 &&
           first_row == 0 && first_col == 0 && dest_step_h == 1 && dest_step_w == 1 && dest_origin_h == 0 &&
           dest_origin_w == 0;
  }
  // A pointwise sweep does not care where the rows of an image end.
  void make_one_row() {
    cols *= rows;
    rows = 1;
  }
};

// A window along one axis: lattice position m is destination pixel m · dest_step + dest_origin and reads,
// through each tap, source pixel m · source_step + offset.
struct AxisTap {
  int64_t offset, kernel;
};
struct Axis {
  int64_t count, dest_step, dest_origin, source_step, source_size;
  std::vector<AxisTap> taps{};  // those that meet the source somewhere, their offsets in equal steps

  // Some position reads beyond the source.
  bool padded() const;
};

struct AxisWindow {
  int64_t kernel, stride, pad, dilation;
};
inline AxisWindow vertical(const Window& w) { return {w.kernel_h, w.stride_h, w.pad_top, w.dilation_h}; }
inline AxisWindow horizontal(const Window& w) { return {w.kernel_w, w.stride_w, w.pad_left, w.dilation_w}; }

Axis forward_axis(const AxisWindow& window, int64_t in_size, int64_t out_size);

// Only the residues that some tap can reach.
std::vector<Axis> input_grad_axes(const AxisWindow& window, int64_t in_size, int64_t out_size);

// The same in parts that read nothing beyond the source: to each position only the taps that meet the
// source there. Positions that none meets are in no part. For operands that a staged zero would turn into
// NaN; slower, since the parts at a border are small.
std::vector<Axis> without_padding(const std::vector<Axis>& axes);

// The sweep over two axes. `plane_pixels` is how many pixels the planes of a tile can have together, with
// all the channels that are staged.
Sweep make_sweep(const Axis& vertical, const Axis& horizontal, int64_t kernel_w, int64_t plane_pixels);

}  // namespace groupconv
