// What a lattice pixel of a channels_last convolution takes on each of three ways: with lanes over the sources
// (deep_blocks.h), with lanes over the destinations (wide_blocks.h), and by rows of all source channels (convolve.h).
// Counted in instructions; what each is worth is fitted to layers of 8 to 1128 sources and 2 to 16 destinations a group
// (benches/NOTES.md).
#pragma once

#include "cpu/products/multiply.h"
#include "cpu/staging/pixels.h"
#include "cpu/staging/sides.h"

namespace groupconv::cpu {
namespace {

// Of a tile with lanes over the sources.
constexpr int deep_rows = vector_registers == 32 ? 6 : 2;

// A group's destinations in equal tiles: body(first, how many).
template <class Body>
GROUPCONV_INLINE void for_each_deep_block(int64_t dests, const Body& body) {
  const int64_t blocks = divide_up(dests, int64_t{deep_rows});
  for (int64_t b = 0; b < blocks; ++b) {
    const int64_t first = dests * b / blocks;
    body(first, dests * (b + 1) / blocks - first);
  }
}

template <class Stored>
struct PixelCosts {
  using T = compute_t<Stored>;
  static constexpr int64_t lanes = Vec<T>::lanes;

  double deep = 0, wide = 0, rows = 0;
  bool fills;  // lanes over the destinations: few of them idle
  bool lines;  // one vector of destinations, whose sources lie side by side

  explicit PixelCosts(const Sides<Stored>& sides) {
    const Sweep& sweep = *sides.problem.sweep;
    const int64_t reads = sides.sources.offsets[sides.groups];
    const bool gathered = !in_order(sides.sources, sides.groups), window = sides.taps > 1;
    fills = fills_lanes<T>(sides.dests, sides.groups);
    lines = vector_registers == 32 && __is_same(Stored, T) && !gathered && !window && sides.groups == 1 &&
            sides.dests.count(0) <= lanes;
    for (int64_t g = 0; g < sides.groups; ++g) {
      const int64_t sources = sides.sources.count(g), dests = sides.dests.count(g);
      const double depth = static_cast<double>(sides.taps * sources);
      const double steps = static_cast<double>(sides.taps * divide_up(sources, lanes));
      for_each_deep_block(dests, [&](int64_t, int64_t count) {
        deep += steps * (3.2 + 2 * static_cast<double>(count)) + 13 * static_cast<double>(count);
      });
      for_each_lane_block<T>(dests, [&](int64_t, int64_t, int64_t width) {
        wide += depth * (lines ? 2.25 : width > lanes ? 3.6 : 2.6);
      });
      const double by_row = !window ? 0.14 : dests < max_tile_rows ? 0.3 : 0.2;
      rows += depth * by_row * 16 / lanes * static_cast<double>(dests);
    }
    const double read = static_cast<double>(reads * sweep.source_step_h * sweep.source_step_w);
    const double staging = (gathered ? 3 : 0.75) * read;
    if (window || gathered) deep += staging;
    if (window) wide += staging;
    rows += 1.8 * read;
  }

  bool deep_pays() const { return deep < (fills || lines_pay() ? wide : rows); }
  bool lines_pay() const { return lines && wide < rows; }
};

}  // namespace
}  // namespace groupconv::cpu
