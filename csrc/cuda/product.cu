// The entry point of the convolution and its input gradient: makes the plan, then hands over to the type.
#include <algorithm>

#include "cuda/launch.cuh"
#include "cuda/launch_product.cuh"

namespace groupconv::cuda {

cudaError_t use_device(int device) { return cudaSetDevice(device); }

ProductChoice choose_product(const PlanProblem& partition) {
  PlanProblem cut = partition;
  const int64_t rows = std::max<int64_t>(partition.row_channels(), 1);
  // The average number of sources of a row. A guess at how wide the groups are, good enough to choose a
  // kernel by: the groups are on the device, and every kernel gives the same result.
  const int64_t depth = partition.entries / rows;
  ProductKernel kernel = ProductKernel::wide;
  if (depth <= 4) {
    kernel = ProductKernel::pixels;
  } else if (depth <= 8) {
    kernel = ProductKernel::narrow;
  }
  cut.tile_rows = kernel == ProductKernel::wide ? WideTile::rows : NarrowTile::rows;
  cut.tile_columns = 0;
  cut.packs_groups = false;
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
