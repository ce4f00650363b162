// The ops on learned groups on the CPU. Labels or gates come in as tensors and become a table in here, so
// that no shape outside depends on what was learned: the ops below compile into one graph.
#include <torch/csrc/stable/library.h>

#include <cmath>
#include <numeric>
#include <tuple>

#include "core/labels.h"
#include "torch/cpu_ops.h"

namespace groupconv::ops {
namespace {

// Below this many weights waking a thread costs more than it saves.
constexpr int64_t weights_worth_a_thread = 1 << 18;

cpu::Threads threads_for(int64_t weights) {
  return weights < weights_worth_a_thread ? cpu::Threads{} : torch_threads();
}

Tensor as_contiguous(const Tensor& tensor) {
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

int64_t window_area(const Tensor& weight, int64_t first) {
  int64_t area = 1;
  for (int64_t d = first; d < weight.dim(); ++d) area *= weight.size(d);
  return area;
}

std::vector<int64_t> with_window_of(const Tensor& weight, int64_t first, std::vector<int64_t> sizes) {
  for (int64_t d = first; d < weight.dim(); ++d) sizes.push_back(weight.size(d));
  return sizes;
}

Tensor empty_with(const Tensor& like, const std::vector<int64_t>& sizes, ScalarType dtype) {
  Tensor tensor = torch::stable::new_empty(like, {sizes.data(), sizes.size()}, dtype);
  ask_for_huge_pages(tensor.data_ptr(), static_cast<size_t>(tensor.numel()) * tensor.element_size());
  return tensor;
}

void check_labels(const char* name, const Tensor& labels) {
  STD_TORCH_CHECK(labels.is_cpu() && labels.dim() == 1 && labels.scalar_type() == ScalarType::Int &&
                      labels.is_contiguous(),
                  name, " must be a contiguous 1-d int32 tensor on the CPU, got sizes ", sizes_text(labels));
  check_memory(name, labels);
}

void check_dense(const char* name, const Tensor& weight, int64_t out_channels, int64_t in_channels) {
  STD_TORCH_CHECK(
      weight.is_cpu() && weight.dim() >= 2 && weight.size(0) == out_channels && weight.size(1) == in_channels,
      name, " must have sizes [", out_channels, ", ", in_channels, ", *kernel] on the CPU, got ",
      sizes_text(weight));
  check_memory(name, weight);
}

// Labels as they were when they were checked, whoever writes to them since, and their table.
struct Labelled {
  std::vector<int32_t> in_labels, out_labels, table;

  Labelled(const Tensor& inputs, const Tensor& outputs, int64_t groups) {
    check_labels("in_labels", inputs);
    check_labels("out_labels", outputs);
    check_setting("groups", groups, 1);
    const int32_t* ins = inputs.const_data_ptr<int32_t>();
    const int32_t* outs = outputs.const_data_ptr<int32_t>();
    in_labels.assign(ins, ins + inputs.numel());
    out_labels.assign(outs, outs + outputs.numel());
    const std::string wrong = table_from_labels(
        {in_labels.data(), inputs.numel(), out_labels.data(), outputs.numel()}, groups, table);
    STD_TORCH_CHECK(wrong.empty(), wrong);
  }
  int64_t in_channels() const { return static_cast<int64_t>(in_labels.size()); }
  int64_t out_channels() const { return static_cast<int64_t>(out_labels.size()); }
};

Tensor as_tensor(const std::vector<int32_t>& table, const Tensor& like) {
  Tensor tensor = torch::stable::new_empty(like, {static_cast<int64_t>(table.size())}, ScalarType::Int);
  std::memcpy(tensor.mutable_data_ptr<int32_t>(), table.data(), table.size() * sizeof(int32_t));
  return tensor;
}

// The packed weight in `dtype`: that of the dense one, or bfloat16 from float32.
Tensor packed_from(const Tensor& dense, const PartitionView& partition, ScalarType dtype) {
  const Tensor from = as_contiguous(dense);
  Tensor packed = empty_with(dense, with_window_of(dense, 2, {partition.entries()}), dtype);
  if (packed.numel() == 0) return packed;
  for_dtype(packed, [&](auto element) {
    using Stored = decltype(element);
    const auto& kernels = cpu::typed<Stored>(cpu::kernels());
    const bool same = dense.scalar_type() == dtype;
    STD_TORCH_CHECK(same || (dtype == ScalarType::BFloat16 && dense.scalar_type() == ScalarType::Float),
                    "the weight must have the dtype of the input, or be float32 for a bfloat16 input");
    (same ? kernels.pack : kernels.cast_pack)(
        {from.data_ptr(), packed.data_ptr(), &partition, window_area(dense, 2), threads_for(packed.numel())});
  });
  return packed;
}

// Dense, zero off the mask, in `dtype`: that of the packed weight, or float32 from bfloat16.
Tensor dense_from(const Tensor& packed, const PartitionView& partition, ScalarType dtype) {
  const Tensor from = as_contiguous(packed);
  Tensor dense =
      empty_with(packed, with_window_of(packed, 1, {partition.out_channels, partition.in_channels}), dtype);
  if (dense.numel() == 0) return dense;
  for_dtype(packed, [&](auto element) {
    using Stored = decltype(element);
    const auto& kernels = cpu::typed<Stored>(cpu::kernels());
    (packed.scalar_type() == dtype ? kernels.unpack : kernels.cast_unpack)(
        {dense.data_ptr(), from.data_ptr(), &partition, window_area(packed, 1), threads_for(dense.numel())});
  });
  return dense;
}

Tensor pack(const Tensor& dense, const Tensor& table, int64_t entries, bool narrow) {
  STD_TORCH_CHECK(dense.dim() >= 2, "dense must have sizes [N, C, *kernel], got ", sizes_text(dense));
  const KnownPartition known = read_partition(table, dense.size(1), dense.size(0));
  const PartitionView& partition = *known;
  STD_TORCH_CHECK(entries == partition.entries(), "entries is ", entries, ", the partition table says ",
                  partition.entries());
  check_dense("dense", dense, partition.out_channels, partition.in_channels);
  STD_TORCH_CHECK(!narrow || dense.scalar_type() == ScalarType::Float,
                  "only a float32 weight can be narrowed to bfloat16");
  return packed_from(dense, partition, narrow ? ScalarType::BFloat16 : dense.scalar_type());
}

Tensor unpack(const Tensor& packed, const Tensor& table, int64_t out_channels, int64_t in_channels,
              bool widen) {
  const KnownPartition known = read_partition(table, in_channels, out_channels);
  const PartitionView& partition = *known;
  STD_TORCH_CHECK(packed.is_cpu() && packed.dim() >= 1 && packed.size(0) == partition.entries(),
                  "the packed weight must have sizes [", partition.entries(), ", *kernel] on the CPU, got ",
                  sizes_text(packed));
  check_memory("packed", packed);
  STD_TORCH_CHECK(!widen || packed.scalar_type() == ScalarType::BFloat16,
                  "only a bfloat16 weight can be widened to float32");
  return dense_from(packed, partition, widen ? ScalarType::Float : packed.scalar_type());
}

// ---- labels ----------------------------------------------------------------------------------------

template <class Stored>
[[noreturn]] void refuse_row(const std::string& owner, const Stored* row, int64_t c, int64_t groups) {
  int64_t g = 0;
  while (g + 1 < groups && std::isfinite(cpu::widen(row[g]))) ++g;
  STD_TORCH_CHECK(false, owner, " has ", cpu::widen(row[g]), " in row ", c,
                  ", expected finite numbers: training has diverged");
  __builtin_unreachable();
}

// The first largest entry of each row.
Tensor row_labels(const Tensor& logits, const std::string& owner) {
  STD_TORCH_CHECK(logits.is_cpu() && logits.dim() == 2 && logits.size(1) > 0, owner,
                  " must have sizes [channels, groups] on the CPU, got ", sizes_text(logits));
  check_memory("logits", logits);
  const Tensor rows = as_contiguous(logits);
  const int64_t channels = logits.size(0), groups = logits.size(1);
  Tensor labels = torch::stable::new_empty(logits, {channels}, ScalarType::Int);
  int32_t* label = labels.mutable_data_ptr<int32_t>();
  for_dtype(rows, [&](auto element) {
    using Stored = decltype(element);
    const Stored* row = static_cast<const Stored*>(rows.data_ptr());
    for (int64_t c = 0; c < channels; ++c, row += groups) {
      auto largest = cpu::widen(row[0]), doubt = largest - largest;  // NaN where some entry is not finite
      int64_t best = 0;
      for (int64_t g = 0; g < groups; ++g) {
        const auto value = cpu::widen(row[g]);
        doubt += value - value;
        best = value > largest ? g : best;
        largest = value > largest ? value : largest;
      }
      if (doubt != 0) refuse_row(owner, row, c, groups);
      label[c] = static_cast<int32_t>(best);
    }
  });
  return labels;
}

Kronecker read_gates(const Tensor& gates, int64_t in_channels, int64_t out_channels,
                     const std::string& owner) {
  check_setting("in_channels", in_channels, 1);
  check_setting("out_channels", out_channels, 1);
  const std::vector<int64_t> radices = Kronecker::radices(in_channels, out_channels);
  STD_TORCH_CHECK(gates.is_cpu() && gates.dim() == 1 && gates.size(0) == static_cast<int64_t>(radices.size()),
                  owner, " must have sizes [", radices.size(),
                  "] on the CPU, one for every prime factor of gcd(", in_channels, ", ", out_channels,
                  "), got ", sizes_text(gates));
  check_memory("gates", gates);
  const Tensor values = as_contiguous(gates);
  Kronecker kronecker{in_channels, out_channels, {}};
  for_dtype(values, [&](auto element) {
    using Stored = decltype(element);
    const Stored* value = static_cast<const Stored*>(values.data_ptr());
    for (size_t k = 0; k < radices.size(); ++k) {
      const auto gate = cpu::widen(value[k]);
      STD_TORCH_CHECK(std::isfinite(gate), owner, " has ", gate, " at ", k,
                      ", expected finite numbers: training has diverged");
      kronecker.gates.push_back({radices[k], gate >= 0});
    }
  });
  return kronecker;
}

std::tuple<Tensor, Tensor> kronecker_labels(const Tensor& gates, int64_t in_channels, int64_t out_channels,
                                            const std::string& owner) {
  const Kronecker kronecker = read_gates(gates, in_channels, out_channels, owner);
  Tensor ins = torch::stable::new_empty(gates, {in_channels}, ScalarType::Int);
  Tensor outs = torch::stable::new_empty(gates, {out_channels}, ScalarType::Int);
  kronecker.label(in_channels, ins.mutable_data_ptr<int32_t>());
  kronecker.label(out_channels, outs.mutable_data_ptr<int32_t>());
  return {ins, outs};
}

// ---- the convolution in the groups of labels -------------------------------------------------------

Tensor labelled_conv2d(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias,
                       const Tensor& in_labels, const Tensor& out_labels, int64_t groups, int64_t stride_h,
                       int64_t stride_w, int64_t pad_top, int64_t pad_bottom, int64_t pad_left,
                       int64_t pad_right, int64_t dilation_h, int64_t dilation_w) {
  const Labelled labelled(in_labels, out_labels, groups);
  check_dense("weight", weight, labelled.out_channels(), labelled.in_channels());
  const Tensor packed = packed_from(weight, parsed(labelled.table), input.scalar_type());
  return conv2d_after(nullptr, nullptr, input, packed, bias, std::nullopt,
                      as_tensor(labelled.table, in_labels), labelled.out_channels(), stride_h, stride_w,
                      pad_top, pad_bottom, pad_left, pad_right, dilation_h, dilation_w, 0);
}

Tensor labelled_conv2d_input_grad(const Tensor& grad, const Tensor& weight, const Tensor& in_labels,
                                  const Tensor& out_labels, int64_t groups, int64_t height, int64_t width,
                                  int64_t stride_h, int64_t stride_w, int64_t pad_top, int64_t pad_bottom,
                                  int64_t pad_left, int64_t pad_right, int64_t dilation_h, int64_t dilation_w,
                                  bool channels_last) {
  const Labelled labelled(in_labels, out_labels, groups);
  check_dense("weight", weight, labelled.out_channels(), labelled.in_channels());
  const Tensor packed = packed_from(weight, parsed(labelled.table), grad.scalar_type());
  return conv2d_input_grad(grad, packed, as_tensor(labelled.table, in_labels), labelled.in_channels(), height,
                           width, stride_h, stride_w, pad_top, pad_bottom, pad_left, pad_right, dilation_h,
                           dilation_w, channels_last);
}

Tensor labelled_conv2d_weight_grad(const Tensor& grad, const Tensor& input, const Tensor& in_labels,
                                   const Tensor& out_labels, int64_t groups, int64_t kernel_h,
                                   int64_t kernel_w, int64_t stride_h, int64_t stride_w, int64_t pad_top,
                                   int64_t pad_bottom, int64_t pad_left, int64_t pad_right,
                                   int64_t dilation_h, int64_t dilation_w) {
  const Labelled labelled(in_labels, out_labels, groups);
  const PartitionView partition = parsed(labelled.table);
  const Tensor packed = conv2d_weight_grad(grad, input, as_tensor(labelled.table, in_labels),
                                           partition.entries(), kernel_h, kernel_w, stride_h, stride_w,
                                           pad_top, pad_bottom, pad_left, pad_right, dilation_h, dilation_w);
  return dense_from(packed, partition, packed.scalar_type());
}

Tensor dense_conv2d_weight_grad(const Tensor& grad, const Tensor& input, int64_t kernel_h, int64_t kernel_w,
                                int64_t stride_h, int64_t stride_w, int64_t pad_top, int64_t pad_bottom,
                                int64_t pad_left, int64_t pad_right, int64_t dilation_h, int64_t dilation_w) {
  check_image("grad", grad);
  check_image("input", input);
  const int64_t ins = input.size(1), outs = grad.size(1);
  const std::vector<int32_t> in_labels(static_cast<size_t>(ins), 0), out_labels(static_cast<size_t>(outs), 0);
  std::vector<int32_t> table;
  table_from_labels({in_labels.data(), ins, out_labels.data(), outs}, 1, table);
  const Tensor packed =
      conv2d_weight_grad(grad, input, as_tensor(table, input), ins * outs, kernel_h, kernel_w, stride_h,
                         stride_w, pad_top, pad_bottom, pad_left, pad_right, dilation_h, dilation_w);
  return torch::stable::view(packed, {outs, ins, kernel_h, kernel_w});
}

// ---- mask products ---------------------------------------------------------------------------------

Tensor mask_weight(const Tensor& weight, const Tensor& in_labels, const Tensor& out_labels) {
  check_labels("in_labels", in_labels);
  check_labels("out_labels", out_labels);
  check_dense("weight", weight, out_labels.numel(), in_labels.numel());
  const Tensor from = as_contiguous(weight);
  Tensor masked = empty_with(weight, with_window_of(weight, 0, {}), weight.scalar_type());
  if (masked.numel() == 0) return masked;
  for_dtype(weight, [&](auto element) {
    using Stored = decltype(element);
    cpu::MaskProblem<Stored> problem;
    problem.weight = static_cast<const Stored*>(from.data_ptr());
    problem.masked = static_cast<Stored*>(masked.data_ptr());
    problem.in_labels = in_labels.const_data_ptr<int32_t>();
    problem.out_labels = out_labels.const_data_ptr<int32_t>();
    problem.in_channels = in_labels.numel();
    problem.out_channels = out_labels.numel();
    problem.area = window_area(weight, 2);
    problem.threads = threads_for(weight.numel());
    cpu::typed<Stored>(cpu::kernels()).mask_weight(problem);
  });
  return masked;
}

template <class Stored>
Tensor logit_grad(const Tensor& logits, const cpu::compute_t<Stored>* by_assignment,
                  const std::vector<int32_t>* winners) {
  const Tensor from = as_contiguous(logits);
  Tensor grad = empty_with(logits, {logits.size(0), logits.size(1)}, logits.scalar_type());
  cpu::LogitGradProblem<Stored> problem;
  problem.logits = static_cast<const Stored*>(from.data_ptr());
  problem.by_assignment = by_assignment;
  problem.winners = winners ? winners->data() : nullptr;
  problem.rows = logits.size(0);
  problem.groups = logits.size(1);
  problem.logit_grad = static_cast<Stored*>(grad.data_ptr());
  cpu::typed<Stored>(cpu::kernels()).logit_grad(problem);
  return grad;
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
  const int64_t groups = input_logits.size(1);
  const Labelled labelled(in_labels, out_labels, groups);
  const int64_t ins = labelled.in_channels(), outs = labelled.out_channels();
  check_dense("grad", grad, outs, ins);
  check_dense("weight", weight, outs, ins);
  check_like("weight", weight, "grad", grad);
  check_logits("input_logits", input_logits, ins, groups, weight);
  check_logits("output_logits", output_logits, outs, groups, weight);
  const int64_t area = window_area(weight, 2);
  STD_TORCH_CHECK(window_area(grad, 2) == area, "grad has sizes ", sizes_text(grad), ", weight ",
                  sizes_text(weight));
  const PartitionView partition = parsed(labelled.table);
  const Tensor typed_grad = as_contiguous(grad), typed_weight = as_contiguous(weight);
  return for_dtype(grad, [&](auto element) -> std::tuple<Tensor, Tensor, Tensor> {
    using Stored = decltype(element);
    using Compute = cpu::compute_t<Stored>;
    // A fixed cut, whatever the number of threads.
    const int64_t slices = grad.numel() < weights_worth_a_thread ? 1 : 4;
    Tensor weight_grad = empty_with(grad, masked ? with_window_of(weight, 0, {}) : std::vector<int64_t>{0},
                                    grad.scalar_type());
    std::vector<Compute> sums(static_cast<size_t>(slices * groups * ins)),
        by_input(static_cast<size_t>(ins * groups)), by_output(static_cast<size_t>(outs * groups));
    cpu::LabelGradProblem<Stored> problem;
    problem.grad = static_cast<const Stored*>(typed_grad.data_ptr());
    problem.weight = static_cast<const Stored*>(typed_weight.data_ptr());
    problem.partition = &partition;
    problem.in_labels = labelled.in_labels.data();
    problem.out_labels = labelled.out_labels.data();
    problem.groups = groups;
    problem.area = area;
    problem.slices = slices;
    if (masked) problem.weight_grad = static_cast<Stored*>(weight_grad.data_ptr());
    problem.by_input = sums.data();
    problem.by_output = by_output.data();
    problem.threads = threads_for(grad.numel());
    cpu::typed<Stored>(cpu::kernels()).label_grad(problem);

    for (int64_t slice = 0; slice < slices; ++slice) {
      for (int64_t g = 0; g < groups; ++g) {
        const Compute* sum = &sums[static_cast<size_t>((slice * groups + g) * ins)];
        for (int64_t c = 0; c < ins; ++c) by_input[static_cast<size_t>(c * groups + g)] += sum[c];
      }
    }
    return {weight_grad,
            logit_grad<Stored>(input_logits, by_input.data(), winner ? &labelled.in_labels : nullptr),
            logit_grad<Stored>(output_logits, by_output.data(), winner ? &labelled.out_labels : nullptr)};
  });
}

// grad: D, dense [N, C, *kernel], or packed in `neighbours`.
std::tuple<Tensor, Tensor> kronecker_sums(const Tensor& grad, const Tensor& weight,
                                          const Kronecker& kronecker, const PartitionView& neighbours,
                                          bool packed) {
  const Tensor typed_grad = as_contiguous(grad), typed_weight = as_contiguous(weight);
  return for_dtype(weight, [&](auto element) -> std::tuple<Tensor, Tensor> {
    using Stored = decltype(element);
    using Compute = cpu::compute_t<Stored>;
    const int64_t gate_count = static_cast<int64_t>(kronecker.gates.size());
    const int64_t positions = std::gcd(kronecker.in_channels, kronecker.out_channels) / neighbours.groups;
    Tensor weight_grad = empty_with(weight, with_window_of(weight, 0, {}), weight.scalar_type());
    Tensor sums = torch::stable::new_zeros(weight, {positions, gate_count}, compute_dtype<Stored>);
    Tensor gate_grad = torch::stable::new_zeros(weight, {gate_count}, compute_dtype<Stored>);
    if (weight.numel() == 0) return {weight_grad, gate_grad};
    cpu::KroneckerGradProblem<Stored> problem;
    problem.grad = static_cast<const Stored*>(typed_grad.data_ptr());
    problem.grad_is_packed = packed;
    problem.weight = static_cast<const Stored*>(typed_weight.data_ptr());
    problem.weight_grad = static_cast<Stored*>(weight_grad.data_ptr());
    problem.neighbours = &neighbours;
    problem.gates = kronecker.gates.data();
    problem.gate_count = gate_count;
    problem.out_remainder = neighbours.outputs.count(0) / positions;
    problem.area = window_area(weight, 2);
    problem.gate_grads = static_cast<Compute*>(sums.data_ptr());
    problem.threads = threads_for(grad.numel());
    cpu::typed<Stored>(cpu::kernels()).kronecker_grad(problem);
    Compute* total = static_cast<Compute*>(gate_grad.data_ptr());
    for (int64_t i = 0; i < positions * gate_count; ++i) total[i % gate_count] += problem.gate_grads[i];
    return {weight_grad, gate_grad};
  });
}

std::tuple<Tensor, Tensor> kronecker_grad(const Tensor& grad, const Tensor& weight, const Tensor& gates) {
  STD_TORCH_CHECK(weight.dim() >= 2, "weight must have sizes [N, C, *kernel], got ", sizes_text(weight));
  const Kronecker kronecker = read_gates(gates, weight.size(1), weight.size(0), "gates");
  check_dense("weight", weight, weight.size(0), weight.size(1));
  check_dense("grad", grad, weight.size(0), weight.size(1));
  check_like("weight", weight, "grad", grad);
  STD_TORCH_CHECK(window_area(grad, 2) == window_area(weight, 2), "grad has sizes ", sizes_text(grad),
                  ", weight ", sizes_text(weight));
  return kronecker_sums(grad, weight, kronecker, parsed(kronecker.neighbour_table()), false);
}

std::tuple<Tensor, Tensor> kronecker_conv2d_grad(const Tensor& grad, const Tensor& input,
                                                 const Tensor& weight, const Tensor& gates, int64_t stride_h,
                                                 int64_t stride_w, int64_t pad_top, int64_t pad_bottom,
                                                 int64_t pad_left, int64_t pad_right, int64_t dilation_h,
                                                 int64_t dilation_w) {
  STD_TORCH_CHECK(weight.dim() == 4, "weight must have sizes [N, C, kh, kw], got ", sizes_text(weight));
  check_dense("weight", weight, weight.size(0), weight.size(1));
  const Kronecker kronecker = read_gates(gates, weight.size(1), weight.size(0), "gates");
  const std::vector<int32_t> table = kronecker.neighbour_table();
  const PartitionView neighbours = parsed(table);
  Tensor packed = conv2d_weight_grad(grad, input, as_tensor(table, gates), neighbours.entries(),
                                     weight.size(2), weight.size(3), stride_h, stride_w, pad_top, pad_bottom,
                                     pad_left, pad_right, dilation_h, dilation_w);
  if (packed.scalar_type() != weight.scalar_type()) {
    packed = torch::stable::to(packed, weight.scalar_type());
  }
  return kronecker_sums(packed, weight, kronecker, neighbours, true);
}

}  // namespace
}  // namespace groupconv::ops

STABLE_TORCH_LIBRARY_IMPL(groupconv, CPU, m) {
  m.impl("pack", TORCH_BOX(&groupconv::ops::pack));
  m.impl("unpack", TORCH_BOX(&groupconv::ops::unpack));
  m.impl("row_labels", TORCH_BOX(&groupconv::ops::row_labels));
  m.impl("kronecker_labels", TORCH_BOX(&groupconv::ops::kronecker_labels));
  m.impl("labelled_conv2d", TORCH_BOX(&groupconv::ops::labelled_conv2d));
  m.impl("labelled_conv2d_input_grad", TORCH_BOX(&groupconv::ops::labelled_conv2d_input_grad));
  m.impl("labelled_conv2d_weight_grad", TORCH_BOX(&groupconv::ops::labelled_conv2d_weight_grad));
  m.impl("dense_conv2d_weight_grad", TORCH_BOX(&groupconv::ops::dense_conv2d_weight_grad));
  m.impl("mask_weight", TORCH_BOX(&groupconv::ops::mask_weight));
  m.impl("label_grad", TORCH_BOX(&groupconv::ops::label_grad));
  m.impl("kronecker_grad", TORCH_BOX(&groupconv::ops::kronecker_grad));
  m.impl("kronecker_conv2d_grad", TORCH_BOX(&groupconv::ops::kronecker_conv2d_grad));
}
