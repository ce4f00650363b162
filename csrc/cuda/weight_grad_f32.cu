#include "cuda/launch_weight_grad.cuh"

namespace groupconv::cuda {

GROUPCONV_LAUNCH_WEIGHT_GRAD(float)

}  // namespace groupconv::cuda
