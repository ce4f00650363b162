"""What every native operation returns, without running it: sizes, strides and dtype.

For ``torch.compile`` and ``torch.export``. A function here has the name of its operation.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ._layout import compute_dtype, empty_image, is_channels_last
from .window import Window

Pair = tuple[torch.Tensor, torch.Tensor]
Triple = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def _check_devices(*tensors: torch.Tensor | None) -> None:
    # One meta tensor among real ones brings a call here too: nothing in its result would be set.
    devices = {tensor.device for tensor in tensors if tensor is not None}
    if len(devices) > 1:
        raise RuntimeError(f"the operands are on {sorted(map(str, devices))}; expected one device")


def conv2d(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    table: torch.Tensor,
    out_channels: int,
    *window_and_activation: int,
) -> torch.Tensor:
    _check_devices(x, weight, bias, residual, table)
    window = Window(*window_and_activation[:8])
    size = window.output_size(x.shape[2], x.shape[3], weight.shape[-2], weight.shape[-1])
    return empty_image(x, (x.shape[0], out_channels, *size), is_channels_last(x))


def conv2d_input_grad(
    grad: torch.Tensor,
    weight: torch.Tensor,
    table: torch.Tensor,
    in_channels: int,
    height: int,
    width: int,
    *window_and_layout: int,
) -> torch.Tensor:
    _check_devices(grad, weight, table)
    sizes = (grad.shape[0], in_channels, height, width)
    return empty_image(grad, sizes, bool(window_and_layout[-1]))


def conv2d_weight_grad(
    grad: torch.Tensor,
    x: torch.Tensor,
    table: torch.Tensor,
    entries: int,
    kernel_h: int,
    kernel_w: int,
    *window: int,
) -> torch.Tensor:
    _check_devices(grad, x, table)
    return x.new_empty(entries, kernel_h, kernel_w)


def conv2d_backward(
    grad: torch.Tensor,
    output: torch.Tensor | None,
    x: torch.Tensor,
    weight: torch.Tensor,
    table: torch.Tensor,
    *window_activation_and_wanted: int,
) -> Triple:
    _check_devices(grad, output, x, weight, table)
    want_input, want_weight, want_bias = window_activation_and_wanted[-3:]
    n, c, h, w = x.shape
    return (
        empty_image(x, (n, c, h, w), is_channels_last(x)) if want_input else x.new_empty(0),
        weight.new_empty(weight.shape) if want_weight else x.new_empty(0),
        x.new_empty(grad.shape[1] if want_bias else 0),
    )


# ---- with a prologue -----------------------------------------------------------------------------


def prologue_conv2d(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    scale: torch.Tensor | None,
    shift: torch.Tensor | None,
    relu: bool,
    *rest: Any,
) -> torch.Tensor:
    _check_devices(x, scale, shift)
    return conv2d(x, weight, bias, residual, *rest)


def prologue_conv2d_input_grad(
    grad: torch.Tensor,
    weight: torch.Tensor,
    x: torch.Tensor,
    scale: torch.Tensor | None,
    shift: torch.Tensor | None,
    relu: bool,
    table: torch.Tensor,
    *window: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    _check_devices(grad, weight, x, scale, shift, table)
    sizes = (x.shape[0], x.shape[1], x.shape[2], x.shape[3])
    by_scale, by_shift = (
        x.new_empty(x.shape[1], dtype=compute_dtype(x)),
        x.new_empty(x.shape[1], dtype=compute_dtype(x)),
    )
    return empty_image(x, sizes, is_channels_last(x)), by_scale, by_shift


def prologue_conv2d_weight_grad(
    grad: torch.Tensor,
    x: torch.Tensor,
    scale: torch.Tensor | None,
    shift: torch.Tensor | None,
    relu: bool,
    *rest: Any,
) -> torch.Tensor:
    _check_devices(x, scale, shift)
    return conv2d_weight_grad(grad, x, *rest)


# ---- on learned groups -------------------------------------------------------------------------


def pack(dense: torch.Tensor, table: torch.Tensor, entries: int, narrow: bool) -> torch.Tensor:
    _check_devices(dense, table)
    dtype = torch.bfloat16 if narrow else dense.dtype
    return dense.new_empty(entries, *dense.shape[2:], dtype=dtype)


def unpack(
    packed: torch.Tensor, table: torch.Tensor, out_channels: int, in_channels: int, widen: bool
) -> torch.Tensor:
    _check_devices(packed, table)
    dtype = torch.float32 if widen else packed.dtype
    return packed.new_empty(out_channels, in_channels, *packed.shape[1:], dtype=dtype)


def row_labels(logits: torch.Tensor, owner: str) -> torch.Tensor:
    return logits.new_empty(logits.shape[0], dtype=torch.int32)


def kronecker_labels(
    gates: torch.Tensor, in_channels: int, out_channels: int, owner: str
) -> tuple[torch.Tensor, torch.Tensor]:
    return (
        gates.new_empty(in_channels, dtype=torch.int32),
        gates.new_empty(out_channels, dtype=torch.int32),
    )


def labelled_conv2d(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    in_labels: torch.Tensor,
    out_labels: torch.Tensor,
    groups: int,
    *window: int,
) -> torch.Tensor:
    _check_devices(x, weight, bias, in_labels, out_labels)
    size = Window(*window).output_size(x.shape[2], x.shape[3], weight.shape[2], weight.shape[3])
    return empty_image(x, (x.shape[0], weight.shape[0], *size), is_channels_last(x))


def labelled_conv2d_input_grad(
    grad: torch.Tensor,
    weight: torch.Tensor,
    in_labels: torch.Tensor,
    out_labels: torch.Tensor,
    groups: int,
    height: int,
    width: int,
    *window_and_layout: int,
) -> torch.Tensor:
    _check_devices(grad, weight, in_labels, out_labels)
    sizes = (grad.shape[0], weight.shape[1], height, width)
    return empty_image(grad, sizes, bool(window_and_layout[-1]))


def labelled_conv2d_weight_grad(
    grad: torch.Tensor,
    x: torch.Tensor,
    in_labels: torch.Tensor,
    out_labels: torch.Tensor,
    groups: int,
    kernel_h: int,
    kernel_w: int,
    *window: int,
) -> torch.Tensor:
    _check_devices(grad, x, in_labels, out_labels)
    return x.new_empty(grad.shape[1], x.shape[1], kernel_h, kernel_w)


def dense_conv2d_weight_grad(
    grad: torch.Tensor, x: torch.Tensor, kernel_h: int, kernel_w: int, *window: int
) -> torch.Tensor:
    _check_devices(grad, x)
    return x.new_empty(grad.shape[1], x.shape[1], kernel_h, kernel_w)


def mask_weight(
    weight: torch.Tensor, in_labels: torch.Tensor, out_labels: torch.Tensor
) -> torch.Tensor:
    _check_devices(weight, in_labels, out_labels)
    return weight.new_empty(weight.shape)


def label_grad(
    grad: torch.Tensor,
    weight: torch.Tensor,
    input_logits: torch.Tensor,
    output_logits: torch.Tensor,
    in_labels: torch.Tensor,
    out_labels: torch.Tensor,
    winner: bool,
    masked: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    _check_devices(grad, weight, in_labels, out_labels)
    return (
        grad.new_empty(weight.shape if masked else (0,)),
        input_logits.new_empty(input_logits.shape),
        output_logits.new_empty(output_logits.shape),
    )


def kronecker_grad(
    grad: torch.Tensor, weight: torch.Tensor, gates: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    _check_devices(grad, weight, gates)
    return weight.new_empty(weight.shape), weight.new_empty(
        gates.shape, dtype=compute_dtype(weight)
    )


def kronecker_conv2d_grad(
    grad: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    gates: torch.Tensor,
    *window: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    _check_devices(grad, x)
    return kronecker_grad(grad, weight, gates)


# ---- layers of more than one convolution -------------------------------------------------------


def two_level(
    x: torch.Tensor,
    weight: torch.Tensor,
    restriction: torch.Tensor,
    coarse: torch.Tensor,
    bias: torch.Tensor | None,
    table: torch.Tensor,
    *window: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    _check_devices(x, weight, restriction, coarse, bias, table)
    height, width = restriction.shape[1:]
    size = Window(*window).output_size(x.shape[2], x.shape[3], height, width)
    outputs, groups = coarse.shape
    return (
        empty_image(x, (x.shape[0], outputs, *size), is_channels_last(x)),
        empty_image(x, (x.shape[0], groups, *size), is_channels_last(x)),
    )


def separable_conv2d(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    table: torch.Tensor,
    activation: int,
    pointwise_weight: torch.Tensor,
    pointwise_bias: torch.Tensor | None,
    pointwise_table: torch.Tensor,
    pointwise_activation: int,
    residual: torch.Tensor | None,
    channels: int,
    out_channels: int,
    *window: int,
) -> torch.Tensor:
    _check_devices(x, weight, bias, pointwise_weight, pointwise_bias, residual)
    _check_devices(x, table, pointwise_table)
    height, width = weight.shape[1:]
    size = Window(*window).output_size(x.shape[2], x.shape[3], height, width)
    return empty_image(x, (x.shape[0], out_channels, *size), is_channels_last(x))


def chain(
    x: torch.Tensor,
    weights: Sequence[torch.Tensor],
    bias: torch.Tensor | None,
    tables: Sequence[torch.Tensor],
    out_channels: int,
    activation: int,
) -> torch.Tensor:
    _check_devices(x, bias, *weights, *tables)
    return empty_image(x, (x.shape[0], out_channels, x.shape[2], x.shape[3]), is_channels_last(x))


def chain_grad(
    grad: torch.Tensor,
    x: torch.Tensor,
    weights: Sequence[torch.Tensor],
    tables: Sequence[torch.Tensor],
    entries: int,
    needs_input_grad: bool,
    needs_weight_grad: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    _check_devices(grad, x, *weights, *tables)
    sizes = (x.shape[0], x.shape[1], x.shape[2], x.shape[3])
    input_grad = empty_image(x, sizes, is_channels_last(x)) if needs_input_grad else x.new_empty(0)
    return input_grad, x.new_empty(entries if needs_weight_grad else 0)


# ---- of bytes ------------------------------------------------------------------------------------


def quantized_conv2d(
    x: torch.Tensor,
    weight: torch.Tensor,
    start: torch.Tensor,
    scale: torch.Tensor,
    table: torch.Tensor,
    out_channels: int,
    kernel_h: int,
    kernel_w: int,
    *rest: Any,
) -> torch.Tensor:
    _check_devices(x, weight, start, scale, table)
    size = Window(*rest[:8]).output_size(x.shape[2], x.shape[3], kernel_h, kernel_w)
    like = scale if rest[-1] else x
    return empty_image(like, (x.shape[0], out_channels, *size), is_channels_last(x))


def quantize(x: torch.Tensor, scale: float, zero_point: int) -> torch.Tensor:
    sizes = (x.shape[0], x.shape[1], x.shape[2], x.shape[3])
    return empty_image(x.new_empty(0, dtype=torch.uint8), sizes, is_channels_last(x))


def quantized_pack(
    weight: torch.Tensor, table: torch.Tensor, in_channels: int, out_channels: int
) -> torch.Tensor:
    _check_devices(weight, table)
    # Only the table knows how many numbers fill the quads up.
    return weight.new_empty(torch.library.get_ctx().new_dynamic_size())
