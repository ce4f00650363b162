// A convolution and a pointwise one after it, on the CPU: part by part of the output, so that what lies
// between the two stays in cache.
#include <torch/csrc/stable/library.h>

#include "core/sweep.h"
#include "cpu/for_each_item.h"
#include "torch/cpu_ops.h"

namespace groupconv::ops {
namespace {

struct Stage {
  KnownPartition known;
  const PartitionView& partition;
  Tensor weight;
  std::optional<Tensor> bias;
  Activation activation;

  Stage(const char* name, const Tensor& weight, const char* bias_name, const std::optional<Tensor>& bias,
        const Tensor& table, int64_t in_channels, int64_t out_channels, int64_t activation,
        const Tensor& input)
      : known(read_partition(table, in_channels, out_channels)),
        partition(*known),
        weight(weight),
        bias(bias),
        activation(make_activation(activation)) {
    check_weight(weight, partition);
    check_like(name, weight, "input", input);
    check_bias(bias_name, bias, input, out_channels);
  }
};

// A stage in the type that is computed in, as far as it does not change from band to band.
template <class Stored>
class TypedStage {
  using Compute = cpu::compute_t<Stored>;

 public:
  explicit TypedStage(const Stage& stage)
      : stage_(stage),
        weight_(for_compute<Stored>(stage.weight)),
        bias_(stage.bias ? for_compute<Stored>(*stage.bias) : weight_) {}

  void convolve(const Image<const Stored>& source, const Image<Stored>& dest,
                const Image<const Stored>& residual, int64_t window_area, const Sweep& sweep,
                const cpu::Threads& threads) const {
    cpu::ConvolveProblem<Stored> problem;
    problem.source = source;
    problem.dest = dest;
    problem.residual = residual;
    problem.weight = static_cast<const Compute*>(weight_.data_ptr());
    if (stage_.bias) problem.bias = static_cast<const Compute*>(bias_.data_ptr());
    problem.partition = &stage_.partition;
    problem.window_area = window_area;
    problem.sweep = &sweep;
    problem.activation = stage_.activation;
    problem.threads = threads;
    cpu::typed<Stored>(cpu::kernels()).convolve(problem);
  }

 private:
  const Stage& stage_;
  Tensor weight_, bias_;
};

template <class T>
Image<T> images_in(T* memory, int64_t batch, int64_t channels, int64_t height, int64_t width,
                   bool channels_last) {
  const int64_t size = channels * height * width;
  if (channels_last) return {memory, batch, channels, height, width, size, 1, width * channels, channels};
  return {memory, batch, channels, height, width, size, height * width, width, 1};
}

template <class T>
Image<T> some_of(const Image<T>& images, int64_t first, int64_t count) {
  Image<T> some = images;
  some.data = images.at(first, 0, 0, 0);
  some.batch = count;
  return some;
}

// Not more than `most` of `all` at once, in parts of equal size.
int64_t equal_parts(int64_t all, int64_t most) {
  const int64_t parts = (all + most - 1) / most;
  return (all + parts - 1) / parts;
}

// The output in parts: several images, one, or a band of the rows of one.
//
// channels_last: what fits in L2 beside the rows it is made from and the result, and pixels enough that
// packing a weight, which a kernel does first, is little. NCHW: whole images as long as they may stay in
// some cache. A kernel sets up once for every channel and takes four rows at a time, and bands of a few
// rows cost more than a cache further away.
struct Parts {
  int64_t images, rows, bands, count;

