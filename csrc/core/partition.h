// A Partition as the kernels see it: a validated view over one int32 table.
//
// The table is what groupconv_ext.Partition.table() makes:
//   [in_channels, out_channels, groups, reads]
//   in_offsets[groups + 1]  out_offsets[groups + 1]  inputs[reads]  outputs[out_channels]
// Group g reads the channels inputs[in_offsets[g] .. in_offsets[g + 1]) and writes
// outputs[out_offsets[g] .. out_offsets[g + 1]); its weights are a row-major block
// [out_g, in_g, kh, kw] at weight_offset(g) of the packed weight.
//
// A table may come from anywhere, so nothing is read through it before parse_partition
// has seen every entry: a hostile table is refused, never followed.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace groupconv {

// One side of a partition: for each group, the channels it touches on that side.
struct ChannelLists {
  const int32_t* offsets;
  const int32_t* channels;

  int64_t count(int64_t group) const { return offsets[group + 1] - offsets[group]; }
  const int32_t* of(int64_t group) const { return channels + offsets[group]; }
};

struct PartitionView {
  PartitionView() = default;
  PartitionView(PartitionView&&) = default;
  PartitionView(const PartitionView&) = delete;  // the lists point into its own table

  int64_t in_channels = 0;
  int64_t out_channels = 0;
  int64_t groups = 0;
  int64_t most_inputs = 0, most_outputs = 0;  // of one group
  ChannelLists inputs{};
  ChannelLists outputs{};
  std::vector<int32_t> table;           // as it was when it was checked, whoever writes to it since
  std::vector<int64_t> weight_offsets;  // groups + 1, in units of one kernel window
  bool inputs_overlap = false;          // some channel is read by two groups
  bool inputs_complete = false;         // every channel is read by some group

  int64_t entries() const { return weight_offsets.back(); }
};

// Some neighbouring groups, of one input each, as a partition of their own: inputs and outputs are counted in the
// groups' order. Nothing of it is inline: the files of the instruction sets, which use it, must not emit it.
class GroupRange {
 public:
  // No more than `most` groups are taken at a time.
  GroupRange(const PartitionView& all, int64_t most);
  ~GroupRange();
  void take(int64_t first, int64_t end);

  PartitionView view;
  // In the whole: the channels that these groups read and write, and where their weights begin.
  const int32_t* inputs = nullptr;
  const int32_t* outputs = nullptr;
  int64_t first_weight = 0;

 private:
  const PartitionView& all_;
  int32_t* counts_;   // 0, 1, 2, …
  int32_t* offsets_;  // of outputs
};

// Fills `view` and returns an empty string, or returns what is wrong with the table. The caller knows the
// channels already: a table that says otherwise is refused before memory is taken for as many as it says.
std::string parse_partition(const int32_t* table, int64_t length, int64_t in_channels, int64_t out_channels,
                            PartitionView& view);

}  // namespace groupconv
