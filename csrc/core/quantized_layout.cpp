#include "core/quantized_layout.h"

#include <algorithm>

namespace groupconv {
namespace {

// How many groups from `first` on can share sixteen lanes, at most, as a power of two.
int shift_from(const PartitionView& partition, int64_t first) {
  for (int shift = 4; shift > 0; --shift) {
    const int64_t share = int64_t{1} << shift;
    const int64_t groups = std::min(share, partition.groups - first);
    if (2 * groups <= share) continue;  // as well with fewer
    bool fits = true;
    for (int64_t k = 0; k < groups; ++k) {
      fits = fits && partition.outputs.count(first + k) <= quad_lanes / share;
    }
    if (fits) return shift;
  }
  return 0;
}

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace

QuantizedLayout::QuantizedLayout(const PartitionView& view) : partition(view) {
  for (int64_t first = 0; first < view.groups;) {
    QuadStream stream;
    stream.first_group = first;
    stream.shift = shift_from(view, first);
    stream.share = int64_t{1} << stream.shift;
    stream.groups = std::min(stream.share, view.groups - first);
    int64_t outputs = 0;
    for (int64_t k = 0; k < stream.groups; ++k) {
      stream.quads = std::max(stream.quads, divide_up(view.inputs.count(first + k), quad));
      outputs = std::max(outputs, view.outputs.count(first + k));
    }
    stream.blocks = divide_up(outputs * stream.share, quad_lanes);
    first += stream.groups;
    if (stream.blocks == 0) continue;
    reads += stream.quads * stream.share;
    blocks += stream.blocks;
    streams.push_back(stream);
  }
}

QuantizedLayout::~QuantizedLayout() = default;

int64_t QuantizedLayout::weight_size(int64_t window_area) const {
  int64_t steps = 0, bytes;
  for (const QuadStream& stream : streams) steps += stream.blocks * stream.quads;
  const bool overflow = __builtin_mul_overflow(steps * quad * quad_lanes, window_area, &bytes);
  return overflow ? -1 : bytes;
}

void QuantizedLayout::pack(const int8_t* weight, int64_t window_area, int8_t* packed) const {
  for (const QuadStream& stream : streams) {
    for (int64_t block = 0; block < stream.blocks; ++block) {
      for (int64_t lane = 0; lane < quad_lanes; ++lane) {
        const int64_t group = group_of(stream, lane), r = (block * quad_lanes + lane) >> stream.shift;
        const bool exists = group >= 0 && r < partition.outputs.count(group);
        const int64_t inputs = exists ? partition.inputs.count(group) : 0;
        const int8_t* row =
            exists
                ? weight + (partition.weight_offsets[static_cast<size_t>(group)] + r * inputs) * window_area
                : weight;
        int8_t* to = packed + lane * quad;
        for (int64_t tap = 0; tap < window_area; ++tap) {
          for (int64_t i = 0; i < stream.quads * quad; ++i) {
            const int64_t step = tap * stream.quads + i / quad;
            to[step * quad * quad_lanes + i % quad] = i < inputs ? row[i * window_area + tap] : int8_t{0};
          }
        }
      }
      packed += stream.quads * window_area * quad * quad_lanes;
    }
  }
}

}  // namespace groupconv
