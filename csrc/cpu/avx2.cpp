#include "cpu/instantiate.h"

const groupconv::cpu::KernelTable groupconv::cpu::avx2_kernels = table_for("avx2");
