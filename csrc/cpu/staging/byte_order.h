// A pixel's bytes in another order: the gather of a partition's inputs and the scatter of its outputs where the
// channels of a pixel are neighbours.
//
// With AVX-512 VBMI a vector of 64 places at a time: one byte permutation for each vector of the pixel that has
// some of them, merged into what the others gave. Elsewhere byte by byte.
#pragma once

#include "cpu/staging/workspace.h"
#include "cpu/vector/strides.h"

namespace groupconv::cpu {
namespace {

#if defined(__AVX512VBMI__)

class ByteOrder {
  static constexpr int64_t lanes = 64;

  struct Step {
    uint64_t taken;  // places that take one of its bytes
    int32_t vector;  // of the pixel
  };

 public:
  static void plan(Workspace& shared, int64_t places, int64_t bytes) {
    const int64_t vectors = divide_up(places, lanes);
    shared.plan<uint8_t>(vectors * lanes);
    shared.plan<int32_t>(vectors + 1);
    shared.plan<Step>(vectors * divide_up(bytes, lanes));
  }

  // order[place]: which of the pixel's bytes; negative: any.
  void open(Workspace& shared, const int32_t* order, int64_t places, int64_t bytes) {
    const int64_t vectors = divide_up(places, lanes), sources = divide_up(bytes, lanes);
    index_ = shared.take<uint8_t>(vectors * lanes);
    first_step_ = shared.take<int32_t>(vectors + 1);
    steps_ = shared.take<Step>(vectors * sources);
    places_ = places;
    whole_sources_ = bytes / lanes;
    last_present_ = first_bytes(bytes % lanes);
    int32_t count = 0;
    for (int64_t v = 0; v < vectors; ++v) {
      Step* steps = steps_ + count;
      for (int64_t s = 0; s < sources; ++s) steps[s] = {0, static_cast<int32_t>(s)};
      for (int64_t i = 0; i < lanes; ++i) {
        const int64_t place = v * lanes + i, from = place < places ? order[place] : -1;
        index_[place] = static_cast<uint8_t>(from & (lanes - 1));
        if (from >= 0) steps[from / lanes].taken |= uint64_t{1} << i;
      }
      first_step_[v] = count;
      for (int64_t s = 0; s < sources; ++s) {
        if (steps[s].taken) steps_[count++] = steps[s];
      }
    }
    first_step_[vectors] = count;
  }

  // Writes `places` bytes of every pixel, those that stand for any byte as zeros. Eight pixels at a time: what
  // a step needs is loaded once, and each has a chain of merges of its own.
  void run(const uint8_t* from, int64_t from_stride, uint8_t* to, int64_t to_stride, int64_t pixels) const {
    for (; pixels >= 8; pixels -= 8, from += 8 * from_stride, to += 8 * to_stride) {
      run_some<8>(from, from_stride, to, to_stride);
    }
    if (pixels >= 4) {
      run_some<4>(from, from_stride, to, to_stride);
      pixels -= 4, from += 4 * from_stride, to += 4 * to_stride;
    }
    for (; pixels > 0; --pixels, from += from_stride, to += to_stride) {
      run_some<1>(from, from_stride, to, to_stride);
    }
  }

 private:
  // Not inline: among a driver's own variables its addresses would not find general registers.
  template <int P>
  __attribute__((noinline)) void run_some(const uint8_t* from, int64_t from_stride, uint8_t* to,
                                          int64_t to_stride) const {
    const Strides strides(from_stride);
    for (int64_t v = 0, left = places_; left > 0; ++v, left -= lanes) {
      const __m512i index = _mm512_loadu_si512(index_ + v * lanes);
      __m512i bytes[P];
#pragma GCC unroll 8
      for (int p = 0; p < P; ++p) bytes[p] = _mm512_setzero_si512();
      for (const Step *step = steps_ + first_step_[v], *end = steps_ + first_step_[v + 1]; step < end;
           ++step) {
        const uint8_t* source = from + step->vector * lanes;
        if (step->vector < whole_sources_) {
#pragma GCC unroll 8
          for (int p = 0; p < P; ++p) merge(bytes[p], step->taken, index, strides.at(source, p));
        } else {
#pragma GCC unroll 8
          for (int p = 0; p < P; ++p) {
            const __m512i vector = _mm512_maskz_loadu_epi8(last_present_, strides.at(source, p));
            bytes[p] = _mm512_mask_permutexvar_epi8(bytes[p], step->taken, index, vector);
          }
        }
      }
#pragma GCC unroll 8
      for (int p = 0; p < P; ++p) {
        uint8_t* const dest = to + p * to_stride + v * lanes;
        if (left >= lanes) {
          _mm512_storeu_si512(dest, bytes[p]);
        } else {
          _mm512_mask_storeu_epi8(dest, first_bytes(left), bytes[p]);
        }
      }
    }
  }

  // With the intrinsic the compiler copies what is merged into, and loads the vector by itself.
  static GROUPCONV_INLINE void merge(__m512i& bytes, __mmask64 taken, __m512i index, const uint8_t* vector) {
    asm("vpermb %1, %2, %0 %{%3%}"
        : "+v"(bytes)
        : "m"(*reinterpret_cast<const __m512i_u*>(vector)), "v"(index), "Yk"(taken));
  }

  static __mmask64 first_bytes(int64_t n) {
    return n >= lanes ? ~uint64_t{0} : (uint64_t{1} << larger<int64_t>(n, 0)) - 1;
  }

  uint8_t* index_ = nullptr;
  int32_t* first_step_ = nullptr;
  Step* steps_ = nullptr;
  int64_t places_ = 0, whole_sources_ = 0;
  __mmask64 last_present_ = 0;
};

#else

class ByteOrder {
 public:
  static void plan(Workspace& shared, int64_t places, int64_t) { shared.plan<int32_t>(places); }
  void open(Workspace& shared, const int32_t* order, int64_t places, int64_t) {
    order_ = shared.take<int32_t>(places);
    places_ = places;
    for (int64_t i = 0; i < places; ++i) order_[i] = larger(order[i], 0);
  }
  void run(const uint8_t* from, int64_t from_stride, uint8_t* to, int64_t to_stride, int64_t pixels) const {
    for (; pixels > 0; --pixels, from += from_stride, to += to_stride) {
      uint8_t* __restrict dest = to;
#pragma GCC unroll 8
      for (int64_t i = 0; i < places_; ++i) dest[i] = from[order_[i]];
    }
  }

 private:
  int32_t* order_ = nullptr;
  int64_t places_ = 0;
};

#endif

}  // namespace
}  // namespace groupconv::cpu
