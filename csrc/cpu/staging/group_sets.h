// Groups that matrix registers multiply as one. A register takes 32 sources, whoever needs them: neighbouring groups
// of fewer share one, with weights of zero between a group's destinations and the others' sources. A group of more is
// a set by itself.
#pragma once

#include "cpu/staging/planes.h"
#include "cpu/staging/sides.h"
#include "cpu/vector/matrix_registers.h"

namespace groupconv::cpu {
namespace {

struct GroupSet {
  int64_t first, end;  // groups

  bool joins() const { return end - first > 1; }
  // Of all its groups, one behind the other.
  ChannelSet of(const ChannelLists& lists) const {
    return {lists.of(first), lists.offsets[end] - lists.offsets[first]};
  }
};

// body(set) for all sets, in order.
template <class Body>
void for_each_set(const Sides<BFloat16>& sides, const Body& body) {
  constexpr int64_t most = block_depth;
  GroupSet set{0, 0};
  while (set.end < sides.groups) {
    set = {set.end, set.end + 1};
    for (GroupSet longer = set; longer.end < sides.groups;) {
      ++longer.end;
      if (longer.of(sides.sources).count > most || longer.of(sides.dests).count > most) break;
      set = longer;
    }
    body(set);
  }
}

// Whether of the products that matrix registers make, so many destinations at once, enough are wanted.
inline bool fills_registers(const Sides<BFloat16>& sides, int64_t dests_at_once) {
  constexpr int64_t least_share = 16;  // one in so many
  int64_t made = 0;
  for_each_set(sides, [&](const GroupSet& set) {
    made += round_up(set.of(sides.sources).count, block_depth) *
            round_up(set.of(sides.dests).count, dests_at_once);
  });
  return sides.problem.partition->entries() * least_share >= made;
}

}  // namespace
}  // namespace groupconv::cpu
