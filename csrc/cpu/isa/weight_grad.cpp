#include "cpu/gradients/weight_grad.h"

#include "cpu/entry.h"
#include "cpu/gradients/pointwise_backward.h"

namespace groupconv::cpu::GROUPCONV_ISA {

template <class Stored>
void Kernels<Stored>::weight_grad(const WeightGradProblem<Stored>& problem) {
  cpu::weight_grad(problem);
}

template <class Stored>
void Kernels<Stored>::pointwise_backward(const PointwiseBackwardProblem<Stored>& problem) {
  cpu::pointwise_backward(problem);
}

GROUPCONV_INSTANTIATE

}  // namespace groupconv::cpu::GROUPCONV_ISA
