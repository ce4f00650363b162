#include "torch/cuda_device.h"

#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>

namespace groupconv::ops::on_cuda {

cudaStream_t current_stream(int32_t device) {
  using GetStream = AOTITorchError(int32_t device, void** stream);
  static GetStream* const get_stream = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_NOW | RTLD_NOLOAD);
    void* symbol = dlsym(library ? library : RTLD_DEFAULT, "aoti_torch_get_current_cuda_stream");
    return reinterpret_cast<GetStream*>(symbol);
  }();
  STD_TORCH_CHECK(get_stream, "this build of torch offers no current CUDA stream");
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(get_stream(device, &stream));
  return static_cast<cudaStream_t>(stream);
}

struct OnDevice::Guard {
  torch::stable::accelerator::DeviceGuard guard;
};

OnDevice::OnDevice(const Tensor& tensor)
    : guard_(new Guard{torch::stable::accelerator::DeviceGuard(tensor.get_device_index())}) {
  const int32_t device = tensor.get_device_index();
  stream_ = current_stream(device);
  check_launch(cuda::use_device(device));
}

OnDevice::~OnDevice() = default;

}  // namespace groupconv::ops::on_cuda
