#include "cuda/launch_product.cuh"

namespace groupconv::cuda {

GROUPCONV_LAUNCH_PRODUCT(float)

}  // namespace groupconv::cuda
