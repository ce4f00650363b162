// The device of the CUDA ops when their kernels run on the CPU: there is nothing to switch.
#include "cuda_runtime.h"
#include "torch/cuda_device.h"

namespace groupconv::ops::on_cuda {

struct OnDevice::Guard {};

OnDevice::OnDevice(const Tensor&) : guard_(nullptr), stream_(nullptr) {}
OnDevice::~OnDevice() = default;

}  // namespace groupconv::ops::on_cuda

extern "C" __attribute__((visibility("default"))) void take_turns_backwards(bool backwards) {
  cuda_on_cpu::backwards = backwards;
}

// How often a kernel was given less memory than before, which another thread's launch of it may need.
extern "C" __attribute__((visibility("default"))) int memory_taken_back() { return cuda_on_cpu::taken_back; }
