#include "cpu/convolve.h"

#include "cpu/isa/entry.h"

namespace groupconv::cpu::GROUPCONV_ISA {

template <class Stored>
void Kernels<Stored>::convolve(const ConvolveProblem<Stored>& problem) {
  cpu::convolve(problem);
}

GROUPCONV_INSTANTIATE

}  // namespace groupconv::cpu::GROUPCONV_ISA
