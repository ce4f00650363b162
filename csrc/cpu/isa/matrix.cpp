// What matrix registers multiply. False, and nothing done, where they would stay half empty.
#include "cpu/convolve_matrix.h"
#include "cpu/dispatch.h"

namespace groupconv::cpu::GROUPCONV_ISA {

bool convolve_matrix(const ConvolveProblem<BFloat16>& problem) {
  if (!MatrixConvolution::suits(problem)) return false;
  MatrixConvolution(problem).run();
  return true;
}

}  // namespace groupconv::cpu::GROUPCONV_ISA
