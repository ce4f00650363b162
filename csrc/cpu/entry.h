// The files of isa/ are compiled once for every instruction set, with its flags and its name in
// GROUPCONV_ISA. Each makes some families of kernels, and shows them to the others and to the table as
// functions in a namespace of the instruction set: the only symbols that leave it, and no other set has
// one of that name with which the linker could merge them.
#pragma once

#include "cpu/kernels.h"

namespace groupconv::cpu::GROUPCONV_ISA {

template <class Stored>
struct Kernels {
  static void convolve(const ConvolveProblem<Stored>&);
  static bool convolve_stored(const ConvolveProblem<Stored>&);
  static bool has_lanes_over_channels(const ConvolveProblem<Stored>&);
  static void weight_grad(const WeightGradProblem<Stored>&);
  static void epilogue_grad(const EpilogueGradProblem<Stored>&);
  static void pointwise_backward(const PointwiseBackwardProblem<Stored>&);
  static void prologue_grad(const PrologueGradProblem<Stored>&);
  static void pack(const PackProblem&);
  static void cast_pack(const PackProblem&);
  static void unpack(const PackProblem&);
  static void cast_unpack(const PackProblem&);
  static void mask_weight(const MaskProblem<Stored>&);
  static void label_grad(const LabelGradProblem<Stored>&);
  static void logit_grad(const LogitGradProblem<Stored>&);
  static void kronecker_grad(const KroneckerGradProblem<Stored>&);
  static void chain(const ChainProblem<Stored>&);
  static void chain_grad(const ChainGradProblem<Stored>&);

  // What convolve and weight_grad try first. False, and nothing done, where depthwise kernels don't apply.
  static bool depthwise(const ConvolveProblem<Stored>&);
  static bool depthwise_grad(const WeightGradProblem<Stored>&);
};

// At the end of a file: emits what it defined, for every type that this instruction set computes in a way
// of its own.
#if defined(GROUPCONV_ONLY_BF16)
#define GROUPCONV_INSTANTIATE template struct Kernels<BFloat16>;
#else
#define GROUPCONV_INSTANTIATE      \
  template struct Kernels<float>;  \
  template struct Kernels<double>; \
  template struct Kernels<BFloat16>;
#endif

}  // namespace groupconv::cpu::GROUPCONV_ISA
