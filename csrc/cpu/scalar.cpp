#include "cpu/instantiate.h"

const groupconv::cpu::KernelTable groupconv::cpu::scalar_kernels = table_for("scalar");
