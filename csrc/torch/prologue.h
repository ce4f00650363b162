// A prologue's tensors, checked, and as the kernels read them.
#pragma once

#include "core/prologue.h"
#include "torch/cpu_ops.h"

namespace groupconv::ops {

// Scale and shift may be kept in the type that is computed in, as a normalisation keeps them.
inline void check_prologue(const PrologueTensors& prologue, const Tensor& input) {
  const auto check = [&](const char* name, const std::optional<Tensor>& tensor) {
    if (!tensor) return;
    check_memory(name, *tensor);
    STD_TORCH_CHECK(tensor->dim() == 1 && tensor->size(0) == input.size(1), name, " must have sizes [",
                    input.size(1), "], got ", sizes_text(*tensor));
    STD_TORCH_CHECK(tensor->is_cpu(), name, " is on another device than input");
    const ScalarType computed =
        for_dtype(input, [](auto element) { return compute_dtype<decltype(element)>; });
    STD_TORCH_CHECK(tensor->scalar_type() == input.scalar_type() || tensor->scalar_type() == computed, name,
                    " has neither input's dtype nor the one that is computed in");
  };
  check("scale", prologue.scale);
  check("shift", prologue.shift);
}

template <class Stored>
class TypedPrologue {
  using Compute = cpu::compute_t<Stored>;

 public:
  TypedPrologue(const PrologueTensors* prologue, const Tensor& input) {
    if (!prologue) return;
    scale_ = prologue->scale ? for_compute<Stored>(*prologue->scale) : filled(input, 1);
    shift_ = prologue->shift ? for_compute<Stored>(*prologue->shift) : filled(input, 0);
    view_ = {static_cast<const Compute*>(scale_->data_ptr()), static_cast<const Compute*>(shift_->data_ptr()),
             prologue->relu};
  }

  const Prologue<Compute>& view() const { return view_; }

 private:
  static Tensor filled(const Tensor& input, Compute value) {
    Tensor tensor = torch::stable::new_empty(input, {input.size(1)}, compute_dtype<Stored>);
    std::fill_n(static_cast<Compute*>(tensor.data_ptr()), input.size(1), value);
    return tensor;
  }

  std::optional<Tensor> scale_, shift_;  // kept for as long as the view is used
  Prologue<Compute> view_;
};

}  // namespace groupconv::ops
