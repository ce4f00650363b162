// Which instruction set runs: the best one that was built and that the processor has, or the one that
// GROUPCONV_ISA (scalar | avx2 | avx512 | avx512_vnni | avx512_bf16 | avx512_amx) or force_isa asks for.
#pragma once

#include "cpu/kernels.h"

namespace groupconv::cpu {

// Of isa/table.cpp and isa/quantized.cpp, as far as they were built.
namespace scalar {
extern const KernelTable kernels;
extern const QuantizedKernels quantized_kernels;
}  // namespace scalar
namespace avx2 {
extern const KernelTable kernels;
extern const QuantizedKernels quantized_kernels;
}  // namespace avx2
namespace avx512 {
extern const KernelTable kernels;
extern const QuantizedKernels quantized_kernels;
}  // namespace avx512
namespace avx512_vnni {  // avx512, but for what vpdpbusd computes
extern const QuantizedKernels quantized_kernels;
}
namespace avx512_bf16 {  // avx512, but for what vdpbf16ps computes
extern const TypedKernels<BFloat16> bf16_kernels;
double bf16_peak(double seconds);
}  // namespace avx512_bf16
namespace avx512_amx {  // avx512_vnni, but for what matrix registers compute
extern const QuantizedKernels quantized_kernels;
// Of isa/matrix.cpp: false where vectors have to do it.
bool convolve_matrix(const ConvolveProblem<BFloat16>& problem);
bool weight_grad_matrix(const WeightGradProblem<BFloat16>& problem);
double bf16_peak(double seconds);
}  // namespace avx512_amx

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