  Parts(int64_t batch, int64_t height, int64_t width, int64_t bytes_of_pixel, bool channels_last) {
    constexpr int64_t part_bytes = 512 << 10, most_image_bytes = 4 << 20, packed_pixels = 512;
    const int64_t image_bytes = std::max<int64_t>(height * width * bytes_of_pixel, 1);
    images = std::max<int64_t>(part_bytes / image_bytes, 1);
    rows = height;
    if (channels_last) images = std::max(images, (packed_pixels - 1) / (height * width) + 1);
    images = equal_parts(batch, images);
    if (images == 1 && image_bytes > (channels_last ? part_bytes : most_image_bytes)) {
      const int64_t pixels = channels_last ? std::max(part_bytes / bytes_of_pixel, packed_pixels)
                                           : most_image_bytes / bytes_of_pixel;
      rows = std::clamp<int64_t>(pixels / width, 1, height);
    }
    rows = equal_parts(height, rows);
    bands = (height + rows - 1) / rows;
    count = (batch + images - 1) / images * bands;
  }
};

Tensor separable_conv2d(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias,
                        const Tensor& table, int64_t activation, const Tensor& pointwise_weight,
                        const std::optional<Tensor>& pointwise_bias, const Tensor& pointwise_table,
                        int64_t pointwise_activation, const std::optional<Tensor>& residual, int64_t channels,
                        int64_t out_channels, int64_t stride_h, int64_t stride_w, int64_t pad_top,
                        int64_t pad_bottom, int64_t pad_left, int64_t pad_right, int64_t dilation_h,
                        int64_t dilation_w) {
  check_image("input", input);
  check_dtype(input);
  const Stage first("weight", weight, "bias", bias, table, input.size(1), channels, activation, input);
  const Stage second("pointwise_weight", pointwise_weight, "pointwise_bias", pointwise_bias, pointwise_table,
                     channels, out_channels, pointwise_activation, input);
  STD_TORCH_CHECK(pointwise_weight.size(1) == 1 && pointwise_weight.size(2) == 1,
                  "pointwise_weight must have a 1×1 window, got sizes ", sizes_text(pointwise_weight));
  const Window window = make_window(weight.size(1), weight.size(2), stride_h, stride_w, pad_top, pad_bottom,
                                    pad_left, pad_right, dilation_h, dilation_w);
  const auto sizes = output_sizes(window, input.size(0), out_channels, input.size(2), input.size(3));
  check_countable("what lies between", {sizes[0], channels, sizes[2], sizes[3]});
  check_residual(residual, input, sizes);
  const bool channels_last = is_channels_last(input);
  Tensor output = empty_image(input, sizes, channels_last);
  const Tensor added = residual ? laid_out_like(output, *residual) : output;
  if (output.numel() == 0) return output;

  for_dtype(input, [&](auto element) {
    using Stored = decltype(element);
    const TypedStage<Stored> spatial(first), pointwise(second);
    const auto source = image_of<const Stored>(input);
    const auto dest = image_of<Stored>(output);
    const int64_t batch = sizes[0], height = sizes[2], width = sizes[3];
    // Without weights every window gives the same, nothing.
    const Window used = first.partition.entries() > 0 ? window : Window{};
    const Axis across = forward_axis(horizontal(used), source.width, width);
    const int64_t planes = plane_pixels(source, first.partition.most_inputs);
    const int64_t span = first.partition.in_channels + channels;
    check_span(make_sweep(forward_axis(vertical(used), source.height, height), across, used.kernel_w, planes),
               span);

    const int64_t element_bytes = static_cast<int64_t>(sizeof(Stored));
    const Parts parts(batch, height, width, channels * element_bytes, channels_last);
    const int64_t work = first.partition.entries() * window.area() + second.partition.entries();
    const bool worth_threads = work > 0 && batch * height * width >= worth_a_thread / work;
    const cpu::Threads threads = worth_threads ? torch_threads() : cpu::Threads{};
    // The parts are for the threads, or, where there are few, each part is.
    const bool many = parts.count >= cpu::pieces_for_threads;
    const cpu::Threads inner = many ? cpu::Threads{} : threads;
    cpu::for_each_item(many ? threads : cpu::Threads{}, parts.count, [&](int64_t item) {
      const int64_t n = item / parts.bands * parts.images, images = std::min(parts.images, batch - n);
      const int64_t row = item % parts.bands * parts.rows, rows = std::min(parts.rows, height - row);
      const int64_t bytes = images * channels * rows * width * element_bytes;
      // As in a Workspace, up to 64 bytes may be read past the end.
      auto* memory = static_cast<Stored*>(cpu::thread_scratch(static_cast<size_t>(bytes + 64)));
      // The window of the first row lies so much lower.
      AxisWindow down = vertical(used);
      down.pad -= row * down.stride;
      const Sweep sweep = make_sweep(forward_axis(down, source.height, rows), across, used.kernel_w, planes);
      spatial.convolve(some_of(source, n, images),
                       images_in(memory, images, channels, rows, width, channels_last), {}, window.area(),
                       sweep, inner);

      const auto part_of = [&](const auto& whole) {
        return some_of(whole, n, images).crop(row, 0, rows, width).as_row();
      };
      const auto more = residual ? part_of(image_of<const Stored>(added)) : Image<const Stored>{};
      pointwise.convolve(images_in<const Stored>(memory, images, channels, 1, rows * width, channels_last),
                         part_of(dest), more, 1, one_row(rows * width), inner);
    });
  });
  return output;
}

}  // namespace
}  // namespace groupconv::ops

STABLE_TORCH_LIBRARY_IMPL(groupconv, CPU, m) {
  m.impl("separable_conv2d", TORCH_BOX(&groupconv::ops::separable_conv2d));
}
