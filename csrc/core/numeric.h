// bfloat16 as storage: 16 bits that widen to a float32 by a shift and round to nearest even on the way back.
#pragma once

#include <cstdint>
#include <cstring>

namespace groupconv {

struct BFloat16 {
  uint16_t bits;
};

}  // namespace groupconv
