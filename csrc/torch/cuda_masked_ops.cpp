// The ops on learned groups on a CUDA device. Labels and gates stay on it: nothing here waits to look at them,
// so what the CPU's ops refuse with an error, a label out of range or numbers that are not finite, becomes NaN
// in the results instead.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "core/labels.h"
#include "torch/cuda_device.h"

namespace groupconv::ops::on_cuda {
namespace {

int64_t window_area(const Tensor& weight, int64_t first) {
  int64_t area = 1;
  for (int64_t d = first; d < weight.dim(); ++d) area *= weight.size(d);
  return area;
}

Tensor empty_with_window_of(const Tensor& like, int64_t first, std::vector<int64_t> sizes, ScalarType dtype) {
  for (int64_t d = first; d < like.dim(); ++d) sizes.push_back(like.size(d));
  return torch::stable::new_empty(like, {sizes.data(), sizes.size()}, dtype);
}

void check_labels(const char* name, const Tensor& labels, const Tensor& like) {
  STD_TORCH_CHECK(on_device_of(labels, like) && labels.dim() == 1 &&
                      labels.scalar_type() == ScalarType::Int && labels.is_contiguous(),
                  name,
                  " must be a contiguous 1-d int32 tensor on the device of the other operands, got sizes ",
                  sizes_text(labels));
  check_memory(name, labels);
}

void check_dense(const char* name, const Tensor& weight, int64_t out_channels, int64_t in_channels) {
  STD_TORCH_CHECK(weight.dim() >= 2 && weight.size(0) == out_channels && weight.size(1) == in_channels, name,
                  " must have sizes [", out_channels, ", ", in_channels, ", *kernel], got ",
                  sizes_text(weight));
  check_memory(name, weight);
}

const int32_t* labels_of(const Tensor& labels) { return static_cast<const int32_t*>(labels.data_ptr()); }

// The table of labels, made on the device, and what the kernels need beside it.
struct Labelled {
  Tensor table;
  Groups groups;

