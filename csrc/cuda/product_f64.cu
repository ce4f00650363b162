#include "cuda/launch_product.cuh"

namespace groupconv::cuda {

GROUPCONV_LAUNCH_PRODUCT(double)

}  // namespace groupconv::cuda
