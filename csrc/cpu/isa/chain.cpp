#include "cpu/drivers/chain.h"

#include "cpu/entry.h"

namespace groupconv::cpu::GROUPCONV_ISA {

template <class Stored>
void Kernels<Stored>::chain(const ChainProblem<Stored>& problem) {
  cpu::chain(problem);
}

template <class Stored>
void Kernels<Stored>::chain_grad(const ChainGradProblem<Stored>& problem) {
  cpu::chain_grad(problem);
}

GROUPCONV_INSTANTIATE

}  // namespace groupconv::cpu::GROUPCONV_ISA
