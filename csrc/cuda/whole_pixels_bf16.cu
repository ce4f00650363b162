#include "cuda/launch_whole_pixels.cuh"

namespace groupconv::cuda {

GROUPCONV_LAUNCH_WHOLE_PIXELS(__nv_bfloat16)

}  // namespace groupconv::cuda
