// What reads and writes every element once: packing, mask-weight products, and the ways back through an
// epilogue and a prologue.
#include "cpu/entry.h"
#include "cpu/gradients/epilogue_grad.h"
#include "cpu/gradients/prologue_grad.h"
#include "cpu/masked/masked.h"
#include "cpu/masked/masked_grad.h"

namespace groupconv::cpu::GROUPCONV_ISA {

template <class Stored>
void Kernels<Stored>::pack(const PackProblem& problem) {
  cpu::pack<Stored, Stored>(problem);
}

template <class Stored>
void Kernels<Stored>::cast_pack(const PackProblem& problem) {
  cpu::pack<compute_t<Stored>, Stored>(problem);
}

template <class Stored>
void Kernels<Stored>::unpack(const PackProblem& problem) {
  cpu::unpack<Stored, Stored>(problem);
}

template <class Stored>
void Kernels<Stored>::cast_unpack(const PackProblem& problem) {
  cpu::unpack<Stored, compute_t<Stored>>(problem);
}

template <class Stored>
void Kernels<Stored>::mask_weight(const MaskProblem<Stored>& problem) {
  cpu::mask_weight(problem);
}

template <class Stored>
void Kernels<Stored>::label_grad(const LabelGradProblem<Stored>& problem) {
  cpu::label_grad(problem);
}

template <class Stored>
void Kernels<Stored>::logit_grad(const LogitGradProblem<Stored>& problem) {
  cpu::logit_grad(problem);
}

template <class Stored>
void Kernels<Stored>::kronecker_grad(const KroneckerGradProblem<Stored>& problem) {
  cpu::kronecker_grad(problem);
}

template <class Stored>
void Kernels<Stored>::epilogue_grad(const EpilogueGradProblem<Stored>& problem) {
  cpu::epilogue_grad(problem);
}

template <class Stored>
void Kernels<Stored>::prologue_grad(const PrologueGradProblem<Stored>& problem) {
  cpu::prologue_grad(problem);
}

GROUPCONV_INSTANTIATE

}  // namespace groupconv::cpu::GROUPCONV_ISA
