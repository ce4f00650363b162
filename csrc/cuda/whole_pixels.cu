// How the product of whole pixels is cut, and when it is taken. Nothing here is measured: the numbers are what
// sizes and the makers' bandwidths say.
#include <algorithm>
#include <utility>

#include "cuda/launch.h"
#include "cuda/whole_pixels.h"

namespace groupconv::cuda {
namespace {

constexpr int64_t reserved_bytes = 1 << 10;  // of every block, by the system
constexpr int64_t most_run_pixels = 128;
// Weights that do not fit are read from L2 once a run, at about twice the bandwidth of memory.
constexpr int64_t most_weights_per_byte = 2;

int64_t rounded_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t summed_by(int64_t element_bytes) { return 32 / element_bytes; }

template <class T>
bool lies_in_whole_pixels(const Image<T>& image, int64_t element_bytes) {
  const auto is_aligned = [&](int64_t size, int64_t stride) {
    return size <= 1 || stride * element_bytes % 16 == 0;
  };
  return image.stride_c == 1 && image.channels > 0 && image.channels * element_bytes % 16 == 0 &&
         reinterpret_cast<uintptr_t>(image.data) % 16 == 0 && is_aligned(image.batch, image.stride_n) &&
         is_aligned(image.height, image.stride_h) && is_aligned(image.width, image.stride_w);
}

}  // namespace

WholePixelCut cut_whole_pixels(const WholePixelSizes& sizes, int64_t pixels, int64_t weight_bytes,
                               const Device& device) {
  const int64_t whole = device.shared_bytes;
  const int64_t half =
      (whole + reserved_bytes) / 2 - reserved_bytes;  // two blocks hide each other's barriers
  int64_t most = most_run_pixels;
  while (most > line_pixels && pixels < 2 * device.multiprocessors * most) most /= 2;
  constexpr bool stay = true, stream = false;
  for (const auto& [budget, weights] : {std::pair{half, stay}, {whole, stay}, {whole, stream}}) {
    for (int64_t run = most; run >= line_pixels; run /= 2) {
      const int64_t run_bytes = run * (sizes.source_channels + sizes.row_channels) * sizes.element_bytes;
      if (weights == stream && weight_bytes > most_weights_per_byte * run_bytes) break;
      for (int32_t stages = 3; stages >= 2; --stages) {
        WholePixelCut cut{static_cast<int32_t>(run), stages, 0, 0};
        const int64_t left = budget - WholePixelMemory(sizes, cut).bytes;
        if (left < 0 || (weights == stay && left < weight_bytes)) continue;
        cut.resident = static_cast<int32_t>(std::min(left, 2 * weight_bytes) / fragment_bytes);
        cut.blocks = device.multiprocessors * (budget == half ? 2 : 1);
        return cut;
      }
    }
  }
  return {};
}

int64_t most_fragments(const Plan& plan, const PlanProblem& partition, int64_t element_bytes) {
  const int64_t rows = partition.row_channels(), summed = summed_by(element_bytes);
  const int64_t items = partition.transposed ? partition.out_channels : plan.max_reads;
  const int64_t columns = rounded_up(rows, fragment_rows) + std::min(rows, plan.max_tiles);
  // Rows with several readers may take any run of groups.
  if (partition.transposed) return columns * (items / summed + 2);
  // A slot of r rows and k sources has at most r / 8 + r / tile_rows + 1 columns of at most k / summed + 2 steps.
  return (rows / fragment_rows + rows / partition.tile_rows + 3) * (items / summed + 1) + 2 * columns;
}

WholePixelLayout::WholePixelLayout(int64_t* scratch, const Plan& plan, const PlanProblem& partition,
                                   int64_t element_bytes) {
  constexpr int64_t word = sizeof(int64_t), alignment = 16 / word;
  const auto take = [&](int64_t bytes) {
    int64_t* const taken = scratch ? scratch + used : nullptr;
    used += rounded_up(bytes, word * alignment) * alignment;
    return taken;
  };
  take(plan.words() * word);
  tiles = reinterpret_cast<WholePixelTile*>(take(plan.max_tiles * sizeof(WholePixelTile)));
  const int64_t fragments_bytes = most_fragments(plan, partition, element_bytes) * fragment_bytes;
  fragments = reinterpret_cast<char*>(take(fragments_bytes));
}

WholePixelSizes whole_pixel_sizes(const PlanProblem& partition, const Plan& plan, int64_t element_bytes,
                                  bool has_residual, bool has_bias) {
  const int64_t outputs = partition.out_channels, inputs = partition.in_channels;
  return {partition.transposed ? outputs : inputs,
          partition.transposed ? inputs : outputs,
          partition.transposed ? outputs : plan.max_reads,
          element_bytes,
          has_residual,
          has_bias};
}

ProductChoice prefer_whole_pixels(Element element, const ProductProblem& problem, const Device& device,
                                  const ProductChoice& otherwise) {
  switch (otherwise.kernel) {
    case ProductKernel::pixels:
    case ProductKernel::narrow:
    case ProductKernel::wide: return otherwise;
    default: break;
  }
  const int64_t element_bytes = element == Element::f32 ? 4 : 2;
  const Window& w = problem.window;
  const bool is_bare =
      w.area() == 1 && w.pad_top == 0 && w.pad_bottom == 0 && w.pad_left == 0 && w.pad_right == 0;
  const bool is_whole = lies_in_whole_pixels(problem.source, element_bytes) &&
                        lies_in_whole_pixels(problem.dest, element_bytes) &&
                        (!problem.residual.data || lies_in_whole_pixels(problem.residual, element_bytes));
  if (!is_bare || !is_whole || problem.coarse.data) return otherwise;
  if (std::max(problem.source.channels, problem.dest.channels) > most_whole_pixel_channels) return otherwise;

  PlanProblem partition = problem.partition;
  const int64_t depth = partition.entries / partition.row_channels();
  // With less than two groups there is nothing to pick out of a pixel.
  if (2 * depth > problem.source.channels) return otherwise;
  partition.tile_rows = narrow_tile_rows;
  partition.packs_groups = true;
  const Plan plan(nullptr, partition);
  const WholePixelSizes sizes = whole_pixel_sizes(partition, plan, element_bytes,
                                                  problem.residual.data != nullptr, problem.bias != nullptr);
  const int64_t weight_bytes = rounded_up(partition.row_channels(), fragment_rows) *
                               rounded_up(depth, summed_by(element_bytes)) * fragment_bytes;
  const int64_t pixels = problem.dest.batch * problem.dest.height * problem.dest.width;
  const WholePixelCut cut = cut_whole_pixels(sizes, pixels, weight_bytes, device);
  if (cut.pixels == 0) return otherwise;
  // Wide tiles pick a source once for twice the rows, where groups fill them and all warps still have one.
  const int64_t wide_tiles = partition.row_channels() / wide_tile_rows * (cut.pixels / line_pixels);
  if (depth > narrow_tile_rows && wide_tiles >= whole_pixel_warps) partition.tile_rows = wide_tile_rows;
  const WholePixelLayout layout(nullptr, Plan(nullptr, partition), partition, element_bytes);
  return {ProductKernel::whole_pixels, partition, layout.words(), cut};
}

}  // namespace groupconv::cuda
