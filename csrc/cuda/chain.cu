// The entry points of the chain, for all element types.
#include <algorithm>

#include "cuda/chain.cuh"
#include "cuda/channel_pass.cuh"
#include "cuda/launch.cuh"
#include "cuda/typed.cuh"

namespace groupconv::cuda {
namespace {

// The plan of stage s in one direction follows that of stage s − 1 in the same.
PlanProblem stage_problem(const ChainProblem& p, int s, bool transposed) {
  PlanProblem stage = p.stages[s].partition;
  stage.transposed = transposed;
  return stage;
}

// Shared memory of a block: what the smallest GPUs have, and two on a multiprocessor of an A100.
constexpr size_t chain_shared_bytes = 80 << 10;

template <class T>
cudaError_t describe(const ChainProblem& p, ChainArguments<T>& a, bool backward, cudaStream_t stream) {
  a.input = typed<const T>(p.input);
  a.grad = typed<const T>(p.grad);
  a.output = typed<T>(p.output);
  a.bias = static_cast<const T*>(p.bias);
  a.activation = p.activation;
  a.count = p.count;
  a.partial = static_cast<Sum<T>*>(p.partial);
  a.entries = p.entries;
  a.shared_bytes = chain_shared_bytes;
  int64_t* scratch = p.plans;
  int64_t entry = 0;
  for (int direction = 0; direction < (backward ? 2 : 1); ++direction) {
    const int64_t* before = nullptr;
    for (int s = 0; s < p.count; ++s) {
      PlanProblem problem = stage_problem(p, s, direction == 1);
      problem.stage_before = before;
      const Plan plan(scratch, problem);
      scratch += plan.words();
      before = plan.summary;
      (direction == 1 ? a.stages[s].transposed : a.stages[s].forward) = plan;
      if (const cudaError_t error = run_plan(problem, plan, stream); error != cudaSuccess) return error;
      if (direction == 1) continue;
      a.stages[s].weight = static_cast<const T*>(p.stages[s].weight);
      a.stages[s].first_entry = entry;
      entry += problem.entries;
    }
  }
  return cudaSuccess;
}

}  // namespace

int64_t chain_plan_words(const ChainProblem& p, bool backward) {
  int64_t words = 0;
  for (int s = 0; s < p.count; ++s) {
    words += Plan(nullptr, stage_problem(p, s, false)).words();
    if (backward) words += Plan(nullptr, stage_problem(p, s, true)).words();
  }
  return words;
}

int64_t chain_blocks(int64_t pixels, int64_t entries) {
  // Each has gradients of its own, all of them within a bound of memory.
  constexpr int64_t enough_blocks = 528, most_partial = int64_t{1} << 24;
  const int64_t tiles = (pixels + most_chain_pixels - 1) / most_chain_pixels;
  return std::max<int64_t>(std::min({tiles, enough_blocks, most_partial / std::max<int64_t>(entries, 1)}), 1);
}

cudaError_t run_chain(Element element, const ChainProblem& p, cudaStream_t stream) {
  return for_element(element, [&](auto type) {
    using T = decltype(type);
    ChainArguments<T> a{};
    if (const cudaError_t error = describe(p, a, false, stream); error != cudaSuccess) return error;
    const int64_t pixels = a.output.batch * a.output.height * a.output.width;
    return launch(chain_forward<T>, blocks_for((pixels + most_chain_pixels - 1) / most_chain_pixels, 1),
                  chain_threads, chain_shared_bytes, stream, a);
  });
}

cudaError_t run_chain_grad(Element element, const ChainProblem& p, void* weight_grad, cudaStream_t stream) {
  return for_element(element, [&](auto type) {
    using T = decltype(type);
    ChainArguments<T> a{};
    if (const cudaError_t error = describe(p, a, true, stream); error != cudaSuccess) return error;
    const cudaError_t error =
        launch(chain_backward<T>, p.blocks, chain_threads, chain_shared_bytes, stream, a);
    if (error != cudaSuccess || !a.partial) return error;
    return launch(add_slices<Sum<T>, T>, blocks_of_threads(a.entries, pass_threads), pass_threads, 0, stream,
                  a.partial, p.blocks, a.entries, static_cast<T*>(weight_grad), a.entries);
  });
}

}  // namespace groupconv::cuda
