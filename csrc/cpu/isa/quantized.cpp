// What multiplies bytes.
#include "cpu/dispatch.h"
#include "cpu/drivers/quantize.h"
#include "cpu/drivers/quantized_convolve.h"

namespace groupconv::cpu::GROUPCONV_ISA {
namespace {

template <class Out>
void convolve(const QuantizedProblem<Out>& problem) {
  QuantizedConvolution<Out>(problem).run();
}

}  // namespace

const QuantizedKernels quantized_kernels = {convolve<uint8_t>, convolve<float>, cpu::quantize};

}  // namespace groupconv::cpu::GROUPCONV_ISA
