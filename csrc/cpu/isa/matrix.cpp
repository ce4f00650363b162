// What matrix registers multiply. False where it has to be done another way.
#include "cpu/dispatch.h"
#include "cpu/drivers/convolve_matrix.h"
#include "cpu/drivers/convolve_matrix_pixels.h"
#include "cpu/drivers/row_products_matrix.h"
#include "cpu/gradients/correlate_registers.h"
#include "cpu/gradients/weight_grad_pairs.h"
#include "cpu/products/peak.h"

namespace groupconv::cpu::GROUPCONV_ISA {

bool convolve_matrix(const ConvolveProblem<BFloat16>& problem) {
  const bool adds_up = problem.transposed && problem.partition->inputs_overlap;
  if (problem.coarse || problem.prologue || adds_up) return false;
  if (MatrixConvolution::suits(problem)) return MatrixConvolution(problem).run();
  using Pointwise = PixelRowsConvolution<MatrixRowProducts>;
  if (Pointwise::suits(problem)) return Pointwise(problem).run();
  return MatrixPixelConvolution::suits(problem) && MatrixPixelConvolution(problem).run();
}

bool weight_grad_matrix(const WeightGradProblem<BFloat16>& problem) {
  using Pairs = PixelPairsGrad<MatrixPairProducts>;
  return Pairs::suits(problem) && Pairs(problem).run();
}

double bf16_peak(double seconds) {
  const MatrixRegisters registers;
  constexpr int64_t repeats = 2000, products = 4 * block_rows * block_cols * block_depth;
  clear_register<4>();
  clear_register<5>();
  return best_rate(seconds, static_cast<double>(products * repeats), [] {
    for (int64_t r = 0; r < repeats; ++r) {
      multiply_registers<0, 4, 5>();
      multiply_registers<1, 4, 5>();
      multiply_registers<2, 4, 5>();
      multiply_registers<3, 4, 5>();
    }
  });
}

}  // namespace groupconv::cpu::GROUPCONV_ISA
