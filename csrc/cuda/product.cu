// The entry point of the convolution and its input gradient: makes the plan, then hands over to the type.
#include <algorithm>
#include <atomic>

#include "cuda/launch.cuh"
#include "cuda/launch_product.cuh"
#include "cuda/launch_whole_pixels.cuh"
#include "cuda/product_wgmma.cuh"

namespace groupconv::cuda {

namespace {
std::atomic<bool> tf32_allowed = false;
}
void allow_tf32(bool allowed) { tf32_allowed = allowed; }
bool on_tensor_cores(Element element) {
  return element == Element::f16 || element == Element::bf16 || (element == Element::f32 && tf32_allowed);
}

cudaError_t use_device(int device) { return cudaSetDevice(device); }

cudaError_t describe_device(Device& device) {
  int current = 0, shared_bytes = 0, multiprocessors = 0;
  cudaError_t error = cudaGetDevice(&current);
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, current);
  }
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, current);
  }
  device = {shared_bytes, multiprocessors};
  return error;
}

namespace {

// The rows of a tile for Hopper's warp-group instructions, or 0 where they don't pay: where groups are too small
// to fill a tile, or too deep for its weights to stay in shared memory, or where there are fewer tiles than an
// H100 has multiprocessors.
int64_t wgmma_rows(Element element, const PlanProblem& partition, int64_t window_area, int64_t pixels) {
  if (element != Element::f16 && element != Element::bf16) return 0;
  constexpr int64_t multiprocessors = 132, enough_taps = 1 << 14;  // for any tile, and few enough to multiply
  const int64_t rows = std::max<int64_t>(partition.row_channels(), 1);
  const int64_t sources = std::max<int64_t>(partition.source_channels(), 1);
  // On average, as below: of a row, and of a source.
  const int64_t depth = partition.entries / rows, width = partition.entries / sources;
  const int64_t chunks = (depth + wgmma_depth - 1) / wgmma_depth * std::min(window_area, enough_taps);
  const int64_t pixel_tiles = pixels / wgmma_pixels;
  const auto pays = [&](int64_t tile_rows, int64_t weight_chunks) {
    return width >= tile_rows - wgmma_depth / 2 && chunks <= weight_chunks &&
           pixel_tiles * ((rows + tile_rows - 1) / tile_rows) >= multiprocessors;
  };
  if (depth < wgmma_depth || width < wgmma_depth || chunks < 2) return 0;
  if (pays(128, wgmma_weight_chunks<128>)) return 128;
  return pays(64, wgmma_weight_chunks<64>) ? 64 : 0;
}

}  // namespace

ProductChoice choose_product(Element element, const PlanProblem& partition, int64_t window_area,
                             int64_t pixels, int64_t longest_side, bool has_coarse) {
  PlanProblem cut = partition;
  const int64_t rows = std::max<int64_t>(partition.row_channels(), 1);
  // The average number of sources of a row. A guess at how wide the groups are, good enough to choose a
  // kernel by: the groups are on the device, and every kernel gives the same result.
  const int64_t depth = partition.entries / rows;
  ProductKernel kernel;
  const int64_t warp_group_rows = wgmma_rows(element, partition, window_area, pixels);
  if (!has_coarse && warp_group_rows > 0 && longest_side < -nowhere && has_wgmma()) {
    kernel = warp_group_rows == 128 ? ProductKernel::wgmma_128 : ProductKernel::wgmma_64;
    cut.tile_rows = warp_group_rows;
    cut.packs_groups = true;
    // Every row of a tile reads the same coarse channels, so small groups share tiles for their sake.
  } else if (on_tensor_cores(element) && (depth >= 4 || has_coarse) && longest_side < -nowhere) {
    kernel = depth <= 16 ? ProductKernel::mma_slim : ProductKernel::mma_wide;
    cut.tile_rows = depth <= 16 ? SlimMmaTile::rows : WideMmaTile::rows;
    cut.packs_groups = true;
  } else if (has_coarse) {
    kernel = ProductKernel::wide;
    cut.tile_rows = WideTile::rows;
    cut.packs_groups = depth <= 8;
  } else if (depth <= 4) {
    kernel = ProductKernel::pixels;
    cut.tile_rows = NarrowTile::rows;
  } else {
    kernel = depth <= 8 ? ProductKernel::narrow : ProductKernel::wide;
    cut.tile_rows = depth <= 8 ? NarrowTile::rows : WideTile::rows;
  }
  return {kernel, cut, Plan(nullptr, cut).words()};
}

cudaError_t run_product(Element element, const ProductChoice& choice, const ProductProblem& problem,
                        cudaStream_t stream) {
  const Plan plan(problem.plan, choice.partition);
  if (const cudaError_t error = run_plan(choice.partition, plan, stream); error != cudaSuccess) {
    return error;
  }
  return for_element(element, [&](auto type) {
    using T = decltype(type);
    if constexpr (sizeof(T) <= sizeof(float)) {
      if (choice.kernel == ProductKernel::whole_pixels) {
        return launch_whole_pixels<T>(choice, problem, plan, stream);
      }
    }
    return launch_product<T>(choice.kernel, problem, plan, stream);
  });
}

}  // namespace groupconv::cuda
