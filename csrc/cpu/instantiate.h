// Instantiates every kernel family for the instruction set that this file is compiled for.
#pragma once

#include "cpu/chain.h"
#include "cpu/convolve.h"
#include "cpu/dispatch.h"
#include "cpu/epilogue_grad.h"
#include "cpu/masked.h"
#include "cpu/masked_grad.h"
#include "cpu/peak.h"
#include "cpu/pointwise_backward.h"
#include "cpu/prologue_grad.h"
#include "cpu/weight_grad.h"

namespace groupconv::cpu {
namespace {

template <class Stored>
constexpr TypedKernels<Stored> typed_kernels{
    convolve<Stored>,
    weight_grad<Stored>,
    epilogue_grad<Stored>,
    pointwise_backward<Stored>,
    prologue_grad<Stored>,
    pack<Stored, Stored>,
    pack<compute_t<Stored>, Stored>,
    unpack<Stored, Stored>,
    unpack<Stored, compute_t<Stored>>,
    mask_weight<Stored>,
    label_grad<Stored>,
    logit_grad<Stored>,
    kronecker_grad<Stored>,
    chain<Stored>,
    chain_grad<Stored>,
};

constexpr KernelTable table_for(const char* isa) {
  return {isa, typed_kernels<float>, typed_kernels<double>, typed_kernels<BFloat16>, fma_peak};
}

}  // namespace
}  // namespace groupconv::cpu
