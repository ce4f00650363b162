// The table of this instruction set.
#include "cpu/dispatch.h"
#include "cpu/entry.h"
#include "cpu/products/peak.h"

namespace groupconv::cpu::GROUPCONV_ISA {

template <class Stored>
constexpr TypedKernels<Stored> typed_kernels{
    Kernels<Stored>::convolve,
    Kernels<Stored>::weight_grad,
    Kernels<Stored>::epilogue_grad,
    Kernels<Stored>::pointwise_backward,
    Kernels<Stored>::prologue_grad,
    Kernels<Stored>::pack,
    Kernels<Stored>::cast_pack,
    Kernels<Stored>::unpack,
    Kernels<Stored>::cast_unpack,
    Kernels<Stored>::mask_weight,
    Kernels<Stored>::label_grad,
    Kernels<Stored>::logit_grad,
    Kernels<Stored>::kronecker_grad,
    Kernels<Stored>::chain,
    Kernels<Stored>::chain_grad,
    Kernels<Stored>::has_lanes_over_channels,
    multiplies_stored<Stored> ? Kernels<Stored>::convolve_stored : nullptr,
};

#if defined(GROUPCONV_ONLY_BF16)
const TypedKernels<BFloat16> bf16_kernels = typed_kernels<BFloat16>;
double bf16_peak(double seconds) { return product_peak<Pair<BFloat16>>(seconds); }
#else
#define NAME_OF(token) #token
#define NAME(macro) NAME_OF(macro)
const KernelTable kernels = {NAME(GROUPCONV_ISA),     typed_kernels<float>, typed_kernels<double>,
                             typed_kernels<BFloat16>, &quantized_kernels,   product_peak<float>,
                             product_peak<float>};
#endif

}  // namespace groupconv::cpu::GROUPCONV_ISA
