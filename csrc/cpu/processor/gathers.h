// Whether a processor's gather is worth using.
#pragma once

namespace groupconv::cpu {

// False where it is slower than loading its elements one by one, let alone transposing (staging/turned_pixels.h).
bool gathers_pay();

}  // namespace groupconv::cpu
