// The sums of a weight gradient by pairs of pixels, from their blocks of 16 inputs × 16 outputs to the packed gradient.
#pragma once

#include "cpu/gradients/correlate_pairs.h"
#include "cpu/kernels.h"
#include "cpu/staging/slices.h"
#include "cpu/staging/workspace.h"
#include "cpu/vector/sums_seen.h"

namespace groupconv::cpu {
namespace {

// Of some slices of the batch, of each group [16 inputs][16 outputs][tap][output][input].
class PairGradSums {
 public:
  explicit PairGradSums(const WeightGradProblem<BFloat16>& problem)
      : p_(problem),
        taps_(static_cast<int64_t>(p_.sweep->taps.size())),
        slices_(slices_at_once(p_.threads, p_.slices)),
        memory_(plan()) {
    space_.open(memory_);
    first_ = space_.take<float>(slices_ * size_);
    starts_ = space_.take<int64_t>(p_.partition->groups);
    int64_t start = 0;
    for (int64_t g = 0; g < p_.partition->groups; ++g) {
      starts_[g] = start;
      start += of_group(g);
    }
  }

  // `slice`: of those that are made at once.
  float* of(int64_t slice, int64_t group) const { return first_ + slice * size_ + starts_[group]; }

  // How many: of a group, of 16 inputs of one, and of 16 of its outputs as well.
  int64_t of_group(int64_t group) const {
    return divide_up(p_.partition->inputs.count(group), block_cols) * of_inputs(group);
  }
  int64_t of_inputs(int64_t group) const {
    return divide_up(p_.partition->outputs.count(group), block_rows) * of_block();
  }
  int64_t of_block() const { return taps_ * block_sums; }

  // Those of `slices` slices, in order, to the packed gradient, to which the first slices' are not added. Whether all
  // are finite.
  bool store(int64_t group, int64_t slices, bool adds) const {
    constexpr int64_t lanes = Vec<float>::lanes;
    const PartitionView& partition = *p_.partition;
    const int64_t area = p_.window_area, ins = partition.inputs.count(group),
                  outs = partition.outputs.count(group);
    Workspace space;
    space.plan<int32_t>(block_cols * area);
    space.plan<uint32_t>(area);
    space.open();
    int32_t* entries = space.take<int32_t>(block_cols * area);
    uint32_t* made = space.take<uint32_t>(area);
    list_entries(entries, made);

    float* to_rows = p_.weight_grad + partition.weight_offsets[static_cast<size_t>(group)] * area;
    int64_t start = 0;
    SumsSeen seen;
    for (int64_t i = 0; i < ins; i += block_cols) {
      const int64_t count = smaller(block_cols, ins - i) * area;
      for (int64_t r = 0; r < outs; r += block_rows, start += of_block()) {
        float* sums = of(0, group) + start;
        for (int64_t slice = 1; slice < slices && !adds; ++slice) {
          const float* more = of(slice, group) + start;
          for (int64_t at = 0; at < of_block(); at += lanes) {
            (Vec<float>::load(sums + at) + Vec<float>::load(more + at)).store(sums + at);
          }
        }
        for (int64_t row = r; row < smaller(r + block_rows, outs); ++row, sums += block_cols) {
          float* to = to_rows + (row * ins + i) * area;
          for (int64_t e = 0; e < count; e += lanes) {
            const auto mask = Vec<float>::first(smaller(lanes, count - e));
            const auto summed = Vec<float>::from_bits(made[e / lanes]);
            const auto entry = [&](const float* from) GROUPCONV_INLINE_LAMBDA {
              return area == 1 ? Vec<float>::load(from, mask)
                               : Vec<float>::gather(from, entries + e, mask & summed);
            };
            Vec<float> x = adds ? Vec<float>::load(to + e, mask) + entry(sums) : entry(sums);
            for (int64_t slice = 1; slice < slices && adds; ++slice) x = x + entry(sums + slice * size_);
            seen.look(x).store(to + e, mask);
          }
        }
      }
    }
    return seen.all_finite();
  }

 private:
  size_t plan() {
    for (int64_t g = 0; g < p_.partition->groups; ++g) size_ += of_group(g);
    space_.plan<float>(slices_ * size_);
    space_.plan<int64_t>(p_.partition->groups);
    return space_.bytes();
  }

  // The entries of 16 inputs in a row of the packed gradient: where they are among the sums of the taps, and
  // which of them some tap makes.
  void list_entries(int32_t* entries, uint32_t* made) const {
    constexpr int64_t lanes = Vec<float>::lanes;
    const int64_t area = p_.window_area;
    fill_zero(entries, block_cols * area);
    fill_zero(made, area);
    for (int64_t t = 0; t < taps_; ++t) {
      for (int64_t i = 0; i < block_cols; ++i) {
        const int64_t entry = i * area + p_.sweep->taps[static_cast<size_t>(t)].weight;
        entries[entry] = static_cast<int32_t>(t * block_sums + i);
        made[entry / lanes] |= uint32_t{1} << entry % lanes;
      }
    }
  }

  const WeightGradProblem<BFloat16>& p_;
  int64_t taps_;
  int64_t slices_;    // at once
  int64_t size_ = 0;  // of a slice
  Workspace space_;
  SharedScratch memory_;
  float* first_;
  int64_t* starts_;
};

}  // namespace
}  // namespace groupconv::cpu
