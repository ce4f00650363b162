// What happens to a sum before it is stored: y = activation(sum + bias + residual).
#pragma once

#include <cstdint>

namespace groupconv {

enum class Activation : int64_t { none = 0, relu = 1, relu6 = 2, silu = 3, hardswish = 4 };
constexpr int64_t activation_count = 5;

// none, relu and relu6 are clamps: free inside a kernel that has the sum in a register.
constexpr bool is_clamp(Activation activation) { return activation <= Activation::relu6; }

}  // namespace groupconv
