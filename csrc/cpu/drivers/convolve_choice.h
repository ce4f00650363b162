// Which driver computes a convolution or an input gradient: the first of these that suits it.
#pragma once

#include "cpu/drivers/convolve.h"
#include "cpu/drivers/convolve_lanes.h"
#include "cpu/drivers/convolve_pixels.h"
#include "cpu/drivers/convolve_streamed.h"
#include "cpu/drivers/convolve_turned.h"
#include "cpu/entry.h"
#if defined(__AVX512BF16__)
#include "cpu/drivers/row_products_vector.h"
#endif

namespace groupconv::cpu {
namespace {

// Three quarters of the places in pairs are taken at least.
template <class Stored>
bool fills_pairs(const Sides<Stored>& sides) {
  int64_t channels = 0, places = 0;
  for (int64_t g = 0; g < sides.groups; ++g) {
    channels += sides.sources.count(g);
    places += 2 * operands_for<Pair<Stored>>(sides.sources.count(g));
  }
  return 4 * channels >= 3 * places;
}

// False where pairs would be half empty, or cannot be made of what the images hold.
template <class Stored>
bool convolve_pairs(const ConvolveProblem<Stored>& problem) {
  const Sides<Stored> sides(problem);
  if (!fills_pairs(sides)) return false;
  // Lanes over channels have nothing to bring in order here.
  const bool in_place = in_order(sides.sources, sides.groups) && writes_neighbours(sides);
  if (in_place && convolve_wide<Pair<Stored>>(problem)) return true;
#if defined(__AVX512BF16__)
  using Pointwise = PixelRowsConvolution<VectorRowProducts>;
  if (Pointwise::suits(problem)) return Pointwise(problem).run();
#endif
  if (convolve_wide<Pair<Stored>>(problem)) return true;
  if (problem.source.channels_last()) return false;
  Convolution<Stored, Pair<Stored>>(problem).run();
  return true;
}

// False as well where the weights do not stay in cache: lanes over channels read them once for a few pixels.
template <class Stored>
bool has_lanes_over_channels(const ConvolveProblem<Stored>& problem) {
  using T = compute_t<Stored>;
  if (LaneConvolution<Stored>::suits(problem)) return true;
  const int64_t weights = problem.partition->entries() * problem.window_area;
  if (weights * static_cast<int64_t>(sizeof(T)) > caches().own) return false;
  if constexpr (Vec<T>::lanes > 1) return PixelConvolution<Stored, WideBlocks<Stored, T>>::suits(problem);
  return false;
}

// By a weight as it is stored: a forward pass in pairs. Whoever reads one channel a group is no layer of pairs.
template <class Stored>
bool convolve_stored(const ConvolveProblem<Stored>& problem) {
  if constexpr (multiplies_stored<Stored>) {
    return !problem.coarse && !problem.prologue && !problem.transposed && convolve_pairs(problem);
  }
  return false;
}

template <class Stored>
void convolve(const ConvolveProblem<Stored>& problem) {
  if (problem.coarse) return Convolution<Stored>(problem).run();
  if (GROUPCONV_ISA::Kernels<Stored>::depthwise(problem)) return;
  if constexpr (multiplies_stored<Stored>) {
    if (!problem.prologue && convolve_pairs(problem)) return;
  }
  if (convolve_turned(problem)) return;
  if (convolve_streamed(problem)) return;
  if (convolve_pixels(problem)) return;
  if (LaneConvolution<Stored>::suits(problem)) return LaneConvolution<Stored>(problem).run();
  Convolution<Stored>(problem).run();
}

}  // namespace
}  // namespace groupconv::cpu
