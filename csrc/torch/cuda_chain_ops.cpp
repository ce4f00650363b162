// The chain of pointwise convolutions on a CUDA device: check, allocate, describe the problem, launch. How many
// channels lie between two stages only the tables say, on the device; here a table's length bounds them.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "torch/cuda_device.h"

namespace groupconv::ops::on_cuda {
namespace {

using Tensors = std::vector<Tensor>;

struct Stages {
  Tensors weights;  // packed, kept for as long as the problem is used
  cuda::ChainProblem problem;
};

Stages read_stages(const Tensors& weights, const Tensors& tables, const Tensor& input, int64_t out_channels) {
  STD_TORCH_CHECK(!tables.empty() && weights.size() == tables.size(),
                  "a chain needs one weight and one table ", "for every stage and at least one stage, got ",
                  weights.size(), " weights and ", tables.size(), " tables");
  STD_TORCH_CHECK(tables.size() <= cuda::most_stages, "the CUDA chain takes up to ", cuda::most_stages,
                  " stages, got ", tables.size());
  Stages stages;
  int64_t reads = input.size(1);
  for (size_t s = 0; s < tables.size(); ++s) {
    check_packed_weight(weights[s], input, "input");
    STD_TORCH_CHECK(weights[s].size(1) == 1 && weights[s].size(2) == 1, "the weight of stage ", s,
                    " must have a 1×1 window, got sizes ", sizes_text(weights[s]));
    const bool is_last = s + 1 == tables.size();
    cuda::PlanProblem partition =
        plan_problem(tables[s], input, reads, is_last ? out_channels : 0, weights[s].size(0));
    partition.finds_outputs = !is_last;
    if (!is_last) partition.out_channels = tables[s].numel() - cuda::shortest_table(0);
    reads = partition.out_channels;
    stages.weights.push_back(packed(weights[s]));
    stages.problem.stages[s] = {partition, stages.weights.back().data_ptr()};
    stages.problem.entries += partition.entries;
  }
  stages.problem.count = static_cast<int>(tables.size());
  return stages;
}

Tensor chain(const Tensor& input, const Tensors& weights, const std::optional<Tensor>& bias,
             const Tensors& tables, int64_t out_channels, int64_t activation) {
  check_image("input", input);
  const auto sizes = output_sizes(Window{}, input.size(0), out_channels, input.size(2), input.size(3));
  check_bias("bias", bias, input, out_channels);
  const cuda::Element element = element_of(input);
  const Activation activate = make_activation(activation);

  const OnDevice device(input);
  Stages stages = read_stages(weights, tables, input, out_channels);
  Tensor output = empty_image(input, sizes, is_channels_last(input));
  if (output.numel() == 0) return output;
  cuda::ChainProblem& problem = stages.problem;
  const Tensor packed_bias = bias ? packed(*bias) : stages.weights.front();
  const Tensor plans = scratch(input, cuda::chain_plan_words(problem, false), ScalarType::Long);
  problem.input = image_of<const void>(input);
  problem.output = image_of<void>(output);
  if (bias) problem.bias = packed_bias.data_ptr();
  problem.activation = activate;
  problem.plans = static_cast<int64_t*>(plans.data_ptr());
  check_launch(cuda::run_chain(element, problem, device.stream()));
  return output;
}

std::tuple<Tensor, Tensor> chain_grad(const Tensor& grad, const Tensor& input, const Tensors& weights,
                                      const Tensors& tables, int64_t entries, bool needs_input_grad,
                                      bool needs_weight_grad) {
  check_image("input", input);
  check_image("grad", grad);
  check_like("grad", grad, "input", input);
  check_sizes("grad", grad,
              output_sizes(Window{}, input.size(0), grad.size(1), input.size(2), input.size(3)));
  const cuda::Element element = element_of(input);

  const OnDevice device(input);
  Stages stages = read_stages(weights, tables, input, grad.size(1));
  cuda::ChainProblem& problem = stages.problem;
  STD_TORCH_CHECK(entries == problem.entries, "entries is ", entries, ", the weights have ", problem.entries);
  Tensor input_grad = needs_input_grad ? empty_image(input, sizes_of(input), is_channels_last(input))
                                       : torch::stable::new_empty(input, {0});
  Tensor weight_grad = torch::stable::new_empty(input, {needs_weight_grad ? entries : 0});
  const int64_t pixels = input.size(0) * input.size(2) * input.size(3);
  if (pixels == 0) torch::stable::zero_(weight_grad);
  if (pixels == 0 || (input_grad.numel() == 0 && weight_grad.numel() == 0)) return {input_grad, weight_grad};

  problem.blocks = cuda::chain_blocks(pixels, entries);
  const Tensor plans = scratch(input, cuda::chain_plan_words(problem, true), ScalarType::Long);
  const Tensor partial = scratch(input, problem.blocks * weight_grad.numel(), sum_type(input));
  problem.input = image_of<const void>(input);
  problem.grad = image_of<const void>(grad);
  if (needs_input_grad) problem.output = image_of<void>(input_grad);
  if (weight_grad.numel() > 0) problem.partial = partial.data_ptr();
  problem.plans = static_cast<int64_t*>(plans.data_ptr());
  check_launch(cuda::run_chain_grad(element, problem, weight_grad.data_ptr(), device.stream()));
  return {input_grad, weight_grad};
}

}  // namespace
}  // namespace groupconv::ops::on_cuda

STABLE_TORCH_LIBRARY_IMPL(groupconv, GROUPCONV_CUDA_KEY, m) {
  m.impl("chain", TORCH_BOX(&groupconv::ops::on_cuda::chain));
  m.impl("chain_grad", TORCH_BOX(&groupconv::ops::on_cuda::chain_grad));
}
