#include "cuda/launch_whole_pixels.cuh"

namespace groupconv::cuda {

GROUPCONV_LAUNCH_WHOLE_PIXELS(float)

}  // namespace groupconv::cuda
