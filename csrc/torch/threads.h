// torch's thread pool, as the kernels want it: items handed out one by one, so that uneven ones balance.
#pragma once

#include "cpu/kernels.h"

namespace groupconv::ops {

cpu::Threads torch_threads();

}  // namespace groupconv::ops
