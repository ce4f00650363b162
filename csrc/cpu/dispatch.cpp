#include "cpu/dispatch.h"

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <stdexcept>
#include <string>

#if defined(GROUPCONV_X86)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace groupconv::cpu {
namespace {

struct Candidate {
  const KernelTable* table;
  bool (*runs_here)();
  bool (*pays_here)();  // taken without being asked for
};

bool always() { return true; }

#if defined(GROUPCONV_X86)
bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }
bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
// Ice Lake and later, Zen 4 and later. The Xeons that have vpdpbusd but cannot permute bytes are left out.
bool has_avx512_vnni() {
  return has_avx512() && __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512vbmi");
}
bool has_avx512_bf16() { return has_avx512() && __builtin_cpu_supports("avx512bf16"); }

// A Zen 4 or 5 core starts vdpbf16ps as often as a multiply-add of float32, which does half the work; a Xeon that
// was measured starts it a quarter as often, and widening to float32 is faster there. By vendor and not by
// the clock, since the choice decides about last bits.
bool has_fast_avx512_bf16() { return __builtin_cpu_is("amd"); }

KernelTable with_vnni(const char* isa, const KernelTable& others, const QuantizedKernels& quantized) {
  KernelTable table = others;
  table.isa = isa;
  table.quantized = &quantized;
  return table;
}
const KernelTable avx512_vnni_table =
    with_vnni("avx512_vnni", avx512::kernels, avx512_vnni::quantized_kernels);

KernelTable with_bf16(const char* isa, const KernelTable& others, const TypedKernels<BFloat16>& bf16) {
  KernelTable table = others;
  table.isa = isa;
  table.bf16 = bf16;
  table.bf16_peak = avx512_bf16::bf16_peak;
  return table;
}
const KernelTable avx512_bf16_table =
    with_bf16("avx512_bf16", (__builtin_cpu_init(), has_avx512_vnni()) ? avx512_vnni_table : avx512::kernels,
              avx512_bf16::bf16_kernels);

#if defined(GROUPCONV_EMULATE_AMX)
constexpr bool emulates_amx = true;
#else
constexpr bool emulates_amx = false;
#endif

// The kernel has to be asked for the registers, once for all threads: they are large, and it saves them.
bool has_avx512_amx() {
  static const bool granted = [] {
    if (!has_avx512_vnni() || !has_avx512_bf16()) return false;
    if (emulates_amx) return true;
    if (!__builtin_cpu_supports("amx-tile") || !__builtin_cpu_supports("amx-bf16")) return false;
    if (!__builtin_cpu_supports("amx-int8")) return false;
    constexpr long ask = 0x1023, tile_data = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    return syscall(SYS_arch_prctl, ask, tile_data) == 0;
  }();
  return granted;
}
bool has_fast_avx512_amx() { return !emulates_amx; }

// avx512_vnni, but for the bfloat16 and the bytes that matrix registers multiply.
const KernelTable& avx512_amx_table() {
  static const KernelTable table = [] {
    KernelTable others = avx512_vnni_table;
    others.isa = "avx512_amx";
    others.bf16_peak = avx512_amx::bf16_peak;
    others.quantized = &avx512_amx::quantized_kernels;
    others.bf16.convolve_stored = avx512_amx::convolve_matrix;
    others.bf16.convolve = [](const ConvolveProblem<BFloat16>& problem) {
      const bool tried = problem.stored_weight;  // with the weight as it is stored
      if (tried || !avx512_amx::convolve_matrix(problem)) avx512::kernels.bf16.convolve(problem);
    };
    others.bf16.weight_grad = [](const WeightGradProblem<BFloat16>& problem) {
      if (!avx512_amx::weight_grad_matrix(problem)) avx512::kernels.bf16.weight_grad(problem);
    };
    return others;
  }();
  return table;
}
#endif

// Best first.
const Candidate candidates[] = {
#if defined(GROUPCONV_X86)
    {&avx512_amx_table(), has_avx512_amx, has_fast_avx512_amx},
    {&avx512_bf16_table, has_avx512_bf16, has_fast_avx512_bf16},
    {&avx512_vnni_table, has_avx512_vnni, always},
    {&avx512::kernels, has_avx512, always},
    {&avx2::kernels, has_avx2, always},
#endif
    {&scalar::kernels, always, always},
};

struct Choice {
  const KernelTable* table = nullptr;
  std::string reason;
};

Choice named(const std::string& name, const std::string& who) {
  std::string built;
  for (const Candidate& candidate : candidates) {
    if (name == candidate.table->isa) {
      if (candidate.runs_here()) return {candidate.table, "asked for by " + who};
      return {nullptr, who + " asks for '" + name + "', which this processor does not have"};
    }
    built += std::string(built.empty() ? "" : ", ") + candidate.table->isa;
  }
  return {nullptr, who + " asks for '" + name + "', which is not among those built: " + built};
}

Choice choose() {
  if (const char* name = std::getenv("GROUPCONV_ISA"); name && *name) return named(name, "GROUPCONV_ISA");
  std::string slower;
  for (const Candidate& candidate : candidates) {
    if (!candidate.runs_here()) continue;
    if (candidate.pays_here()) {
      return {candidate.table, "the best one built that this processor has" + slower};
    }
    slower += "; " + std::string(candidate.table->isa) + " runs too, but would be slower here";
  }
  return {nullptr, "no kernels were built"};
}

std::mutex choice_mutex;
std::atomic<const KernelTable*> active{nullptr};
// Under the mutex.
std::string& active_reason() {
  static std::string reason;
  return reason;
}

void activate_choice(const Choice& choice) {
  active_reason() = choice.reason;
  active.store(choice.table, std::memory_order_release);
}

}  // namespace

const KernelTable& kernels() {
  if (const KernelTable* table = active.load(std::memory_order_acquire)) return *table;
  const std::lock_guard lock(choice_mutex);
  if (!active.load()) activate_choice(choose());
  if (const KernelTable* table = active.load()) return *table;
  throw std::runtime_error("groupconv_ext: " + active_reason());
}

}  // namespace groupconv::cpu

using namespace groupconv::cpu;

const char* groupconv_isa_name() {
  try {
    return kernels().isa;
  } catch (const std::runtime_error&) {
    return "";
  }
}

const char* groupconv_isa_reason() {
  groupconv_isa_name();
  static thread_local std::string copy;  // what is returned outlives the lock
  const std::lock_guard lock(choice_mutex);
  copy = active_reason();
  return copy.c_str();
}

int groupconv_force_isa(const char* name) {
  const Choice choice = named(name, "force_isa");
  if (!choice.table) return -1;
  const std::lock_guard lock(choice_mutex);
  activate_choice(choice);
  return 0;
}

const char* groupconv_kernel_list() {
  static const std::string list = [] {
    std::string lines;
    for (const Candidate& candidate : candidates) {
      for (const char* family :
           {"convolve", "weight_grad", "prologue_grad", "masked", "chain", "chain_grad"}) {
        for (const char* dtype : {"float32", "float64", "bfloat16"}) {
          lines += std::string(candidate.table->isa) + " " + family + " " + dtype + "\n";
        }
      }
      lines += std::string(candidate.table->isa) + " quantized uint8\n";
    }
    return lines;
  }();
  return list.c_str();
}
