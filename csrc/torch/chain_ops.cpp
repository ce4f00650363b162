// The chain of pointwise convolutions on the CPU: check, allocate, describe the problem, call the kernels.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <tuple>
#include <vector>

#include "core/sweep.h"
#include "torch/cpu_ops.h"

namespace groupconv::ops {
namespace {

using Tensors = std::vector<Tensor>;
using Stages = std::vector<KnownPartition>;

// The channels between two stages, as the first of them says; reading its table holds it to that.
int64_t written_channels(const Tensor& table) {
  check_table(table);
  return table.numel() > 1 ? table.const_data_ptr<int32_t>()[1] : 0;
}

// The stages' tables, checked against each other and against the weights.
Stages read_stages(const Tensors& weights, const Tensors& tables, const Tensor& input, int64_t out_channels) {
  STD_TORCH_CHECK(!tables.empty() && weights.size() == tables.size(),
                  "a chain needs one weight and one table ", "for every stage and at least one stage, got ",
                  weights.size(), " weights and ", tables.size(), " tables");
  Stages stages;
  for (size_t s = 0; s < tables.size(); ++s) {
    const int64_t reads = s == 0 ? input.size(1) : stages.back()->out_channels;
    const int64_t writes = s + 1 == tables.size() ? out_channels : written_channels(tables[s]);
    stages.push_back(read_partition(tables[s], reads, writes));
    check_weight(weights[s], *stages.back());
    STD_TORCH_CHECK(weights[s].size(1) == 1 && weights[s].size(2) == 1, "the weight of stage ", s,
                    " must have a 1×1 window, got sizes ", sizes_text(weights[s]));
    check_like("weight", weights[s], "input", input);
  }
  return stages;
}

int64_t total_entries(const Stages& stages) {
  int64_t total = 0;
  for (const KnownPartition& stage : stages) total += stage->entries();
  return total;
}

// An image whose pixels follow each other at one distance; a copy where they do not.
Tensor flat_image(const Tensor& tensor) {
  if (image_of<const char>(tensor).flat()) return tensor;
  Tensor copy = empty_image(tensor, {tensor.size(0), tensor.size(1), tensor.size(2), tensor.size(3)}, false);
  torch::stable::copy_(copy, tensor);
  return copy;
}

template <class Compute>
std::vector<cpu::ChainStage<Compute>> describe(const Stages& partitions, const Tensors& weights) {
  std::vector<cpu::ChainStage<Compute>> stages;
  for (size_t s = 0; s < partitions.size(); ++s) {
    stages.push_back({partitions[s].get(), static_cast<const Compute*>(weights[s].data_ptr())});
  }
  return stages;
}

template <class Stored>
Tensors weights_for_compute(const Tensors& weights) {
  Tensors typed;
  for (const Tensor& weight : weights) typed.push_back(for_compute<Stored>(weight));
  return typed;
}

// A tile keeps every tensor of the chain, at most about one unit of pixels wide where they are many.
void check_channels_fit(const Stages& stages) {
  int64_t channels = stages.front()->in_channels;
  for (const KnownPartition& stage : stages) channels += stage->out_channels;
  STD_TORCH_CHECK(channels <= largest_setting, "a chain over ", channels, " channels in all is too large");
}

cpu::Threads threads_for_chain(int64_t entries, int64_t pixels) {
  if (entries == 0 || pixels < worth_a_thread / entries) return {};
  return torch_threads();
}

Tensor chain(const Tensor& input, const Tensors& weights, const std::optional<Tensor>& bias,
             const Tensors& tables, int64_t out_channels, int64_t activation) {
  check_image("input", input);
  const Stages stages = read_stages(weights, tables, input, out_channels);
  check_channels_fit(stages);
  const Activation activate = make_activation(activation);
  check_bias("bias", bias, input, out_channels);
  const auto sizes = output_sizes(Window{}, input.size(0), out_channels, input.size(2), input.size(3));
  check_dtype(input);

  Tensor output = empty_image(input, sizes, is_channels_last(input));
  if (output.numel() == 0) return output;

  const Tensor flat = flat_image(input);
  for_dtype(input, [&](auto element) {
    using Stored = decltype(element);
    using Compute = cpu::compute_t<Stored>;
    const Tensors typed = weights_for_compute<Stored>(weights);
    const auto described = describe<Compute>(stages, typed);
    const Tensor typed_bias = bias ? for_compute<Stored>(*bias) : typed.front();
    const int64_t pixels = sizes[2] * sizes[3];
    const Sweep sweep = one_row(pixels);
    cpu::ChainProblem<Stored> problem;
    problem.source = image_of<const Stored>(flat).as_row();
    problem.dest = image_of<Stored>(output).as_row();
    problem.stages = described.data();
    problem.count = static_cast<int64_t>(described.size());
    if (bias) problem.bias = static_cast<const Compute*>(typed_bias.data_ptr());
    problem.sweep = &sweep;
    problem.activation = activate;
    problem.threads = threads_for_chain(total_entries(stages), sizes[0] * pixels);
    cpu::typed<Stored>(cpu::kernels()).chain(problem);
  });
  return output;
}

std::tuple<Tensor, Tensor> chain_grad(const Tensor& grad, const Tensor& input, const Tensors& weights,
                                      const Tensors& tables, int64_t entries, bool needs_input_grad,
                                      bool needs_weight_grad) {
  check_image("input", input);
  check_image("grad", grad);
  const Stages stages = read_stages(weights, tables, input, grad.size(1));
  check_like("grad", grad, "input", input);
  check_sizes(
      "grad", grad,
      output_sizes(Window{}, input.size(0), stages.back()->out_channels, input.size(2), input.size(3)));
  STD_TORCH_CHECK(entries == total_entries(stages), "entries is ", entries, ", the partition tables say ",
                  total_entries(stages));
  check_channels_fit(stages);
  check_dtype(input);

  return for_dtype(input, [&](auto element) -> std::tuple<Tensor, Tensor> {
    using Stored = decltype(element);
    using Compute = cpu::compute_t<Stored>;
    Tensor input_grad = needs_input_grad
                            ? empty_image(input, {input.size(0), input.size(1), input.size(2), input.size(3)},
                                          is_channels_last(input))
                            : torch::stable::new_empty(input, {0});
    const int64_t pixels = input.size(2) * input.size(3);
    // A fixed cut of the batch, whatever the number of threads.
    const int64_t slices = std::clamp<int64_t>(input.size(0) * pixels / 1024, 1, 4);
    const Tensor total =
        torch::stable::new_zeros(input, {needs_weight_grad ? entries : 0}, compute_dtype<Stored>);
    if (input.size(0) * pixels > 0 && (needs_input_grad || needs_weight_grad)) {
      const Tensor flat = flat_image(input), flat_grad = flat_image(grad);
      const Tensors typed = weights_for_compute<Stored>(weights);
      const auto described = describe<Compute>(stages, typed);
      const Sweep sweep = one_row(pixels);
      cpu::ChainGradProblem<Stored> problem;
      problem.source = image_of<const Stored>(flat).as_row();
      problem.grad = image_of<const Stored>(flat_grad).as_row();
      if (needs_input_grad) problem.source_grad = image_of<Stored>(input_grad).as_row();
      if (needs_weight_grad) problem.weight_grad = static_cast<Compute*>(total.data_ptr());
      problem.slices = slices;
      problem.stages = described.data();
      problem.count = static_cast<int64_t>(described.size());
      problem.sweep = &sweep;
      problem.threads = threads_for_chain(entries, input.size(0) * pixels);
      cpu::typed<Stored>(cpu::kernels()).chain_grad(problem);
    }
    if (!needs_weight_grad) return {input_grad, torch::stable::new_empty(input, {0})};
    return {input_grad,
            std::is_same_v<Stored, Compute> ? total : torch::stable::to(total, ScalarType::BFloat16)};
  });
}

}  // namespace
}  // namespace groupconv::ops

STABLE_TORCH_LIBRARY_IMPL(groupconv, CPU, m) {
  m.impl("chain", TORCH_BOX(&groupconv::ops::chain));
  m.impl("chain_grad", TORCH_BOX(&groupconv::ops::chain_grad));
}
