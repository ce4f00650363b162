#include "core/sweep.h"

#include <algorithm>
#include <utility>

namespace groupconv {
namespace {

// One tap along one axis: it reads source coordinate index · step + phase, with index counted from
// lattice position 0.
struct AxisTap {
  int64_t index, phase, kernel;
};

struct Axis {
  int64_t count, dest_step, dest_origin, source_step, source_size;
  std::vector<AxisTap> taps{};

  void add(int64_t source_offset, int64_t kernel) {
    const int64_t last = source_offset + (count - 1) * source_step;
    if (count == 0 || last < 0 || source_offset >= source_size) return;
    const int64_t phase = ((source_offset % source_step) + source_step) % source_step;
    taps.push_back({(source_offset - phase) / source_step, phase, kernel});
  }
  int64_t first() const { return std::min_element(taps.begin(), taps.end(), by_index)->index; }
  int64_t halo() const { return std::max_element(taps.begin(), taps.end(), by_index)->index - first(); }
  static bool by_index(const AxisTap& a, const AxisTap& b) { return a.index < b.index; }
};

Axis forward_axis(int64_t kernel, int64_t stride, int64_t pad, int64_t dilation, int64_t in_size,
                  int64_t out_size) {
  Axis axis{out_size, 1, 0, stride, in_size};
  for (int64_t k = 0; k < kernel; ++k) axis.add(k * dilation - pad, k);
  return axis;
}

// Input position stride · m + residue receives output position m + (residue + pad − k · dilation) / stride
// through tap k, where that division is exact.
std::vector<Axis> input_grad_axes(int64_t kernel, int64_t stride, int64_t pad, int64_t dilation,
                                  int64_t in_size, int64_t out_size) {
  std::vector<Axis> axes;
  for (int64_t residue = 0; residue < std::min(stride, in_size); ++residue) {
    Axis axis{(in_size - residue + stride - 1) / stride, stride, residue, 1, out_size};
    for (int64_t k = 0; k < kernel; ++k) {
      const int64_t reach = residue + pad - k * dilation;
      if (reach % stride == 0) axis.add(reach / stride, k);
    }
    if (!axis.taps.empty()) axes.push_back(std::move(axis));
  }
  return axes;
}

Sweep combine(const Axis& vertical, const Axis& horizontal, int64_t kernel_w) {
  Sweep sweep;
  sweep.rows = vertical.count;
  sweep.cols = horizontal.count;
  sweep.dest_step_h = vertical.dest_step;
  sweep.dest_step_w = horizontal.dest_step;
  sweep.dest_origin_h = vertical.dest_origin;
  sweep.dest_origin_w = horizontal.dest_origin;
  sweep.source_step_h = vertical.source_step;
  sweep.source_step_w = horizontal.source_step;
  if (vertical.taps.empty() || horizontal.taps.empty()) return sweep;

  sweep.first_row = vertical.first();
  sweep.first_col = horizontal.first();
  sweep.halo_rows = vertical.halo();
  sweep.halo_cols = horizontal.halo();
  sweep.taps.reserve(vertical.taps.size() * horizontal.taps.size());
  for (const AxisTap& v : vertical.taps) {
    for (const AxisTap& h : horizontal.taps) {
      const Phase phase{v.phase, h.phase};
      const auto found = std::find(sweep.phases.begin(), sweep.phases.end(), phase);
      const int64_t plane = found - sweep.phases.begin();
      if (found == sweep.phases.end()) sweep.phases.push_back(phase);
      sweep.taps.push_back(
          {plane, v.index - sweep.first_row, h.index - sweep.first_col, v.kernel * kernel_w + h.kernel});
    }
  }
  return sweep;
}

}  // namespace

Sweep forward_sweep(const Window& w, Size input, Size output) {
  return combine(forward_axis(w.kernel_h, w.stride_h, w.pad_top, w.dilation_h, input.height, output.height),
                 forward_axis(w.kernel_w, w.stride_w, w.pad_left, w.dilation_w, input.width, output.width),
                 w.kernel_w);
}

InputGradSweeps input_grad_sweeps(const Window& w, Size input, Size output) {
  const auto vertical =
      input_grad_axes(w.kernel_h, w.stride_h, w.pad_top, w.dilation_h, input.height, output.height);
  const auto horizontal =
      input_grad_axes(w.kernel_w, w.stride_w, w.pad_left, w.dilation_w, input.width, output.width);
  InputGradSweeps result{{}, false};
  for (const Axis& v : vertical) {
    for (const Axis& h : horizontal) result.sweeps.push_back(combine(v, h, w.kernel_w));
  }
  result.covers_input = static_cast<int64_t>(result.sweeps.size()) ==
                        std::min(w.stride_h, input.height) * std::min(w.stride_w, input.width);
  return result;
}

}  // namespace groupconv
