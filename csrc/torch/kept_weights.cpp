// A weight is the same where it is the same part of the same storage, in the same version. What is kept holds the
// storage, through a tensor of its own, so no other can take its place in memory, and compares storages and not only
// addresses, since one that does not own its memory cannot hold it.
#include "torch/kept_weights.h"

#include <torch/csrc/stable/library.h>

#include <array>
#include <tuple>

#include "cpu/kept_weights.h"

namespace groupconv::ops {
namespace {

using torch::stable::detail::from;
using torch::stable::detail::to;

// The C interface to torch has no function for these.
template <class Result, class... Tensors>
Result ask_torch(const char* op, const Tensors&... tensors) {
  std::array<StableIValue, sizeof...(tensors)> stack{from(tensors)...};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(op, "", stack.data(), TORCH_ABI_VERSION));
  return to<Result>(stack[0]);
}
// A tensor made in inference mode has none.
bool has_version(const Tensor& tensor) { return !ask_torch<bool>("aten::is_inference", tensor); }
int64_t version_of(const Tensor& tensor) { return ask_torch<int64_t>("aten::_version", tensor); }
bool is_same_part(const Tensor& one, const Tensor& other) {
  return ask_torch<bool>("aten::is_set_to", one, other);
}

// A tensor of its own on the same storage.
Tensor alias_of(const Tensor& tensor) {
  AtenTensorHandle handle;
  const auto sizes = tensor.sizes(), strides = tensor.strides();
  TORCH_ERROR_CODE_CHECK(aoti_torch__reinterpret_tensor(tensor.get(), tensor.dim(), sizes.data(),
                                                        strides.data(), tensor.storage_offset(), &handle));
  return Tensor(handle);
}

// What is kept holds the whole storage, which may be many weights, or something else of which this is a part.
bool is_most_of_storage(const Tensor& tensor) {
  int64_t bytes = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_size(tensor.get(), &bytes));
  return bytes <= 2 * tensor.numel() * static_cast<int64_t>(tensor.element_size());
}

std::shared_ptr<cpu::KeptWeight> kept_of(const Tensor& tensor) {
  if (!has_version(tensor) || !is_most_of_storage(tensor)) return nullptr;
  const void* begin = tensor.const_data_ptr();
  const int64_t version = version_of(tensor);
  if (auto kept = cpu::find_kept(begin)) {
    if (version == kept->version() && is_same_part(*static_cast<const Tensor*>(kept->owner()), tensor)) {
      return kept;
    }
    cpu::drop_kept(begin);
  }
  return std::make_shared<cpu::KeptWeight>(begin, std::make_shared<const Tensor>(alias_of(tensor)), version);
}

void drop_kept_weights() { cpu::drop_kept(); }

void keep_weights(int64_t most_bytes) {
  STD_TORCH_CHECK(most_bytes >= 0, "most_bytes must not be negative, got ", most_bytes);
  cpu::keep_weights(most_bytes);
}

std::tuple<int64_t, int64_t, int64_t> kept_weights() {
  const cpu::KeptCounts counts = cpu::kept_counts();
  return {counts.bytes, counts.hits, counts.misses};
}

}  // namespace

cpu::WeightKeeper* TensorKeeper::if_allowed() { return cpu::keeps_weights() ? this : nullptr; }

cpu::KeptWeight* TensorKeeper::weight() {
  if (!asked_) kept_ = kept_of(tensor_);
  asked_ = true;
  return kept_.get();
}

}  // namespace groupconv::ops

STABLE_TORCH_LIBRARY_IMPL(groupconv, CompositeExplicitAutograd, m) {
  m.impl("keep_weights", TORCH_BOX(&groupconv::ops::keep_weights));
  m.impl("drop_kept_weights", TORCH_BOX(&groupconv::ops::drop_kept_weights));
  m.impl("kept_weights", TORCH_BOX(&groupconv::ops::kept_weights));
}
