// The entry point of the weight gradient: makes the plan, then hands over to the type.
#include <algorithm>

#include "cuda/launch.cuh"
#include "cuda/launch_weight_grad.cuh"

namespace groupconv::cuda {

WeightGradChoice choose_weight_grad(const PlanProblem& partition, int64_t window_area, int64_t pixels) {
  PlanProblem cut = partition;
  const int64_t rows = std::max<int64_t>(partition.row_channels(), 1);
  const bool by_entry = partition.entries / rows <= 8;  // inputs of an output, on average
  cut.tile_rows = cut.tile_columns = weight_tile_side;
  cut.packs_groups = false;

  // Enough slices to fill a large GPU, none shorter than pays, and all of them within a bound of memory.
  constexpr int64_t enough_blocks = 1024, least_pixels = 256, most_partial = int64_t{1} << 24;
  const int64_t entries = std::max<int64_t>(partition.entries * window_area, 1);
  const int64_t pieces = by_entry ? entries / 8 : entries / (weight_tile_side * weight_tile_side);
  int64_t slices = enough_blocks / std::max<int64_t>(pieces, 1);
  slices = std::min({slices, pixels / least_pixels, most_partial / entries});
  return {by_entry, cut, std::max<int64_t>(slices, 1), Plan(nullptr, cut).words()};
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
