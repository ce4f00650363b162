// Whether sums that matrix registers made were all finite. They multiply what nobody wants by zero, and zero times what is
// infinite or none is not zero: then all has to be done again another way.
#pragma once

#include "cpu/vector/vec.h"

namespace groupconv::cpu {
namespace {

class SumsSeen {
 public:
  GROUPCONV_INLINE Vec<float> look(Vec<float> sum) {
    none_ = multiply_add(sum, zero<float>(), none_);
    return sum;
  }
  bool all_finite() const { return _mm512_cmp_ps_mask(none_.v, none_.v, _CMP_UNORD_Q) == 0; }

 private:
  Vec<float> none_ = zero<float>();  // NaN in lanes where one was not
};

}  // namespace
}  // namespace groupconv::cpu
