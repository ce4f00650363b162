// The entry point of the weight gradient: makes the plan, then hands over to the type.
#include <algorithm>

#include "cuda/launch.cuh"
#include "cuda/launch_weight_grad.cuh"

namespace groupconv::cuda {

WeightGradChoice choose_weight_grad(Element element, const PlanProblem& partition, int64_t window_area,
                                    int64_t pixels, int64_t longest_side) {
  PlanProblem cut = partition;
  const int64_t rows = std::max<int64_t>(partition.row_channels(), 1);
  const int64_t depth = partition.entries / rows;  // inputs of an output, on average
  WeightGradKernel kernel;
  int64_t side = weight_tile_side, rate = 1;  // entries of the tile that are made at once, on average
  if (on_tensor_cores(element) && depth >= 4 && longest_side < -nowhere) {
    kernel = depth <= 16 ? WeightGradKernel::mma_slim : WeightGradKernel::mma_wide;
    side = depth <= 16 ? slim_weight_side : wide_weight_side;
    cut.packs_groups = true;
    rate = side * std::min(side, depth);
  } else if (depth <= 8) {
    kernel = WeightGradKernel::entries;
    rate = 8;
  } else {
    kernel = WeightGradKernel::tiles;
    rate = side * std::min(side, depth);
  }
  cut.tile_rows = cut.tile_columns = side;

  // Enough slices to fill a large GPU, none shorter than pays, and all of them within a bound of memory.
  constexpr int64_t enough_blocks = 1024, least_pixels = 256, most_partial = int64_t{1} << 24;
  const int64_t entries = std::max<int64_t>(partition.entries * window_area, 1);
  int64_t slices = enough_blocks / std::max<int64_t>(entries / rate, 1);
  slices = std::min({slices, pixels / least_pixels, most_partial / entries});
  return {kernel, cut, std::max<int64_t>(slices, 1), Plan(nullptr, cut).words()};
}

cudaError_t run_weight_grad(Element element, const WeightGradChoice& choice, const WeightGradProblem& problem,
                            cudaStream_t stream) {
  const Plan plan(problem.plan, choice.partition);
  if (const cudaError_t error = run_plan(choice.partition, plan, stream); error != cudaSuccess) {
    return error;
  }
  return for_element(
      element, [&](auto type) { return launch_weight_grad<decltype(type)>(choice, problem, plan, stream); });
}

}  // namespace groupconv::cuda
