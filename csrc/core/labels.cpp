#include "core/labels.h"

#include <algorithm>
#include <numeric>

namespace groupconv {
namespace {

std::string largest_label(const char* side, const int32_t* labels, int64_t channels, int64_t groups,
                          int64_t& largest) {
  for (int64_t c = 0; c < channels; ++c) {
    if (labels[c] < 0 || labels[c] >= groups) {
      return std::string("the label of ") + side + " channel " + std::to_string(c) + " is " +
             std::to_string(labels[c]) + ", expected 0.." + std::to_string(groups - 1);
    }
    largest = std::max<int64_t>(largest, labels[c]);
  }
  return {};
}

// Counting sort: where every group's list starts, and the lists.
void sort_by_label(const int32_t* labels, int64_t channels, int64_t groups, int32_t* offsets,
                   int32_t* lists) {
  std::fill(offsets, offsets + groups + 1, 0);
  for (int64_t c = 0; c < channels; ++c) ++offsets[labels[c] + 1];
  std::partial_sum(offsets, offsets + groups + 1, offsets);
  std::vector<int32_t> next(offsets, offsets + groups);
  for (int64_t c = 0; c < channels; ++c) lists[next[labels[c]]++] = static_cast<int32_t>(c);
}

}  // namespace

std::string table_from_labels(const Labels& labels, int64_t groups, std::vector<int32_t>& table) {
  int64_t largest = 0;
  if (auto wrong = largest_label("input", labels.inputs, labels.in_channels, groups, largest);
      !wrong.empty()) {
    return wrong;
  }
  if (auto wrong = largest_label("output", labels.outputs, labels.out_channels, groups, largest);
      !wrong.empty()) {
    return wrong;
  }
  const int64_t used = largest + 1;
  table.resize(static_cast<size_t>(4 + 2 * (used + 1) + labels.in_channels + labels.out_channels));
  table[0] = static_cast<int32_t>(labels.in_channels);
  table[1] = static_cast<int32_t>(labels.out_channels);
  table[2] = static_cast<int32_t>(used);
  table[3] = static_cast<int32_t>(labels.in_channels);
  int32_t* offsets = table.data() + 4;
  int32_t* lists = offsets + 2 * (used + 1);
  sort_by_label(labels.inputs, labels.in_channels, used, offsets, lists);
  sort_by_label(labels.outputs, labels.out_channels, used, offsets + used + 1, lists + labels.in_channels);
  return {};
}

std::vector<int64_t> Kronecker::radices(int64_t in_channels, int64_t out_channels) {
  std::vector<int64_t> found;
  int64_t rest = std::gcd(in_channels, out_channels);
  for (int64_t radix = 2; radix * radix <= rest; ++radix) {
    for (; rest % radix == 0; rest /= radix) found.push_back(radix);
  }
  if (rest > 1) found.push_back(rest);
  return found;
}

int64_t Kronecker::groups() const {
  int64_t product = 1;
  for (const Gate& gate : gates) product *= gate.open ? 1 : gate.radix;
  return product;
}

void Kronecker::label(int64_t channels, int32_t* labels) const {
  std::fill(labels, labels + channels, 0);
  int64_t stride = channels;
  for (const Gate& gate : gates) {
    stride /= gate.radix;
    if (gate.open) continue;
    for (int64_t c = 0; c < channels; ++c) {
      labels[c] = static_cast<int32_t>(labels[c] * gate.radix + c / stride % gate.radix);
    }
  }
}

std::vector<int32_t> Kronecker::neighbour_table() const {
  const int64_t count = groups();
  std::vector<int32_t> in_labels(static_cast<size_t>(in_channels)),
      out_labels(static_cast<size_t>(out_channels)), own;
  label(in_channels, in_labels.data());
  label(out_channels, out_labels.data());
  table_from_labels({in_labels.data(), in_channels, out_labels.data(), out_channels}, count, own);
  const int32_t* starts = own.data() + 4;
  const int32_t* out_starts = starts + count + 1;
  const int32_t* lists = out_starts + count + 1;

  int64_t flips = 0;
  for (const Gate& gate : gates) flips += gate.open ? 0 : gate.radix - 1;
  const int64_t reads = in_channels * (1 + flips);
  std::vector<int32_t> table{static_cast<int32_t>(in_channels), static_cast<int32_t>(out_channels),
                             static_cast<int32_t>(count), static_cast<int32_t>(reads)};
  table.reserve(static_cast<size_t>(4 + 2 * (count + 1) + reads + out_channels));
  const int64_t per_group = reads / count;
  for (int64_t g = 0; g <= count; ++g) table.push_back(static_cast<int32_t>(g * per_group));
  table.insert(table.end(), out_starts, out_starts + count + 1);
  const auto append = [&](int64_t g) { table.insert(table.end(), lists + starts[g], lists + starts[g + 1]); };
  for (int64_t g = 0; g < count; ++g) {
    append(g);
    int64_t stride = count;
    for (const Gate& gate : gates) {
      if (gate.open) continue;
      stride /= gate.radix;
      const int64_t digit = g / stride % gate.radix;
      for (int64_t other = 0; other < gate.radix; ++other) {
        if (other != digit) append(g + (other - digit) * stride);
      }
    }
  }
  table.insert(table.end(), lists + in_channels, lists + in_channels + out_channels);
  return table;
}

}  // namespace groupconv
