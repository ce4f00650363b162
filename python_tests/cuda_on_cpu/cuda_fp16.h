#pragma once

struct __half {
  _Float16 value = 0;

  __half() = default;
  __half(float x) : value(static_cast<_Float16>(x)) {}
  operator float() const { return static_cast<float>(value); }
};
