// Which tensor a kept weight was packed from, and whether it has been written to since.
#pragma once

#include <memory>

#include "cpu/packed_weight.h"
#include "torch/arguments.h"

namespace groupconv::ops {

// Of a call's weight.
class TensorKeeper final : public cpu::WeightKeeper {
 public:
  explicit TensorKeeper(const Tensor& weight) : tensor_(weight) {}
  cpu::KeptWeight* weight() override;
  // Null where the user allows no memory.
  cpu::WeightKeeper* if_allowed();

 private:
  const Tensor& tensor_;
  std::shared_ptr<cpu::KeptWeight> kept_;
  bool asked_ = false;
};

}  // namespace groupconv::ops