  Labelled(const Tensor& in_labels, const Tensor& out_labels, int64_t group_count, const Tensor& like,
           cudaStream_t stream)
      : table(scratch(like, cuda::label_table_length(in_labels.numel(), out_labels.numel(), group_count),
                      ScalarType::Int)) {
    check_setting("in_channels", in_labels.numel(), 0);
    check_setting("out_channels", out_labels.numel(), 0);
    auto* entries = static_cast<int32_t*>(table.data_ptr());
    check_launch(cuda::run_label_table(labels_of(in_labels), in_labels.numel(), labels_of(out_labels),
                                       out_labels.numel(), group_count, entries, stream));
    cuda::PlanProblem& problem = groups.partition;
    problem.table = entries;
    problem.length = table.numel();
    problem.in_channels = in_labels.numel();
    problem.out_channels = out_labels.numel();
    // Not known here. Few of the labels that there may be are in use, as a rule.
    constexpr int64_t most_in_use = 8;
    problem.entries = in_labels.numel() * out_labels.numel() / std::min(group_count, most_in_use);
    problem.checks_entries = false;
    groups.in_labels = labels_of(in_labels);
    groups.out_labels = labels_of(out_labels);
  }
};

void check_operands(const Tensor& in_labels, const Tensor& out_labels, int64_t groups, const Tensor& like) {
  check_labels("in_labels", in_labels, like);
  check_labels("out_labels", out_labels, like);
  check_setting("groups", groups, 1);
}

// The dense weight in the type of the other operand.
Tensor dense_like(const Tensor& weight, const Tensor& like, const Tensor& in_labels,
                  const Tensor& out_labels) {
  check_dense("weight", weight, out_labels.numel(), in_labels.numel());
  STD_TORCH_CHECK(weight.dim() == 4, "weight must have sizes [N, C, kh, kw], got ", sizes_text(weight));
  STD_TORCH_CHECK(on_device_of(weight, like), "weight is on another device than the image");
  element_of(weight);  // or an error
  return weight.scalar_type() == like.scalar_type() ? weight : torch::stable::to(weight, like.scalar_type());
}

Tensor labelled_conv2d(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias,
                       const Tensor& in_labels, const Tensor& out_labels, int64_t groups, int64_t stride_h,
                       int64_t stride_w, int64_t pad_top, int64_t pad_bottom, int64_t pad_left,
                       int64_t pad_right, int64_t dilation_h, int64_t dilation_w) {
  check_image("input", input);
  check_operands(in_labels, out_labels, groups, input);
  STD_TORCH_CHECK(input.size(1) == in_labels.numel(), "input has ", input.size(1), " channels, in_labels ",
                  in_labels.numel());
  const Tensor typed = dense_like(weight, input, in_labels, out_labels);
  const OnDevice device(input);
  const Labelled labelled(in_labels, out_labels, groups, input, device.stream());
  return convolve(
      nullptr, input, typed, bias, std::nullopt, labelled.groups,
      window_of(weight, stride_h, stride_w, pad_top, pad_bottom, pad_left, pad_right, dilation_h, dilation_w),
      0);
}

Tensor labelled_conv2d_input_grad(const Tensor& grad, const Tensor& weight, const Tensor& in_labels,
                                  const Tensor& out_labels, int64_t groups, int64_t height, int64_t width,
                                  int64_t stride_h, int64_t stride_w, int64_t pad_top, int64_t pad_bottom,
                                  int64_t pad_left, int64_t pad_right, int64_t dilation_h, int64_t dilation_w,
                                  bool channels_last) {
  check_image("grad", grad);
  check_operands(in_labels, out_labels, groups, grad);
  const Tensor typed = dense_like(weight, grad, in_labels, out_labels);
  const OnDevice device(grad);
  const Labelled labelled(in_labels, out_labels, groups, grad, device.stream());
  return convolve_input_grad(
      grad, typed, labelled.groups,
      window_of(weight, stride_h, stride_w, pad_top, pad_bottom, pad_left, pad_right, dilation_h, dilation_w),
      height, width, channels_last);
}

Tensor labelled_conv2d_weight_grad(const Tensor& grad, const Tensor& input, const Tensor& in_labels,
                                   const Tensor& out_labels, int64_t groups, int64_t kernel_h,
                                   int64_t kernel_w, int64_t stride_h, int64_t stride_w, int64_t pad_top,
                                   int64_t pad_bottom, int64_t pad_left, int64_t pad_right,
                                   int64_t dilation_h, int64_t dilation_w) {
  check_image("input", input);
  check_operands(in_labels, out_labels, groups, input);
  STD_TORCH_CHECK(input.size(1) == in_labels.numel(), "input has ", input.size(1), " channels, in_labels ",
                  in_labels.numel());
  const OnDevice device(input);
  const Labelled labelled(in_labels, out_labels, groups, input, device.stream());
  return convolve_weight_grad(nullptr, grad, input, labelled.groups,
                              make_window(kernel_h, kernel_w, stride_h, stride_w, pad_top, pad_bottom,
                                          pad_left, pad_right, dilation_h, dilation_w));
}

// One group of all channels, whose packed weight is the dense one.
Tensor dense_conv2d_weight_grad(const Tensor& grad, const Tensor& input, int64_t kernel_h, int64_t kernel_w,
                                int64_t stride_h, int64_t stride_w, int64_t pad_top, int64_t pad_bottom,
                                int64_t pad_left, int64_t pad_right, int64_t dilation_h, int64_t dilation_w) {
  check_image("grad", grad);
  check_image("input", input);
  const int64_t ins = input.size(1), outs = grad.size(1);
  check_setting("in_channels", ins, 0);
  check_setting("out_channels", outs, 0);
  const OnDevice device(input);
  const Tensor table = scratch(input, cuda::label_table_length(ins, outs, 1), ScalarType::Int);
  check_launch(cuda::run_label_table(nullptr, ins, nullptr, outs, 1, static_cast<int32_t*>(table.data_ptr()),
                                     device.stream()));
  const Tensor flat =
      convolve_weight_grad(nullptr, grad, input, {plan_problem(table, input, ins, outs, ins * outs)},
                           make_window(kernel_h, kernel_w, stride_h, stride_w, pad_top, pad_bottom, pad_left,
                                       pad_right, dilation_h, dilation_w));
  return torch::stable::view(flat, {outs, ins, kernel_h, kernel_w});
}

// ---- packing and masks -----------------------------------------------------------------------------

Tensor move_packed(const Tensor& given, const cuda::PlanProblem& partition, bool pack, Tensor to,
                   int64_t area) {
  if (to.numel() == 0) return to;
  const OnDevice device(given);
  if (!pack) torch::stable::zero_(to);
  const Tensor from = packed(given);
  const Tensor plan = scratch(given, cuda::Plan(nullptr, partition).words(), ScalarType::Long);
  cuda::PackProblem problem;
  problem.from = from.data_ptr();
  problem.to = to.data_ptr();
  problem.from_element = element_of(given);
  problem.to_element = element_of(to);
  problem.pack = pack;
  problem.partition = partition;
  problem.area = area;
  problem.to_count = to.numel();
  problem.plan = static_cast<int64_t*>(plan.data_ptr());
  check_launch(cuda::run_pack(problem, device.stream()));
  return to;
}

Tensor pack(const Tensor& dense, const Tensor& table, int64_t entries, bool narrow) {
  STD_TORCH_CHECK(dense.dim() >= 2, "dense must have sizes [N, C, *kernel], got ", sizes_text(dense));
  check_memory("dense", dense);
  STD_TORCH_CHECK(entries >= 0, "entries must not be negative, got ", entries);
  STD_TORCH_CHECK(!narrow || dense.scalar_type() == ScalarType::Float,
                  "only a float32 weight can be narrowed to bfloat16");
  element_of(dense);  // or an error
  const auto partition = plan_problem(table, dense, dense.size(1), dense.size(0), entries);
  Tensor to = empty_with_window_of(dense, 2, {entries}, narrow ? ScalarType::BFloat16 : dense.scalar_type());
  return move_packed(dense, partition, true, to, window_area(dense, 2));
}

Tensor unpack(const Tensor& packed_weight, const Tensor& table, int64_t out_channels, int64_t in_channels,
              bool widen) {
  STD_TORCH_CHECK(packed_weight.dim() >= 1, "the packed weight must have sizes [entries, *kernel]");
  check_memory("the packed weight", packed_weight);
  STD_TORCH_CHECK(!widen || packed_weight.scalar_type() == ScalarType::BFloat16,
                  "only a bfloat16 weight can be widened to float32");
  element_of(packed_weight);  // or an error
  const auto partition = plan_problem(table, packed_weight, in_channels, out_channels, packed_weight.size(0));
  Tensor to = empty_with_window_of(packed_weight, 1, {out_channels, in_channels},
                                   widen ? ScalarType::Float : packed_weight.scalar_type());
  return move_packed(packed_weight, partition, false, to, window_area(packed_weight, 1));
}

void run_mask(const Tensor& from, const Tensor& to, const Tensor& in_labels, const Tensor& out_labels,
              cudaStream_t stream) {
  if (to.numel() == 0) return;
  cuda::MaskProblem problem;
  problem.from = from.data_ptr();
  problem.to = to.data_ptr();
  problem.in_labels = labels_of(in_labels);
  problem.out_labels = labels_of(out_labels);
  problem.in_channels = in_labels.numel();
  problem.out_channels = out_labels.numel();
  problem.area = window_area(from, 2);
  check_launch(cuda::run_mask(element_of(from), problem, stream));
}

Tensor mask_weight(const Tensor& weight, const Tensor& in_labels, const Tensor& out_labels) {
  check_labels("in_labels", in_labels, weight);
  check_labels("out_labels", out_labels, weight);
  check_dense("weight", weight, out_labels.numel(), in_labels.numel());
  element_of(weight);  // or an error
  const OnDevice device(weight);
  Tensor masked = empty_with_window_of(weight, 0, {}, weight.scalar_type());
  run_mask(packed(weight), masked, in_labels, out_labels, device.stream());
  return masked;
}

// ---- FLGC ------------------------------------------------------------------------------------------

Tensor row_labels(const Tensor& logits, const std::string& owner) {
  STD_TORCH_CHECK(logits.dim() == 2 && logits.size(1) > 0, owner, " must have sizes [channels, groups], got ",
                  sizes_text(logits));
  check_memory("logits", logits);
  const OnDevice device(logits);
  Tensor labels = scratch(logits, logits.size(0), ScalarType::Int);
  const Tensor rows = packed(logits);
  check_launch(cuda::run_row_labels(element_of(logits), rows.data_ptr(), logits.size(0), logits.size(1),
                                    static_cast<int32_t*>(labels.data_ptr()), device.stream()));
  return labels;
}

void check_logits(const char* name, const Tensor& logits, int64_t channels, int64_t groups,
                  const Tensor& weight) {
  check_like(name, logits, "weight", weight);
  STD_TORCH_CHECK(logits.dim() == 2 && logits.size(0) == channels && logits.size(1) == groups, name,
                  " must have sizes [", channels, ", ", groups, "], got ", sizes_text(logits));
}

// The gradients of weight, input and output logits; without `masked` the first is empty: it is `grad`.
std::tuple<Tensor, Tensor, Tensor> label_grad(const Tensor& grad, const Tensor& weight,
                                              const Tensor& input_logits, const Tensor& output_logits,
                                              const Tensor& in_labels, const Tensor& out_labels, bool winner,
                                              bool masked) {
  STD_TORCH_CHECK(input_logits.dim() == 2, "input_logits must have sizes [channels, groups], got ",
                  sizes_text(input_logits));
  const int64_t groups = input_logits.size(1), ins = in_labels.numel(), outs = out_labels.numel();
  check_operands(in_labels, out_labels, groups, grad);
  check_dense("grad", grad, outs, ins);
  check_dense("weight", weight, outs, ins);
  check_like("weight", weight, "grad", grad);
  check_logits("input_logits", input_logits, ins, groups, weight);
  check_logits("output_logits", output_logits, outs, groups, weight);
  const int64_t area = window_area(weight, 2);
  STD_TORCH_CHECK(window_area(grad, 2) == area, "grad has sizes ", sizes_text(grad), ", weight ",
                  sizes_text(weight));
  element_of(weight);  // or an error

  const OnDevice device(grad);
  const Labelled labelled(in_labels, out_labels, groups, grad, device.stream());
  const Tensor typed_grad = packed(grad), typed_weight = packed(weight);
  const Tensor ins_of = packed(input_logits), outs_of = packed(output_logits);
  Tensor weight_grad =
      masked ? empty_with_window_of(weight, 0, {}, grad.scalar_type()) : torch::stable::new_empty(grad, {0});
  Tensor input_grad = torch::stable::new_empty(grad, {ins, groups});
  Tensor output_grad = torch::stable::new_empty(grad, {outs, groups});
  if (masked) run_mask(typed_grad, weight_grad, in_labels, out_labels, device.stream());
  const Tensor plan = scratch(grad, cuda::Plan(nullptr, labelled.groups.partition).words(), ScalarType::Long);
  const Tensor by_input = scratch(grad, ins * groups, sum_type(grad));
  const Tensor by_output = scratch(grad, outs * groups, sum_type(grad));
  cuda::LabelGradProblem problem;
  problem.grad = typed_grad.data_ptr();
  problem.weight = typed_weight.data_ptr();
  problem.area = area;
  problem.groups = groups;
  problem.partition = labelled.groups.partition;
  problem.plan = static_cast<int64_t*>(plan.data_ptr());
  problem.by_input = by_input.data_ptr();
  problem.by_output = by_output.data_ptr();
  problem.input_logits = ins_of.data_ptr();
  problem.output_logits = outs_of.data_ptr();
  problem.input_logit_grad = input_grad.data_ptr();
  problem.output_logit_grad = output_grad.data_ptr();
  if (winner) {
    problem.in_winners = labels_of(in_labels);
    problem.out_winners = labels_of(out_labels);
  }
  check_launch(cuda::run_label_grad(element_of(grad), problem, device.stream()));
  return {weight_grad, input_grad, output_grad};
}

// ---- DGConv ----------------------------------------------------------------------------------------

cuda::KroneckerFactors factors_of(const Tensor& gates, int64_t in_channels, int64_t out_channels,
                                  const std::string& owner) {
  check_setting("in_channels", in_channels, 1);
  check_setting("out_channels", out_channels, 1);
  const std::vector<int64_t> radices = Kronecker::radices(in_channels, out_channels);
  STD_TORCH_CHECK(gates.dim() == 1 && gates.size(0) == static_cast<int64_t>(radices.size()), owner,
                  " must have sizes [", radices.size(), "], one for every prime factor of gcd(", in_channels,
                  ", ", out_channels, "), got ", sizes_text(gates));
  check_memory("gates", gates);
  element_of(gates);  // or an error
  cuda::KroneckerFactors factors;
  factors.in_channels = in_channels;
  factors.out_channels = out_channels;
  factors.count = static_cast<int>(radices.size());
  for (int k = 0; k < factors.count; ++k) factors.radices[k] = static_cast<int32_t>(radices[k]);
  return factors;
}

// Their sign decides, so they must not lose it in a narrower type.
Tensor wide_gates(const Tensor& gates) { return packed(torch::stable::to(gates, ScalarType::Double)); }

std::tuple<Tensor, Tensor> kronecker_labels(const Tensor& gates, int64_t in_channels, int64_t out_channels,
                                            const std::string& owner) {
  const cuda::KroneckerFactors factors = factors_of(gates, in_channels, out_channels, owner);
  const OnDevice device(gates);
  Tensor ins = scratch(gates, in_channels, ScalarType::Int),
         outs = scratch(gates, out_channels, ScalarType::Int);
  const Tensor wide = wide_gates(gates);
  check_launch(cuda::run_kronecker_labels(factors, static_cast<const double*>(wide.data_ptr()),
                                          static_cast<int32_t*>(ins.data_ptr()),
                                          static_cast<int32_t*>(outs.data_ptr()), device.stream()));
  return {ins, outs};
}

std::tuple<Tensor, Tensor> kronecker_grad(const Tensor& grad, const Tensor& weight, const Tensor& gates) {
  STD_TORCH_CHECK(weight.dim() >= 2, "weight must have sizes [N, C, *kernel], got ", sizes_text(weight));
  cuda::KroneckerGradProblem problem;
  problem.factors = factors_of(gates, weight.size(1), weight.size(0), "gates");
  STD_TORCH_CHECK(on_device_of(gates, weight), "gates are on another device than weight");
  check_dense("weight", weight, weight.size(0), weight.size(1));
  check_dense("grad", grad, weight.size(0), weight.size(1));
  check_like("weight", weight, "grad", grad);
  problem.area = window_area(weight, 2);
  STD_TORCH_CHECK(window_area(grad, 2) == problem.area, "grad has sizes ", sizes_text(grad), ", weight ",
                  sizes_text(weight));
  element_of(weight);  // or an error

  const OnDevice device(weight);
  Tensor weight_grad = empty_with_window_of(weight, 0, {}, weight.scalar_type());
  Tensor gate_grad = torch::stable::new_zeros(weight, {problem.factors.count}, sum_type(weight));
  if (weight.numel() == 0) return {weight_grad, gate_grad};
  const Tensor typed_grad = packed(grad), typed_weight = packed(weight), wide = wide_gates(gates);
  problem.slices = cuda::kronecker_slices(weight.size(0) * weight.size(1));
  const Tensor partial = scratch(weight, problem.slices * problem.factors.count, sum_type(weight));
  problem.gates = static_cast<const double*>(wide.data_ptr());
  problem.grad = typed_grad.data_ptr();
  problem.weight = typed_weight.data_ptr();
  problem.weight_grad = weight_grad.data_ptr();
  problem.gate_grad = gate_grad.data_ptr();
  problem.partial = partial.data_ptr();
  check_launch(cuda::run_kronecker_grad(element_of(weight), problem, device.stream()));
  return {weight_grad, gate_grad};
}

// All of the dense gradient, of which the gates decide what counts: they are not known here.
std::tuple<Tensor, Tensor> kronecker_conv2d_grad(const Tensor& grad, const Tensor& input,
                                                 const Tensor& weight, const Tensor& gates, int64_t stride_h,
                                                 int64_t stride_w, int64_t pad_top, int64_t pad_bottom,
                                                 int64_t pad_left, int64_t pad_right, int64_t dilation_h,
                                                 int64_t dilation_w) {
  STD_TORCH_CHECK(weight.dim() == 4, "weight must have sizes [N, C, kh, kw], got ", sizes_text(weight));
  Tensor dense = dense_conv2d_weight_grad(grad, input, weight.size(2), weight.size(3), stride_h, stride_w,
                                          pad_top, pad_bottom, pad_left, pad_right, dilation_h, dilation_w);
  if (dense.scalar_type() != weight.scalar_type()) dense = torch::stable::to(dense, weight.scalar_type());
  return kronecker_grad(dense, weight, gates);
}

}  // namespace
}  // namespace groupconv::ops::on_cuda

