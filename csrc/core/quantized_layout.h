// How int8 weights lie for the kernels that multiply bytes four to a 32-bit lane (cpu/vector/quads.h).
//
// A quad is four inputs of a group, the last one filled up with zeros; a block is sixteen outputs, one to a
// lane. A stream is what one block after another reads of a pixel: the quads of one group, or, where the
// groups have few outputs, of 2, 4, 8 or 16 groups that share the lanes, the groups' quads in turns:
//   read  i · share + k   quad i of the stream's group k
//   lane  r · share + k   output r of group k
// so that loading `share` quads and repeating them gives every lane the quad of its own group.
//
// The packed weight has, for each stream, block, tap and quad, sixteen lanes of four bytes. It is the same for
// every instruction set.
#pragma once

#include <cstdint>
#include <vector>

#include "core/partition.h"

namespace groupconv {

constexpr int64_t quad = 4;
constexpr int64_t quad_lanes = 16;

struct QuadStream {
  int64_t first_group = 0;
  int64_t groups = 1;  // that exist, of the `share`
  int64_t share = 1;   // 1 << shift
  int shift = 0;
  int64_t quads = 0;   // of the group with the most inputs
  int64_t blocks = 0;  // more than one for a group alone
};

struct QuantizedLayout {
  const PartitionView& partition;
  std::vector<QuadStream> streams;
  int64_t reads = 0;  // quads of a pixel, over all streams
  int64_t blocks = 0;

  explicit QuantizedLayout(const PartitionView& view);
  ~QuantizedLayout();  // not inline: the files of the instruction sets must not emit it

  // Bytes of a packed weight; −1 where 64 bits do not count them.
  int64_t weight_size(int64_t window_area) const;
  // From [entries, window_area] to the layout above.
  void pack(const int8_t* weight, int64_t window_area, int8_t* packed) const;

  // The group of a stream that a lane belongs to; −1: none.
  int64_t group_of(const QuadStream& stream, int64_t lane) const {
    const int64_t k = lane & (stream.share - 1);
    return k < stream.groups ? stream.first_group + k : -1;
  }
  // What a lane of the stream's block writes; −1: nothing.
  int64_t output_of(const QuadStream& stream, int64_t block, int64_t lane) const {
    const int64_t group = group_of(stream, lane), r = (block * quad_lanes + lane) >> stream.shift;
    return group >= 0 && r < partition.outputs.count(group) ? partition.outputs.of(group)[r] : -1;
  }
  // What lies at one byte of the stream's reads; −1: anything, its weights are zero.
  int64_t input_of(const QuadStream& stream, int64_t read, int64_t byte) const {
    const int64_t group = group_of(stream, read), i = (read >> stream.shift) * quad + byte;
    return group >= 0 && i < partition.inputs.count(group) ? partition.inputs.of(group)[i] : -1;
  }
};

}  // namespace groupconv
