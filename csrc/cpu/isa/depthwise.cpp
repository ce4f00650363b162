#include "cpu/depthwise/bands.h"
#include "cpu/depthwise/channels.h"
#include "cpu/depthwise/grad_channels.h"
#include "cpu/depthwise/grad_rows.h"
#include "cpu/depthwise/grad_strips.h"
#include "cpu/depthwise/rows.h"
#include "cpu/depthwise/small_maps.h"
#include "cpu/entry.h"

namespace groupconv::cpu::GROUPCONV_ISA {

// float64 is there to check gradients: the general kernels do that, and half the code is not built.
template <class Stored>
constexpr bool is_double = __is_same(Stored, double);
template <class Stored>
constexpr bool has_all = !is_double<Stored> && in_vectors<Stored>;

template <class Stored>
bool Kernels<Stored>::depthwise(const ConvolveProblem<Stored>& problem) {
  if constexpr (!is_double<Stored>) {
    const Depthwise shape(*problem.partition);
    if (!shape.suits) return false;
    if constexpr (has_all<Stored>) {
      if (DepthwiseBands<Stored>::suits(problem, shape)) {
        DepthwiseBands<Stored>(problem, shape).run();
        return true;
      }
    }
    if (DepthwiseChannels<Stored>::suits(problem, shape)) {
      DepthwiseChannels<Stored>(problem, shape).run();
      return true;
    }
    if constexpr (has_all<Stored>) {
      const bool in_rows = DepthwiseRows<Stored>::suits(problem);
      const bool in_strips = in_rows && DepthwiseRows<Stored>::goes_down(*problem.sweep);
      if (!in_strips && DepthwiseSmallMaps<Stored>::suits(problem, shape)) {
        DepthwiseSmallMaps<Stored>(problem).run();
        return true;
      }
      if (in_rows) {
        DepthwiseRows<Stored>(problem).run();
        return true;
      }
    }
  }
  return false;
}

template <class Stored>
bool Kernels<Stored>::depthwise_grad(const WeightGradProblem<Stored>& problem) {
  if constexpr (has_all<Stored>) {
    const Depthwise shape(*problem.partition);
    if (!shape.suits) return false;
    if (DepthwiseGradChannels<Stored>::suits(problem, shape)) {
      DepthwiseGradChannels<Stored>(problem, shape).run();
      return true;
    }
#if defined(__AVX512F__)
    if (DepthwiseGradStrips<Stored>::suits(problem)) {
      DepthwiseGradStrips<Stored>(problem).run();
      return true;
    }
#endif
    if (DepthwiseGradSmallMaps<Stored>::suits(problem, shape)) {
      DepthwiseGradSmallMaps<Stored>(problem).run();
      return true;
    }
    if (DepthwiseGradRows<Stored>::suits(problem)) {
      DepthwiseGradRows<Stored>(problem).run();
      return true;
    }
  }
  return false;
}

GROUPCONV_INSTANTIATE

}  // namespace groupconv::cpu::GROUPCONV_ISA
