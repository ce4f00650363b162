#include "core/partition.h"

#include <algorithm>
#include <numeric>

namespace groupconv {
namespace {

constexpr int64_t header_length = 4;

std::string number(const char* text, int64_t value) {
  return std::string("partition table: ") + text + " " + std::to_string(value);
}

std::string check_offsets(const int32_t* offsets, int64_t groups, int64_t total, const char* side) {
  if (offsets[0] != 0) return number(side, offsets[0]) + " is the first offset, expected 0";
  for (int64_t g = 0; g < groups; ++g) {
    if (offsets[g + 1] < offsets[g]) {
      return number(side, offsets[g + 1]) + " is an offset below the one before it, " +
             std::to_string(offsets[g]);
    }
  }
  if (offsets[groups] != total) {
    return number(side, offsets[groups]) + " is the last offset, expected " + std::to_string(total);
  }
  return {};
}

std::string out_of_range(const char* side, int64_t channel, int64_t channels) {
  return number(side, channel) + " is out of range, expected 0.." + std::to_string(channels - 1);
}

}  // namespace

std::string parse_partition(const int32_t* given, int64_t length, int64_t expected_in, int64_t expected_out,
                            PartitionView& view) {
  view.table.assign(given, given + length);
  const int32_t* table = view.table.data();
  if (length < header_length) return number("length", length) + " is shorter than its header of 4";
  const int64_t in_channels = table[0], out_channels = table[1], groups = table[2], reads = table[3];
  if (in_channels < 0 || out_channels < 0 || reads < 0 || groups < 1) {
    return "partition table: the header (in_channels, out_channels, groups, reads) = (" +
           std::to_string(in_channels) + ", " + std::to_string(out_channels) + ", " + std::to_string(groups) +
           ", " + std::to_string(reads) + ") needs counts that are not negative and at least one group";
  }
  const int64_t expected = header_length + 2 * (groups + 1) + reads + out_channels;
  if (length != expected) {
    return number("length", length) + " does not fit its header, expected " + std::to_string(expected);
  }
  if (in_channels != expected_in || out_channels != expected_out) {
    return "partition table: it has " + std::to_string(in_channels) + " input and " +
           std::to_string(out_channels) + " output channels, the operands have " +
           std::to_string(expected_in) + " and " + std::to_string(expected_out);
  }

  view.in_channels = in_channels;
  view.out_channels = out_channels;
  view.groups = groups;
  const int32_t* cursor = table + header_length;
  view.inputs = {cursor, cursor + 2 * (groups + 1)};
  view.outputs = {cursor + groups + 1, cursor + 2 * (groups + 1) + reads};

  if (auto wrong = check_offsets(view.inputs.offsets, groups, reads, "input offset"); !wrong.empty()) {
    return wrong;
  }
  if (auto wrong = check_offsets(view.outputs.offsets, groups, out_channels, "output offset");
      !wrong.empty()) {
    return wrong;
  }

  std::vector<uint8_t> seen(static_cast<size_t>(out_channels), 0);
  for (int64_t i = 0; i < out_channels; ++i) {
    const int64_t channel = view.outputs.channels[i];
    if (channel < 0 || channel >= out_channels) {
      return out_of_range("output channel", channel, out_channels);
    }
    if (seen[channel]) return number("output channel", channel) + " is written by two groups";
    seen[channel] = 1;
  }
  // out_channels distinct channels in range: every output is covered.

  std::vector<int32_t> last_reader(static_cast<size_t>(in_channels), -1);
  int64_t distinct = 0;
  for (int32_t g = 0; g < groups; ++g) {
    for (int64_t i = 0; i < view.inputs.count(g); ++i) {
      const int64_t channel = view.inputs.of(g)[i];
      if (channel < 0 || channel >= in_channels) {
        return out_of_range("input channel", channel, in_channels);
      }
      if (last_reader[channel] == g) return number("input channel", channel) + " is read twice by one group";
      distinct += last_reader[channel] < 0;
      last_reader[channel] = g;
    }
  }
  view.inputs_overlap = distinct < reads;
  view.inputs_complete = distinct == in_channels;

  view.weight_offsets.resize(static_cast<size_t>(groups) + 1);
  view.weight_offsets[0] = 0;
  for (int64_t g = 0; g < groups; ++g) {
    const int64_t inputs = view.inputs.count(g), outputs = view.outputs.count(g);
    view.weight_offsets[g + 1] = view.weight_offsets[g] + inputs * outputs;
    view.most_inputs = std::max(view.most_inputs, inputs);
    view.most_outputs = std::max(view.most_outputs, outputs);
  }
  return {};
}

GroupRange::GroupRange(const PartitionView& all, int64_t most) : all_(all) {
  const int64_t counts = std::max(most, all.out_channels) + 1;
  view.table.resize(static_cast<size_t>(counts + most + 1));
  counts_ = view.table.data();
  offsets_ = counts_ + counts;
  std::iota(counts_, offsets_, 0);
  view.inputs_complete = true;
  view.most_inputs = 1;
}

GroupRange::~GroupRange() = default;

void GroupRange::take(int64_t first, int64_t end) {
  const int64_t count = end - first;
  const int32_t* given = all_.outputs.offsets + first;
  view.groups = view.in_channels = count;
  view.out_channels = given[count] - given[0];
  view.weight_offsets.resize(static_cast<size_t>(count) + 1);
  view.most_outputs = 0;
  for (int64_t g = 0; g <= count; ++g) {
    offsets_[g] = given[g] - given[0];
    view.weight_offsets[static_cast<size_t>(g)] = offsets_[g];
    if (g > 0) view.most_outputs = std::max<int64_t>(view.most_outputs, offsets_[g] - offsets_[g - 1]);
  }
  view.inputs = {counts_, counts_};
  view.outputs = {offsets_, counts_};
  inputs = all_.inputs.of(first);
  outputs = all_.outputs.of(first);
  first_weight = all_.weight_offsets[static_cast<size_t>(first)];
}

}  // namespace groupconv
