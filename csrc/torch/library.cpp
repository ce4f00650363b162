// The ops of the library. Settings are passed one by one: a boxed list costs more than ten integers.
// Sizes that the table holds as well are passed too, so that an output's shape is known where the
// table's contents are not (under torch.compile); an op refuses a table that says otherwise.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(groupconv, m) {
  // activation(conv(input) + bias + residual); weight is packed, [entries, kh, kw]; on the CPU that of even groups
  // may be [outputs, inputs of a group, kh, kw]
  m.def(
      "conv2d(Tensor input, Tensor weight, Tensor? bias, Tensor? residual, Tensor table, int out_channels, "
      "int stride_h=1, int stride_w=1, int pad_top=0, int pad_bottom=0, int pad_left=0, int pad_right=0, "
      "int dilation_h=1, int dilation_w=1, int activation=0) -> Tensor");
  m.def(
      "conv2d_input_grad(Tensor grad, Tensor weight, Tensor table, int in_channels, int height, int width, "
      "int stride_h, int stride_w, int pad_top, int pad_bottom, int pad_left, int pad_right, int dilation_h, "
      "int dilation_w, bool channels_last) -> Tensor");
  m.def(
      "conv2d_weight_grad(Tensor grad, Tensor input, Tensor table, int entries, int kernel_h, int kernel_w, "
      "int stride_h, int stride_w, int pad_top, int pad_bottom, int pad_left, int pad_right, "
      "int dilation_h, int dilation_w) -> Tensor");
  // The gradients of input, weight and bias that are wanted (empty: not wanted) from the gradient of
  // activation(conv(input) + bias), which is none, or a clamp whose output is given
  m.def(
      "conv2d_backward(Tensor grad, Tensor? output, Tensor input, Tensor weight, Tensor table, int stride_h, "
      "int stride_w, int pad_top, int pad_bottom, int pad_left, int pad_right, int dilation_h, "
      "int dilation_w, int activation, bool want_input, bool want_weight, bool want_bias) "
      "-> (Tensor, Tensor, Tensor)");
  // Between dense [N, C, *kernel] and packed [entries, *kernel]; narrow: float32 to bfloat16, widen: back
  m.def("pack(Tensor dense, Tensor table, int entries, bool narrow) -> Tensor");
  m.def("unpack(Tensor packed, Tensor table, int out_channels, int in_channels, bool widen) -> Tensor");
  // A group for every channel, int32. `owner` is who to blame where a number is not finite.
  m.def("row_labels(Tensor logits, str owner) -> Tensor");
  m.def("kronecker_labels(Tensor gates, int in_channels, int out_channels, str owner) -> (Tensor, Tensor)");
  // conv(input) + bias in the groups of labels, with a dense weight of which the selected blocks are read
  m.def(
      "labelled_conv2d(Tensor input, Tensor weight, Tensor? bias, Tensor in_labels, Tensor out_labels, "
      "int groups, int stride_h, int stride_w, int pad_top, int pad_bottom, int pad_left, int pad_right, "
      "int dilation_h, int dilation_w) -> Tensor");
  m.def(
      "labelled_conv2d_input_grad(Tensor grad, Tensor weight, Tensor in_labels, Tensor out_labels, "
      "int groups, int height, int width, int stride_h, int stride_w, int pad_top, int pad_bottom, "
      "int pad_left, int pad_right, int dilation_h, int dilation_w, bool channels_last) -> Tensor");
  m.def(
      "labelled_conv2d_weight_grad(Tensor grad, Tensor input, Tensor in_labels, Tensor out_labels, "
      "int groups, int kernel_h, int kernel_w, int stride_h, int stride_w, int pad_top, int pad_bottom, "
      "int pad_left, int pad_right, int dilation_h, int dilation_w) -> Tensor");
  // One group of all channels: [N, C, kernel_h, kernel_w]
  m.def(
      "dense_conv2d_weight_grad(Tensor grad, Tensor input, int kernel_h, int kernel_w, int stride_h, "
      "int stride_w, int pad_top, int pad_bottom, int pad_left, int pad_right, int dilation_h, "
      "int dilation_w) -> Tensor");
  // weight where labels agree, zero elsewhere
  m.def("mask_weight(Tensor weight, Tensor in_labels, Tensor out_labels) -> Tensor");
  // From the dense gradient of the masked weight: the weight's (masked, or empty) and the logits'
  m.def(
      "label_grad(Tensor grad, Tensor weight, Tensor input_logits, Tensor output_logits, Tensor in_labels, "
      "Tensor out_labels, bool winner, bool masked) -> (Tensor, Tensor, Tensor)");
  // The weight's gradient and the gates', from the dense gradient of the masked weight, or straight from the
  // convolution's operands, computing the blocks that are needed
  m.def("kronecker_grad(Tensor grad, Tensor weight, Tensor gates) -> (Tensor, Tensor)");
  m.def(
      "kronecker_conv2d_grad(Tensor grad, Tensor input, Tensor weight, Tensor gates, int stride_h, "
      "int stride_w, int pad_top, int pad_bottom, int pad_left, int pad_right, int dilation_h, "
      "int dilation_w) -> (Tensor, Tensor)");
  // z = a channel for each group, [reads, kh, kw] of restriction; y = conv(input) + coarse · z + bias, coarse
  // [outputs, groups]. Returns y and z
  m.def(
      "two_level(Tensor input, Tensor weight, Tensor restriction, Tensor coarse, Tensor? bias, Tensor table, "
      "int stride_h, int stride_w, int pad_top, int pad_bottom, int pad_left, int pad_right, int dilation_h, "
      "int dilation_w) -> (Tensor, Tensor)");
  // activation(W_S … W_1 input + bias): pointwise stages, each with a packed weight [entries, 1, 1] and a table
  m.def(
      "chain(Tensor input, Tensor[] weights, Tensor? bias, Tensor[] tables, int out_channels, int activation) "
      "-> Tensor");
  // pointwise_activation(pointwise(activation(conv(input) + bias)) + pointwise_bias + residual), the second
  // convolution 1×1; `channels` lie between the two
  m.def(
      "separable_conv2d(Tensor input, Tensor weight, Tensor? bias, Tensor table, int activation, "
      "Tensor pointwise_weight, Tensor? pointwise_bias, Tensor pointwise_table, int pointwise_activation, "
      "Tensor? residual, int channels, int out_channels, int stride_h, int stride_w, int pad_top, "
      "int pad_bottom, int pad_left, int pad_right, int dilation_h, int dilation_w) -> Tensor");
  // ∂L/∂input and the stages' ∂L/∂weight one after another, [Σ entries]; of size 0 where not asked for
  m.def(
      "chain_grad(Tensor grad, Tensor input, Tensor[] weights, Tensor[] tables, int entries, "
      "bool needs_input_grad, bool needs_weight_grad) -> (Tensor, Tensor)");
  // conv2d and its gradients where relu(input · scale + shift), or without relu, is convolved: one scale and
  // shift per input channel. The input gradient comes with the scale's and the shift's, all from one pass.
  m.def(
      "prologue_conv2d(Tensor input, Tensor weight, Tensor? bias, Tensor? residual, Tensor? scale, "
      "Tensor? shift, bool relu, Tensor table, int out_channels, int stride_h, int stride_w, int pad_top, "
      "int pad_bottom, int pad_left, int pad_right, int dilation_h, int dilation_w, int activation) -> Tensor");
  m.def(
      "prologue_conv2d_input_grad(Tensor grad, Tensor weight, Tensor input, Tensor? scale, Tensor? shift, "
      "bool relu, Tensor table, int stride_h, int stride_w, int pad_top, int pad_bottom, int pad_left, "
      "int pad_right, int dilation_h, int dilation_w) -> (Tensor, Tensor, Tensor)");
  m.def(
      "prologue_conv2d_weight_grad(Tensor grad, Tensor input, Tensor? scale, Tensor? shift, bool relu, "
      "Tensor table, int entries, int kernel_h, int kernel_w, int stride_h, int stride_w, int pad_top, "
      "int pad_bottom, int pad_left, int pad_right, int dilation_h, int dilation_w) -> Tensor");
  // An int8 weight [entries, kh, kw] in the order in which quantized_conv2d reads it
  m.def("quantized_pack(Tensor weight, Tensor table, int in_channels, int out_channels) -> Tensor");
  // activation((start + Σ weight · input) · scale), start int32 and scale float32 per output channel, of a uint8
  // input; as float32, or divided by output_scale, rounded and moved to output_zero_point as uint8
  m.def(
      "quantized_conv2d(Tensor input, Tensor weight, Tensor start, Tensor scale, Tensor table, "
      "int out_channels, int kernel_h, int kernel_w, int stride_h, int stride_w, int pad_top, int pad_bottom, "
      "int pad_left, int pad_right, int dilation_h, int dilation_w, int activation, int input_zero_point, "
      "float output_scale, int output_zero_point, bool floating) -> Tensor");
  // uint8 from float32: input / scale, rounded and moved to zero_point
  m.def("quantize(Tensor input, float scale, int zero_point) -> Tensor");
  // Whether the CUDA kernels may multiply float32 in TF32; not, at first. Without CUDA it has no effect
  m.def("allow_tf32(bool allowed) -> ()");
  // In how much memory weights are kept as kernels pack them, for calls on the CPU to come; none, at first
  m.def("keep_weights(int most_bytes) -> ()");
  // After a change that the version of a weight does not show
  m.def("drop_kept_weights() -> ()");
  // The bytes that are kept, and how often since keep_weights a kernel has found what it needs there, and has not
  m.def("kept_weights() -> (int, int, int)");
  // GFLOP/s of independent multiply-adds on one thread: of float32, or of bfloat16 as it is multiplied here
  m.def("fma_peak(float seconds, bool bfloat16=False) -> float");
}
