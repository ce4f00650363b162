// The backward pass of a convolution as one op: what was clamped is undone, and the gradients that are asked
// for are made, in one pass where that pays and by the ops of the single gradients elsewhere.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <tuple>
#include <vector>

#include "torch/cpu_ops.h"

namespace groupconv::ops {
namespace {

template <class Element>
bool is_rows(const Image<Element>& image) {
  return !image.channels_last() && (image.stride_w == 1 || image.width == 1);
}

// All pixels of a channel are neighbours: as_row() may be read as a row. Where the width is one, its stride may
// be anything.
template <class Element>
bool reads_as_row(const Image<Element>& image) {
  return is_rows(image) && image.flat() && (image.stride_w == 1 || image.height * image.width == 1);
}

std::array<int64_t, 4> sizes_of(const Tensor& tensor) {
  return {tensor.size(0), tensor.size(1), tensor.size(2), tensor.size(3)};
}

// `slices` sums for each channel become one gradient.
template <class Stored>
void add_bias_slices(const std::vector<double>& sums, int64_t slices, Tensor& total) {
  Stored* to = static_cast<Stored*>(total.data_ptr());
  for (int64_t c = 0; c < total.size(0); ++c) {
    double sum = 0;
    for (int64_t s = 0; s < slices; ++s) sum += sums[static_cast<size_t>(s * total.size(0) + c)];
    cpu::narrow(static_cast<cpu::compute_t<Stored>>(sum), to[c]);
  }
}

// A fixed cut of pixels, whatever the number of threads.
constexpr int64_t most_slices = 8, most_slices_of_parts = 32;

using Gradients = std::tuple<Tensor, Tensor, Tensor>;

// Where kernels can read it; a copy where they cannot.
template <class Stored>
Tensor laid_out(const Tensor& tensor, bool channels_last) {
  const auto image = image_of<const Stored>(tensor);
  if (channels_last ? image.channels_last() : is_rows(image)) return tensor;
  Tensor copy = empty_image(tensor, sizes_of(tensor), channels_last);
  torch::stable::copy_(copy, tensor);
  return copy;
}

// The gradient of the sum under the clamp (grad itself without one), and of the bias.
template <class Stored>
Tensor undo_epilogue(Tensor grad, const std::optional<Tensor>& output, Activation activation, bool want_bias,
                     Tensor& bias_grad) {
  if (!output && !want_bias) return grad;
  const bool channels_last = image_of<const Stored>(output ? *output : grad).channels_last();
  grad = laid_out<Stored>(grad, channels_last);
  const Tensor clamped = output ? laid_out<Stored>(*output, channels_last) : grad;
  Tensor unclamped = output ? empty_image(grad, sizes_of(grad), channels_last) : grad;

  cpu::EpilogueGradProblem<Stored> problem;
  problem.grad = image_of<const Stored>(grad);
  if (output) {
    problem.output = image_of<const Stored>(clamped);
    problem.unclamped = image_of<Stored>(unclamped);
  }
  if (!channels_last && reads_as_row(problem.grad) && (!output || reads_as_row(problem.output))) {
    problem.grad = problem.grad.as_row();
    if (output) {
      problem.output = problem.output.as_row();
      problem.unclamped = problem.unclamped.as_row();
    }
  }
  problem.activation = activation;
  problem.slices = channels_last ? std::min(most_slices, problem.grad.batch * problem.grad.height) : 1;
  std::vector<double> sums(static_cast<size_t>(want_bias ? problem.slices * grad.size(1) : 0));
  if (want_bias) problem.bias_grad = sums.data();
  if (grad.numel() >= worth_a_thread) problem.threads = torch_threads();
  cpu::typed<Stored>(cpu::kernels()).epilogue_grad(problem);
  if (want_bias) add_bias_slices<Stored>(sums, problem.slices, bias_grad);
  return unclamped;
}

bool is_pointwise(const Window& window) {
  return window.area() == 1 && window.stride_h == 1 && window.stride_w == 1 &&
         window.pad_top + window.pad_bottom + window.pad_left + window.pad_right == 0;
}

// One pass over rows pays where a group's rows of a few hundred pixels fit the L2, and images have that many: of
// smaller ones the weight gradient takes several at once.
template <class Stored>
bool suits_rows(const cpu::PointwiseBackwardProblem<Stored>& problem) {
  constexpr int64_t most_channels = 512, least_pixels = 512;
  const PartitionView& partition = *problem.partition;
  if (problem.grad.height * problem.grad.width < least_pixels || partition.inputs_overlap) return false;
  for (int64_t g = 0; g < partition.groups; ++g) {
    if (partition.inputs.count(g) + partition.outputs.count(g) > most_channels) return false;
  }
  return reads_as_row(problem.grad) && reads_as_row(problem.input) &&
         (!problem.output.data || reads_as_row(problem.output));
}

// All pixels of all images, evenly spaced, one after the other.
template <class Element>
bool lies_in_one_row(const Image<Element>& image) {
  return image.channels_last() && image.flat() &&
         (image.batch == 1 || image.stride_n == image.height * image.width * image.stride_w);
}
template <class Element>
Image<Element> as_one_row(const Image<Element>& image) {
  Image<Element> row = image.as_row();
  row.width *= row.batch;
  row.batch = 1;
  return row;
}

// Kernels prepare a weight for every part, and a larger one would not stay in a cache with what belongs to it.
template <class Stored>
int64_t pixels_of_part(int64_t channels) {
  constexpr int64_t unclamped_bytes = 512 << 10;
  return std::max<int64_t>(unclamped_bytes / (channels * static_cast<int64_t>(sizeof(Stored))), 1);
}

// One pass over pixels pays where more lies between two readings of a clamped gradient than a cache keeps, and where
// it takes little to bring the weight in order for every part.
template <class Stored>
bool suits_pixels(const cpu::PointwiseBackwardProblem<Stored>& problem) {
  constexpr int64_t least_bytes = 6 << 20, most_weight_bytes = 256 << 10, size = sizeof(Stored);
  const auto& grad = problem.grad;
  return problem.output.data && lies_in_one_row(grad) && lies_in_one_row(problem.output) &&
         lies_in_one_row(problem.input) && problem.partition->entries() * size <= most_weight_bytes &&
         grad.batch * grad.height * grad.width * grad.channels * size >= least_bytes;
}

// False where the images are not rows, or pixels, that can be read where they lie, and where it does not pay.
template <class Stored>
bool in_one_pass(const Tensor& grad, const std::optional<Tensor>& output, const Tensor& input,
                 const Tensor& weight, const PartitionView& partition, Activation activation, bool want_bias,
                 Gradients& gradients) {
  cpu::PointwiseBackwardProblem<Stored> problem;
  problem.grad = image_of<const Stored>(grad);
  problem.input = image_of<const Stored>(input);
  if (output) problem.output = image_of<const Stored>(*output);
  problem.partition = &partition;
  const bool channels_last = is_channels_last(input);
  if (!(channels_last ? suits_pixels(problem) : suits_rows(problem))) return false;

  const int64_t pixels = grad.size(0) * grad.size(2) * grad.size(3);
  const int64_t part = channels_last ? pixels_of_part<Stored>(grad.size(1)) : pixels;
  const int64_t parts = (pixels - 1) / part + 1;
  if (channels_last) {
    problem.slices = std::min<int64_t>(parts, most_slices_of_parts);
  } else if (partition.groups < enough_groups) {
    problem.slices = slices_of_batch(pixels);
  }
  auto& [input_grad, weight_grad, bias_grad] = gradients;
  input_grad = empty_image(input, sizes_of(input), channels_last);
  if (!partition.inputs_complete) torch::stable::zero_(input_grad);
  weight_grad = torch::stable::new_zeros(input, {partition.entries(), 1, 1});
  std::vector<double> sums(static_cast<size_t>(want_bias ? problem.slices * grad.size(1) : 0));
  const Tensor packed = for_compute<Stored>(weight);
  const auto as_rows = [&](auto image) { return channels_last ? as_one_row(image) : image.as_row(); };
  problem.grad = as_rows(problem.grad);
  problem.input = as_rows(problem.input);
  if (output) problem.output = as_rows(problem.output);
  problem.input_grad = as_rows(image_of<Stored>(input_grad));
  problem.weight = static_cast<const Stored*>(packed.data_ptr());
  problem.weight_grad = static_cast<Stored*>(weight_grad.data_ptr());
  if (want_bias) problem.bias_grad = sums.data();
  problem.activation = activation;
  problem.threads = threads_for(partition, Window{}, pixels);
  const auto run = cpu::typed<Stored>(cpu::kernels()).pointwise_backward;
  if (channels_last) {
    const Sweep whole_part = one_row(part), last_part = one_row(pixels - (parts - 1) * part);
    problem.part = &whole_part;
    problem.last_part = &last_part;
    run(problem);
  } else {
    run(problem);
  }

  if (want_bias) add_bias_slices<Stored>(sums, problem.slices, bias_grad);
  return true;
}

Gradients conv2d_backward(const Tensor& grad, const std::optional<Tensor>& output, const Tensor& input,
                          const Tensor& weight, const Tensor& table, int64_t stride_h, int64_t stride_w,
                          int64_t pad_top, int64_t pad_bottom, int64_t pad_left, int64_t pad_right,
                          int64_t dilation_h, int64_t dilation_w, int64_t activation, bool want_input,
                          bool want_weight, bool want_bias) {
  check_image("grad", grad);
  check_image("input", input);
  check_like("grad", grad, "input", input);
  const KnownPartition known = read_partition(table, input.size(1), grad.size(1));
  const PartitionView& partition = *known;
  check_weight(weight, partition);
  check_like("weight", weight, "input", input);
  const Window window = make_window(weight.size(1), weight.size(2), stride_h, stride_w, pad_top, pad_bottom,
                                    pad_left, pad_right, dilation_h, dilation_w);
  check_sizes("grad", grad,
              output_sizes(window, input.size(0), partition.out_channels, input.size(2), input.size(3)));
  const Activation clamp = make_activation(activation);
  STD_TORCH_CHECK(is_clamp(clamp), "activation is ", activation,
                  "; only of 0 (none), 1 (relu) and 2 (relu6) the derivative shows in the output");
  STD_TORCH_CHECK(output.has_value() == (clamp != Activation::none),
                  "output is needed with an activation, and only then");
  if (output) {
    check_image("output", *output);
    check_like("output", *output, "input", input);
    check_sizes("output", *output, sizes_of(grad));
  }

  return for_dtype(input, [&](auto element) {
    using Stored = decltype(element);
    const Tensor nothing = torch::stable::new_empty(input, {0});
    Gradients gradients{nothing, nothing, nothing};
    if (want_bias) std::get<2>(gradients) = torch::stable::new_zeros(input, {grad.size(1)});
    if constexpr (std::is_same_v<Stored, cpu::compute_t<Stored>>) {
      if (want_input && want_weight && is_pointwise(window) && grad.numel() > 0 && partition.entries() > 0 &&
          in_one_pass<Stored>(grad, output, input, weight, partition, clamp, want_bias, gradients)) {
        return gradients;
      }
    }
    auto& [input_grad, weight_grad, bias_grad] = gradients;
    const Tensor unclamped =
        grad.numel() > 0 ? undo_epilogue<Stored>(grad, output, clamp, want_bias, bias_grad) : grad;
    if (want_input) {
      input_grad = conv2d_input_grad(unclamped, weight, table, input.size(1), input.size(2), input.size(3),
                                     stride_h, stride_w, pad_top, pad_bottom, pad_left, pad_right, dilation_h,
                                     dilation_w, is_channels_last(input));
    }
    if (want_weight) {
      weight_grad = conv2d_weight_grad(unclamped, input, table, partition.entries(), weight.size(1),
                                       weight.size(2), stride_h, stride_w, pad_top, pad_bottom, pad_left,
                                       pad_right, dilation_h, dilation_w);
    }
    return gradients;
  });
}

}  // namespace
}  // namespace groupconv::ops

STABLE_TORCH_LIBRARY_IMPL(groupconv, CPU, m) {
  m.impl("conv2d_backward", TORCH_BOX(&groupconv::ops::conv2d_backward));
}
