// AVX-512 with vdpbf16ps: only bfloat16 is computed otherwise than in avx512.cpp.
#include "cpu/instantiate.h"

const groupconv::cpu::TypedKernels<groupconv::BFloat16> groupconv::cpu::avx512_bf16_kernels =
    typed_kernels<BFloat16>;