STABLE_TORCH_LIBRARY_IMPL(groupconv, GROUPCONV_CUDA_KEY, m) {
  m.impl("pack", TORCH_BOX(&groupconv::ops::on_cuda::pack));
  m.impl("unpack", TORCH_BOX(&groupconv::ops::on_cuda::unpack));
  m.impl("row_labels", TORCH_BOX(&groupconv::ops::on_cuda::row_labels));
  m.impl("kronecker_labels", TORCH_BOX(&groupconv::ops::on_cuda::kronecker_labels));
  m.impl("labelled_conv2d", TORCH_BOX(&groupconv::ops::on_cuda::labelled_conv2d));
  m.impl("labelled_conv2d_input_grad", TORCH_BOX(&groupconv::ops::on_cuda::labelled_conv2d_input_grad));
  m.impl("labelled_conv2d_weight_grad", TORCH_BOX(&groupconv::ops::on_cuda::labelled_conv2d_weight_grad));
  m.impl("dense_conv2d_weight_grad", TORCH_BOX(&groupconv::ops::on_cuda::dense_conv2d_weight_grad));
  m.impl("mask_weight", TORCH_BOX(&groupconv::ops::on_cuda::mask_weight));
  m.impl("label_grad", TORCH_BOX(&groupconv::ops::on_cuda::label_grad));
  m.impl("kronecker_grad", TORCH_BOX(&groupconv::ops::on_cuda::kronecker_grad));
  m.impl("kronecker_conv2d_grad", TORCH_BOX(&groupconv::ops::on_cuda::kronecker_conv2d_grad));
}
