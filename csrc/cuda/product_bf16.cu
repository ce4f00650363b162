#include "cuda/launch_product.cuh"

namespace groupconv::cuda {

GROUPCONV_LAUNCH_PRODUCT(__nv_bfloat16)

}  // namespace groupconv::cuda
