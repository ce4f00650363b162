// What a driver packs of a weight, where its caller keeps that for calls to come (kept_weights.h).
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/partition.h"
#include "core/sweep.h"

namespace groupconv::cpu {

// All that packing depends on, but for the weight.
struct Recipe {
  const void* packer = nullptr;  // an address of its own for each driver, type and instruction set
  int64_t detail = 0;            // what the driver decides besides
  const PartitionView* partition = nullptr;
  const Sweep* sweep = nullptr;  // its taps; not how many pixels it visits
  int64_t window_area = 1;
  bool transposed = false;
  size_t bytes = 0;  // of the result
};

class KeptWeight;
class Packing;

// Who knows whether the weight of a call may be kept, and what is kept of it. Only drivers that pack it ask, since
// that costs half a microsecond.
class WeightKeeper {
 public:
  virtual KeptWeight* weight() = 0;  // null: it may not

 protected:
  ~WeightKeeper() = default;
};

// Memory of one packed weight, for as long as the call lasts.
class PackedWeight {
 public:
  PackedWeight() = default;
  PackedWeight(const PackedWeight&) = delete;
  ~PackedWeight();

  void open(WeightKeeper& keeper, const Recipe& recipe);
  void* memory() const { return memory_; }  // 64-byte aligned; null: it is not kept
  bool filled() const { return filled_; }   // by an earlier call
  void keep();                              // what this call has packed there

 private:
  KeptWeight* weight_ = nullptr;
  Packing* packing_ = nullptr;  // while it is this call's own
  Recipe recipe_;
  void* memory_ = nullptr;
  bool filled_ = false;
};

}  // namespace groupconv::cpu
