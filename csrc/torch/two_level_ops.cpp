// The two-level group convolution on the CPU: z_g = R_g * x[inputs_g], y = A * x + S z + bias.
//
// In one sweep, where rows of pixels are what is multiplied: z_g is one more row of A's group g, made from what that
// group reads anyway, and S z is added to a tile of y while it lies in cache. Where A has lanes over the channels of
// its groups, a row more may take a vector more, and kernels of its own are lost: A, R and S go one after the other
// then, S in place.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <numeric>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include "core/sweep.h"
#include "torch/cpu_ops.h"

namespace groupconv::ops {
namespace {

// The blocks of A, each with its group's row of R at its end: what reads the same is one product.
template <class Compute>
Tensor with_restriction(const Tensor& weight, const Tensor& restriction, const PartitionView& partition,
                        int64_t area) {
  const int64_t reads = partition.inputs.offsets[partition.groups];
  Tensor rows = torch::stable::new_empty(weight, {(partition.entries() + reads) * area});
  const auto* own = static_cast<const Compute*>(weight.data_ptr());
  const auto* shared = static_cast<const Compute*>(restriction.data_ptr());
  auto* to = static_cast<Compute*>(rows.data_ptr());
  for (int64_t g = 0; g < partition.groups; ++g) {
    const int64_t row = partition.inputs.count(g) * area;
    to = std::copy_n(std::exchange(own, own + partition.outputs.count(g) * row),
                     partition.outputs.count(g) * row, to);
    to = std::copy_n(std::exchange(shared, shared + row), row, to);
  }
  return rows;
}

std::vector<int32_t> counted(int64_t count) {
  std::vector<int32_t> numbers(static_cast<size_t>(count));
  std::iota(numbers.begin(), numbers.end(), 0);
  return numbers;
}

// R's: what A's groups read, one output for each.
PartitionView restrict_partition(const PartitionView& within) {
  const int64_t groups = within.groups, reads = within.inputs.offsets[groups];
  std::vector<int32_t> table = {static_cast<int32_t>(within.in_channels), static_cast<int32_t>(groups),
                                static_cast<int32_t>(groups), static_cast<int32_t>(reads)};
  const auto append = [&](const int32_t* from, int64_t count) {
    table.insert(table.end(), from, from + count);
  };
  const std::vector<int32_t> outputs = counted(groups + 1);
  append(within.inputs.offsets, groups + 1);
  append(outputs.data(), groups + 1);
  append(within.inputs.channels, reads);
  append(outputs.data(), groups);
  return parsed(table);
}

// S's: one group from all of z to all outputs.
PartitionView spread_partition(int64_t groups, int64_t out_channels) {
  const auto reads = static_cast<int32_t>(groups), writes = static_cast<int32_t>(out_channels);
  std::vector<int32_t> table = {reads, writes, 1, reads, 0, reads, 0, writes};
  for (const int64_t count : {groups, out_channels}) {
    const std::vector<int32_t> channels = counted(count);
    table.insert(table.end(), channels.begin(), channels.end());
  }
  return parsed(table);
}

// `problem` is A's alone.
template <class Stored>
void one_by_one(cpu::ConvolveProblem<Stored> problem, const Image<Stored>& shared,
                const cpu::compute_t<Stored>* restriction, const cpu::compute_t<Stored>* coarse) {
  const auto convolve = cpu::typed<Stored>(cpu::kernels()).convolve;
  convolve(problem);

  const Image<Stored> output = problem.dest;
  const PartitionView restricted = restrict_partition(*problem.partition);
  problem.dest = shared;
  problem.weight = restriction;
  problem.bias = nullptr;
  problem.partition = &restricted;
  convolve(problem);

  const int64_t pixels = output.height * output.width;
  const PartitionView spread = spread_partition(shared.channels, output.channels);
  const Sweep pointwise = one_row(pixels);
  const auto read = [](const Image<Stored>& image) {
    const Image<Stored> row = image.as_row();
    return Image<const Stored>{row.data,     row.batch,    row.channels, row.height,  row.width,
                               row.stride_n, row.stride_c, row.stride_h, row.stride_w};
  };
  problem.source = read(shared);
  problem.dest = output.as_row();
  problem.residual = read(output);
  problem.weight = coarse;
  problem.partition = &spread;
  problem.window_area = 1;
  problem.sweep = &pointwise;
  convolve(problem);
}

// A row more would cost A more than it costs by itself.
template <class Stored>
bool better_one_by_one(const cpu::ConvolveProblem<Stored>& problem) {
  // Per group. Below, R reads as much for too little.
  constexpr int64_t least_outputs = 64;
  // What is rounded twice is not the same.
  if (!std::is_same_v<Stored, cpu::compute_t<Stored>>) return false;
  const PartitionView& partition = *problem.partition;
  if (partition.entries() == 0 || problem.dest.channels < least_outputs * partition.groups) return false;
  return cpu::typed<Stored>(cpu::kernels()).has_lanes_over_channels(problem);
}

// conv2d of two levels: a channel z_g = restriction_g * input for every group, and coarse · z added to the
// outputs pixel by pixel. Returns the output and z.
std::tuple<Tensor, Tensor> two_level(const Tensor& input, const Tensor& weight, const Tensor& restriction,
                                     const Tensor& coarse, const std::optional<Tensor>& bias,
                                     const Tensor& table, int64_t stride_h, int64_t stride_w, int64_t pad_top,
                                     int64_t pad_bottom, int64_t pad_left, int64_t pad_right,
                                     int64_t dilation_h, int64_t dilation_w) {
  check_image("input", input);
  STD_TORCH_CHECK(coarse.dim() == 2, "coarse must have sizes [outputs, groups], got ", sizes_text(coarse));
  const int64_t out_channels = coarse.size(0);
  const KnownPartition known = read_partition(table, input.size(1), out_channels);
  const PartitionView& partition = *known;
  STD_TORCH_CHECK(coarse.size(1) == partition.groups, "coarse has ", coarse.size(1),
                  " columns, the partition table says ", partition.groups, " groups");
  check_weight(weight, partition);
  check_like("weight", weight, "input", input);
  check_like("restriction", restriction, "input", input);
  check_like("coarse", coarse, "input", input);
  const int64_t reads = partition.inputs.offsets[partition.groups];
  STD_TORCH_CHECK(restriction.dim() == 3 && restriction.size(0) == reads &&
                      restriction.size(1) == weight.size(1) && restriction.size(2) == weight.size(2),
                  "restriction must have sizes [", reads, ", ", weight.size(1), ", ", weight.size(2),
                  "], got ", sizes_text(restriction));
  const Window window = make_window(weight.size(1), weight.size(2), stride_h, stride_w, pad_top, pad_bottom,
                                    pad_left, pad_right, dilation_h, dilation_w);
  check_bias("bias", bias, input, out_channels);
  const auto sizes = output_sizes(window, input.size(0), out_channels, input.size(2), input.size(3));
  check_dtype(input);

  const bool channels_last = is_channels_last(input);
  Tensor output = empty_image(input, sizes, channels_last);
  Tensor shared = empty_image(input, {sizes[0], partition.groups, sizes[2], sizes[3]}, channels_last);
  if (output.numel() == 0) return {output, shared};
  for_dtype(input, [&](auto element) {
    using Stored = decltype(element);
    using Compute = cpu::compute_t<Stored>;
    const auto values = [](const Tensor& tensor) { return static_cast<const Compute*>(tensor.data_ptr()); };
    const Tensor typed_weight = for_compute<Stored>(weight);
    const Tensor typed_restriction = for_compute<Stored>(restriction);
    const Tensor typed_coarse = for_compute<Stored>(coarse);
    const Tensor typed_bias = bias ? for_compute<Stored>(*bias) : typed_coarse;
    cpu::ConvolveProblem<Stored> problem;
    problem.source = image_of<const Stored>(input);
    problem.dest = image_of<Stored>(output);
    problem.weight = values(typed_weight);
    if (bias) problem.bias = values(typed_bias);
    problem.partition = &partition;
    problem.window_area = window.area();
    problem.threads = threads_for(partition, window, sizes[0] * sizes[2] * sizes[3]);
    Sweep sweep = make_sweep(forward_axis(vertical(window), input.size(2), sizes[2]),
                             forward_axis(horizontal(window), input.size(3), sizes[3]), window.kernel_w,
                             plane_pixels(problem.source, partition.most_inputs));
    check_span(sweep, partition.in_channels + out_channels + partition.groups);
    problem.sweep = &sweep;
    auto shared_image = image_of<Stored>(shared);
    if (collapse(sweep, problem.source, problem.dest)) shared_image = shared_image.as_row();
    if (better_one_by_one(problem)) {
      return one_by_one(problem, shared_image, values(typed_restriction), values(typed_coarse));
    }
    const Tensor rows = with_restriction<Compute>(typed_weight, typed_restriction, partition, window.area());
    problem.weight = values(rows);
    problem.coarse = values(typed_coarse);
    problem.shared = shared_image;
    cpu::typed<Stored>(cpu::kernels()).convolve(problem);
  });
  return {output, shared};
}

}  // namespace
}  // namespace groupconv::ops

STABLE_TORCH_LIBRARY_IMPL(groupconv, CPU, m) { m.impl("two_level", TORCH_BOX(&groupconv::ops::two_level)); }
