// The entry point of the convolution and its input gradient: makes the plan, then hands over to the type.
#include <algorithm>
#include <atomic>

#include "cuda/launch.cuh"
#include "cuda/launch_product.cuh"

namespace groupconv::cuda {

namespace {
std::atomic<bool> tf32_allowed = false;
}
void allow_tf32(bool allowed) { tf32_allowed = allowed; }
bool on_tensor_cores(Element element) {
  return element == Element::f16 || element == Element::bf16 || (element == Element::f32 && tf32_allowed);
}

cudaError_t use_device(int device) { return cudaSetDevice(device); }

ProductChoice choose_product(Element element, const PlanProblem& partition, int64_t longest_side,
                             bool has_coarse) {
  PlanProblem cut = partition;
  const int64_t rows = std::max<int64_t>(partition.row_channels(), 1);
  // The average number of sources of a row. A guess at how wide the groups are, good enough to choose a
  // kernel by: the groups are on the device, and every kernel gives the same result.
  const int64_t depth = partition.entries / rows;
  ProductKernel kernel;
  // Every row of a tile reads the same coarse channels, so small groups share tiles for their sake.
  if (on_tensor_cores(element) && (depth >= 4 || has_coarse) && longest_side < -nowhere) {
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
    return launch_product<decltype(type)>(choice.kernel, problem, plan, stream);
  });
}

}  // namespace groupconv::cuda
