#include "cpu/processor/gathers.h"

namespace groupconv::cpu {
namespace {

// Sixteen numbers take 7 cycles on a Xeon that was measured; on a Zen 4, which makes a program of small steps of the
// instruction, 20, and 10 loaded one by one (benches/NOTES.md).
bool ask() {
#if defined(GROUPCONV_X86)
  return !__builtin_cpu_is("amd");
#else
  return true;
#endif
}

}  // namespace

bool gathers_pay() {
  static const bool pay = ask();
  return pay;
}

}  // namespace groupconv::cpu
