// Runs the network that deploy.py has packaged, without Python. With T the folder of the installed torch:
//
//   g++ -std=c++20 -O2 deploy.cpp -o deploy -I$T/include -I$T/include/torch/csrc/api/include \
//       -L$T/lib -ltorch -ltorch_cpu -lc10 -Wl,-rpath,$T/lib
//   ./deploy network.pt2 "$(python -c 'import groupconv_ext as gc; print(gc.native_library())')"
#include <ATen/ATen.h>
#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>

#include <cstdio>

int main(int count, char** arguments) {
  if (count != 3) {
    std::fprintf(stderr, "usage: %s PACKAGE LIBRARY\n", arguments[0]);
    return 2;
  }
  // Loading the library registers its operations; the package looks for them by name.
  if (dlopen(arguments[2], RTLD_NOW) == nullptr) {
    std::fprintf(stderr, "%s\n", dlerror());
    return 1;
  }
  torch::inductor::AOTIModelPackageLoader network(arguments[1]);
  const at::Tensor scores = network.run({at::ones({1, 3, 64, 64})})[0];
  std::printf("packaged: class %ld, score %.5f\n", scores.argmax().item<long>(), scores.max().item<float>());
}
