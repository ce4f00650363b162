#include "cuda/launch_wgmma.cuh"

namespace groupconv::cuda {

GROUPCONV_LAUNCH_WGMMA(__nv_bfloat16)

}  // namespace groupconv::cuda
