// Weights as drivers have packed them, kept for calls to come in as much memory as the user allows; at first none.
//
// What is kept belongs to one version of one weight, which who calls tells apart from others (torch/kept_weights.h);
// each way to pack it is known by its recipe. Where memory runs out, the weight goes that was not used for longest. What
// a call uses stays until it ends.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "cpu/packed_weight.h"

namespace groupconv::cpu {

class KeptWeight : public std::enable_shared_from_this<KeptWeight> {
 public:
  // `owner`: of the memory that begins here, which has not been read yet.
  KeptWeight(const void* begin, std::shared_ptr<const void> owner, int64_t version);
  ~KeptWeight();

  const void* begin() const { return begin_; }
  const void* owner() const { return owner_.get(); }
  int64_t version() const { return version_; }

 private:
  friend class KeptWeights;

  const void* begin_;
  std::shared_ptr<const void> owner_;
  int64_t version_;
  std::vector<std::unique_ptr<Packing>> packings_;
  int64_t bytes_ = 0;
  uint64_t last_use_ = 0;
  uint64_t generation_;
};

struct KeptCounts {
  int64_t bytes, hits, misses;  // the last two since `keep_weights`
};

// Drops what does not fit.
void keep_weights(int64_t most_bytes);
bool keeps_weights();  // any at all
KeptCounts kept_counts();

// What is kept of the weight that begins here, or null.
std::shared_ptr<KeptWeight> find_kept(const void* begin);
// It is out of date; without `begin` all may be.
void drop_kept(const void* begin);
void drop_kept();

}  // namespace groupconv::cpu
