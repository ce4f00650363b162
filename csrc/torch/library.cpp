// The ops of the library. Settings are passed one by one: a boxed list costs more than ten integers.
// Sizes that the table holds as well are passed too, so that an output's shape is known where the
// table's contents are not (under torch.compile); an op refuses a table that says otherwise.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(groupconv, m) {
  // activation(conv(input) + bias + residual); weight is packed, [entries, kh, kw]
  m.def(
      "conv2d(Tensor input, Tensor weight, Tensor? bias, Tensor? residual, Tensor table, int out_channels, "
      "int stride_h, int stride_w, int pad_top, int pad_bottom, int pad_left, int pad_right, int dilation_h, "
      "int dilation_w, int activation) -> Tensor");
  m.def(
      "conv2d_input_grad(Tensor grad, Tensor weight, Tensor table, int in_channels, int height, int width, "
      "int stride_h, int stride_w, int pad_top, int pad_bottom, int pad_left, int pad_right, int dilation_h, "
      "int dilation_w, bool channels_last) -> Tensor");
  m.def(
      "conv2d_weight_grad(Tensor grad, Tensor input, Tensor table, int entries, int kernel_h, int kernel_w, "
      "int stride_h, int stride_w, int pad_top, int pad_bottom, int pad_left, int pad_right, "
      "int dilation_h, int dilation_w) -> Tensor");
  // GFLOP/s of independent float32 multiply-adds on one thread
  m.def("fma_peak(float seconds) -> float");
}
