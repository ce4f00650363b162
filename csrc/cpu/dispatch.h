// Which instruction set runs: the best one that was built and that the processor has, or the one that
// GROUPCONV_ISA (scalar | avx2 | avx512 | avx512_bf16) or force_isa asks for.
#pragma once

#include "cpu/kernels.h"

namespace groupconv::cpu {

extern const KernelTable scalar_kernels;
#if defined(GROUPCONV_X86)
extern const KernelTable avx2_kernels;
extern const KernelTable avx512_kernels;
extern const TypedKernels<BFloat16> avx512_bf16_kernels;
#endif

// Throws std::runtime_error, with the reason, when GROUPCONV_ISA asks for one that can't run.
const KernelTable& kernels();

}  // namespace groupconv::cpu

#define GROUPCONV_EXPORT extern "C" __attribute__((visibility("default")))

// For the introspection module, which finds these by name in the loaded library.
GROUPCONV_EXPORT const char* groupconv_isa_name();
GROUPCONV_EXPORT const char* groupconv_isa_reason();
// 0, or −1 when that one is unknown, was not built or is not supported by the processor.
GROUPCONV_EXPORT int groupconv_force_isa(const char* name);
// One kernel a line: "isa family dtype".
GROUPCONV_EXPORT const char* groupconv_kernel_list();
