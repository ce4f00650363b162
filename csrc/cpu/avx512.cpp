#include "cpu/instantiate.h"

const groupconv::cpu::KernelTable groupconv::cpu::avx512_kernels = table_for("avx512");
