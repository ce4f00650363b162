// Whether a processor's gather is worth using.
#pragma once

namespace groupconv::cpu {

// False where it is slower than loading its elements one by one.
bool gathers_pay();

}  // namespace groupconv::cpu
