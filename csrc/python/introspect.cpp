// The introspection module: what was built, what the processor has, which kernels are in use.
//
// It knows nothing of torch and links none of the kernels. What it reports about the kernels it asks the
// already loaded _native.so for, by symbol name (cpu/dispatch.h declares them): a copy of its own would
// have a state of its own.
#include <dlfcn.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <map>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "build_info.h"

namespace py = pybind11;

namespace {

struct NativeLibrary {
  const char* (*isa_name)() = nullptr;
  const char* (*isa_reason)() = nullptr;
  int (*force_isa)(const char*) = nullptr;
  const char* (*kernel_list)() = nullptr;
};

NativeLibrary attached;

template <class Function>
void find(void* handle, const char* name, Function*& function) {
  function = reinterpret_cast<Function*>(dlsym(handle, name));
  if (!function) throw std::runtime_error(std::string("the op library has no function ") + name);
}

void attach(const std::string& path) {
  // Only a library that is in the process already: loading it is the business of torch.ops.
  void* handle = dlopen(path.c_str(), RTLD_NOW | RTLD_NOLOAD);
  if (!handle) throw std::runtime_error("the op library is not loaded: " + path);
  NativeLibrary library;
  find(handle, "groupconv_isa_name", library.isa_name);
  find(handle, "groupconv_isa_reason", library.isa_reason);
  find(handle, "groupconv_force_isa", library.force_isa);
  find(handle, "groupconv_kernel_list", library.kernel_list);
  attached = library;
}

const NativeLibrary& native() {
  if (!attached.isa_name) throw std::runtime_error("no op library: call attach(path) first");
  return attached;
}

std::vector<std::string> lines(const std::string& text) {
  std::vector<std::string> result;
  std::istringstream stream(text);
  for (std::string line; std::getline(stream, line);) result.push_back(line);
  return result;
}

void force_isa(const std::string& name) {
  if (native().force_isa(name.c_str()) != 0) {
    throw py::value_error("instruction set '" + name + "' is unknown, was not built (built: " +
                          groupconv::build::instruction_sets + ") or is missing in this processor");
  }
}

std::map<std::string, std::string> build_info() {
  namespace build = groupconv::build;
  return {
      {"version", build::version},
      {"compiler", build::compiler},
      {"flags", build::flags},
      {"processor", build::processor},
      {"instruction_sets", build::instruction_sets},
      {"sanitizers", build::sanitizers},
      {"torch", build::torch},
      {"cuda", build::cuda},
      {"cuda_architectures", build::cuda_architectures},
  };
}

// What the processor has and the operating system has switched on.
std::map<std::string, bool> cpu_features() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  return {
      {"avx2", __builtin_cpu_supports("avx2") != 0},
      {"fma", __builtin_cpu_supports("fma") != 0},
      {"f16c", __builtin_cpu_supports("f16c") != 0},
      {"avx512f", __builtin_cpu_supports("avx512f") != 0},
      {"avx512bw", __builtin_cpu_supports("avx512bw") != 0},
      {"avx512dq", __builtin_cpu_supports("avx512dq") != 0},
      {"avx512vl", __builtin_cpu_supports("avx512vl") != 0},
      {"avx512_bf16", __builtin_cpu_supports("avx512bf16") != 0},
      {"avx512_vnni", __builtin_cpu_supports("avx512vnni") != 0},
      {"avx512_vbmi", __builtin_cpu_supports("avx512vbmi") != 0},
      {"amx_tile", __builtin_cpu_supports("amx-tile") != 0},
      {"amx_bf16", __builtin_cpu_supports("amx-bf16") != 0},
      {"amx_int8", __builtin_cpu_supports("amx-int8") != 0},
  };
#else
  return {};
#endif
}

}  // namespace

PYBIND11_MODULE(_introspect, m) {
  m.doc() = "What was built, what this processor has, and which kernels are in use.";
  m.def("attach", &attach, py::arg("path"),
        "Connect to the op library at `path`, which must already be loaded.");
  m.def(
      "isa_name", [] { return std::string(native().isa_name()); },
      "The instruction set in use; empty where the requested one can't be.");
  m.def("isa_reason", [] { return std::string(native().isa_reason()); }, "Why that one.");
  m.def("force_isa", &force_isa, py::arg("name"),
        "Use this instruction set from now on; ValueError where it can't be.");
  m.def(
      "kernel_list", [] { return lines(native().kernel_list()); },
      "One \"isa family dtype\" for each kernel that was built.");
  m.def("build_info", &build_info, "Compiler, flags and versions of the build.");
  m.def("cpu_features", &cpu_features, "Instruction-set extensions, and whether they can be used here.");
}
