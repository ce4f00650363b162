#include "core/known_partitions.h"

#include <array>
#include <cstring>

namespace groupconv {
namespace {

using Known = std::shared_ptr<const PartitionView>;

// What is kept is bounded: so many tables, a few times those of a network (50 to 85), none of them longer.
constexpr int slot_bits = 8;
constexpr int64_t longest = 1 << 14;
thread_local std::array<Known, size_t{1} << slot_bits> known;

// Where a table lies is only a guess at which of them it is.
Known& slot_of(const int32_t* table) {
  const uint64_t mixed = reinterpret_cast<uintptr_t>(table) * uint64_t{0x9e3779b97f4a7c15};
  return known[mixed >> (64 - slot_bits)];
}

bool says(const PartitionView& view, const int32_t* table, int64_t length, int64_t in_channels,
          int64_t out_channels) {
  return view.in_channels == in_channels && view.out_channels == out_channels &&
         static_cast<int64_t>(view.table.size()) == length &&
         std::memcmp(view.table.data(), table, view.table.size() * sizeof(int32_t)) == 0;
}

}  // namespace

std::shared_ptr<const PartitionView> known_partition(const int32_t* table, int64_t length,
                                                     int64_t in_channels, int64_t out_channels,
                                                     std::string& wrong) {
  Known& slot = slot_of(table);
  if (slot && says(*slot, table, length, in_channels, out_channels)) return slot;
  const auto view = std::make_shared<PartitionView>();
  wrong = parse_partition(table, length, in_channels, out_channels, *view);
  if (!wrong.empty()) return nullptr;
  if (length <= longest) slot = view;
  return view;
}

}  // namespace groupconv
