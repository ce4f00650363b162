// Partitions that are given by one group label for every channel (FLGC), or by digits of the channels'
// numbers (DGConv): from either to the table that the kernels read.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace groupconv {

// Two channels are connected when their labels are equal.
struct Labels {
  const int32_t* inputs;
  int64_t in_channels;
  const int32_t* outputs;
  int64_t out_channels;
};

// Fills `table`, see partition.h, or returns which label is not in [0, groups). Channels ascend in a group.
// Labels above the largest one in use make no group: an empty one would compute nothing.
std::string table_from_labels(const Labels& labels, int64_t groups, std::vector<int32_t>& table);

// DGConv's mask U = U_1 ⊗ … ⊗ U_K (eq. 4): the first factor has the largest stride, U_k is p_k × p_k, ones
// where gate k is set and the identity where it is not. What remains of the channels has the smallest stride
// and is all ones. Two channels are connected when their digits agree at every zero gate.
struct Kronecker {
  struct Gate {
    int64_t radix;
    bool open;  // g = 1: channels whose digits differ here see each other too
  };

  int64_t in_channels, out_channels;
  std::vector<Gate> gates;

  // One gate for every prime factor of gcd(in_channels, out_channels), ascending.
  static std::vector<int64_t> radices(int64_t in_channels, int64_t out_channels);

  int64_t groups() const;
  // A channel's digits at the zero gates, read as one mixed-radix number.
  void label(int64_t channels, int32_t* labels) const;

  // The overlapping Partition of all pairs that some gradient needs: group by group the outputs of one
  // label with the inputs of the same label first, then, for every zero gate in order, the inputs whose
  // label differs at that gate alone, in `radix − 1` runs of as many channels.
  std::vector<int32_t> neighbour_table() const;
};

}  // namespace groupconv
