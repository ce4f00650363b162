// Functions that must not be emitted out of line: a header that is compiled once per instruction set would
// otherwise leave the linker several copies of one name, and it may keep the one that needs AVX-512.
#pragma once

#define GROUPCONV_INLINE inline __attribute__((always_inline))
#define GROUPCONV_INLINE_LAMBDA __attribute__((always_inline))
