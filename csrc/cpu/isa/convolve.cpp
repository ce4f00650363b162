#include "cpu/drivers/convolve_choice.h"
#include "cpu/entry.h"

namespace groupconv::cpu::GROUPCONV_ISA {

template <class Stored>
void Kernels<Stored>::convolve(const ConvolveProblem<Stored>& problem) {
  cpu::convolve(problem);
}

template <class Stored>
bool Kernels<Stored>::has_lanes_over_channels(const ConvolveProblem<Stored>& problem) {
  return cpu::has_lanes_over_channels(problem);
}

template <class Stored>
bool Kernels<Stored>::convolve_stored(const ConvolveProblem<Stored>& problem) {
  return cpu::convolve_stored(problem);
}

GROUPCONV_INSTANTIATE

}  // namespace groupconv::cpu::GROUPCONV_ISA
