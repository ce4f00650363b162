"""Convolutions of uint8 images with int8 weights, for inference on the CPU.

A real number r is stored as a whole number q with a scale and a zero point::

    r = scale · (q − zero_point)

Activations are uint8 with one :class:`Quantization` for a tensor; weights are int8 with a scale for
each output channel and no zero point; products are summed exactly, in int32::

    total[n] = bias[n] + Σ weight · (x − zero_point_x)
    y[n]     = activation( total[n] · scale_x · scale_w[n] )

y leaves as float32, or, divided by its own scale, rounded and moved, as uint8. The bias is a whole
number of steps scale_x · scale_w[n], and nothing is added after the one multiplication in floating
point, so every instruction set gives the same bits.

:func:`groupconv_ext.nn.quantize` does all this to a network; here are the parts.
"""

from __future__ import annotations

import math
from typing import NamedTuple, Self

import torch

from . import _ops
from .autograd import ACTIVATIONS
from .functional import packed_weight
from .partition import Partition
from .window import IntOrPair, Padding, make_window

__all__ = [
    "QUANTIZED_ACTIVATIONS",
    "Quantization",
    "QuantizedWeight",
    "prepare_weight",
    "quantize_weight",
    "quantized_conv2d",
]

QUANTIZED_ACTIVATIONS = (None, "none", "relu", "relu6")
"""What a quantised convolution can do at its end: clamps."""

_LARGEST = 2**31 - 1
_LARGEST_BIAS = 2**30


class Quantization(NamedTuple):
    """How uint8 stands for real numbers: r = scale · (q − zero_point)."""

    scale: float
    zero_point: int

    @classmethod
    def from_range(cls, low: float, high: float) -> Self:
        """The finest one that holds the numbers from ``low`` to ``high``, and 0 exactly."""
        if not (math.isfinite(low) and math.isfinite(high)) or low > high:
            raise ValueError(f"the range is {low} … {high}; expected finite numbers, low ≤ high")
        low, high = min(low, 0.0), max(high, 0.0)
        scale = (high - low) / 255
        if scale < torch.finfo(torch.float32).tiny:  # all zeros, or as good as that
            return cls(1.0, 0)
        return cls(scale, round(-low / scale))

    def checked(self, name: str) -> Self:
        """Itself, or an error that says what is wrong with it."""
        scale, zero_point = self
        if not isinstance(scale, float) or not scale > 0 or not math.isfinite(1 / scale):
            raise ValueError(f"{name} has scale {scale!r}; expected a positive, finite float")
        if not isinstance(zero_point, int) or not 0 <= zero_point <= 255:
            raise ValueError(f"{name} has zero_point {zero_point!r}; expected an int from 0 to 255")
        return self

    def quantize(self, x: torch.Tensor) -> torch.Tensor:
        """uint8 from float32 ``[B, C, H, W]``, to nearest with ties to even; NaN becomes 0."""
        self.checked("the quantization")
        _check_on_cpu("x", x)
        if x.dtype != torch.float32 or x.dim() != 4:
            raise TypeError(f"x is {x.dtype} of shape {list(x.shape)}; expected float32, 4-d")
        _check_no_grad(x)
        return _ops.quantize(x, self.scale, self.zero_point)

    def dequantize(self, q: torch.Tensor) -> torch.Tensor:
        """float32 from uint8."""
        if q.dtype != torch.uint8:
            raise TypeError(f"q is {q.dtype}; expected uint8")
        return (q.float() - self.zero_point) * self.scale


class QuantizedWeight(NamedTuple):
    """An int8 weight as the kernels read it, with what belongs to it; of :func:`prepare_weight`."""

    packed: torch.Tensor
    """int8, four inputs of a group next to each other, sixteen outputs side by side."""
    start: torch.Tensor
    """int32 ``[N]``: the bias, and what the zero point of the input adds."""
    scale: torch.Tensor
    """float32 ``[N]``: what one step of a total is worth, scale_x · scale_w."""
    kernel_size: tuple[int, int]
    read_as: Quantization


def quantize_weight(
    weight: torch.Tensor, bias: torch.Tensor | None, partition: Partition, read_as: Quantization
) -> tuple[torch.Tensor, torch.Tensor]:
    """int8 ``[entries, kh, kw]`` and a float32 scale ``[N]`` for a packed float weight.

    The largest weight of a channel becomes ±127. Where a channel's bias is more than 2³⁰ steps of
    that, steps are as large as the bias needs: the weights are nothing beside it.
    """
    weight = packed_weight(weight.detach(), partition).double()
    if not weight.isfinite().all() or (bias is not None and not bias.isfinite().all()):
        raise ValueError("the weight or the bias holds NaN or Inf; expected finite numbers")
    owner = _output_of_entry(partition)
    largest = weight.flatten(1).abs().amax(1) if weight.numel() else weight.new_zeros(len(owner))
    scale = weight.new_zeros(partition.out_channels).scatter_reduce(0, owner, largest, "amax") / 127
    if bias is not None:
        scale = scale.maximum(bias.detach().double().abs() / (read_as.scale * _LARGEST_BIAS))
    scale = scale.float().clamp(min=torch.finfo(torch.float32).tiny)
    steps = weight / scale.double()[owner, None, None]
    return steps.round().clamp(-127, 127).to(torch.int8), scale


def prepare_weight(
    weight: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    partition: Partition,
    read_as: Quantization,
) -> QuantizedWeight:
    """What :func:`quantized_conv2d` takes, made once.

    Args:
        weight: int8 ``[entries, kh, kw]``.
        scale: float32 ``[N]``, of :func:`quantize_weight`.
        bias: float32 ``[N]``, real numbers.
        partition: As in :func:`~groupconv_ext.conv2d`.
        read_as: How the input is stored.

    Raises:
        ValueError: A shape that does not fit, or sums that could exceed 32 bits.
    """
    read_as.checked("read_as")
    _check_on_cpu("weight", weight)
    if weight.dtype != torch.int8 or weight.dim() != 3 or len(weight) != partition.entries:
        raise ValueError(
            f"weight is {weight.dtype} of shape {list(weight.shape)}; expected int8 "
            f"[{partition.entries}, kh, kw] for {partition}"
        )
    channels = (partition.out_channels,)
    for name, tensor in (("scale", scale), ("bias", bias)):
        if tensor is not None and (tensor.shape != channels or tensor.dtype != torch.float32):
            raise ValueError(
                f"{name} is {tensor.dtype} of shape {list(tensor.shape)}; expected float32 "
                f"{list(channels)}"
            )
    if not (scale.isfinite() & (scale > 0)).all():
        raise ValueError("scale holds a number that is not positive and finite")
    owner = _output_of_entry(partition)
    sums = weight.new_zeros(channels, dtype=torch.int64)
    by_entry = weight.long().flatten(1)
    step = scale.double() * read_as.scale
    bias_steps = sums if bias is None else (bias.double() / step).round()
    reach = bias_steps.abs().double() + 255.0 * sums.index_add(0, owner, by_entry.abs().sum(1))
    if not (reach <= _LARGEST).all():
        worst = int(reach.argmax())
        raise ValueError(
            f"sums of output channel {worst} could reach {reach[worst]:.4g}, beyond 32 bits; "
            "expected fewer inputs, or a larger scale of the weight"
        )
    start = bias_steps.long() - read_as.zero_point * sums.index_add(0, owner, by_entry.sum(1))
    return QuantizedWeight(
        _ops.quantized_pack(
            weight, partition.cpu_table, partition.in_channels, partition.out_channels
        ),
        start.to(torch.int32),
        step.float(),
        (weight.shape[1], weight.shape[2]),
        read_as,
    )


def quantized_conv2d(
    x: torch.Tensor,
    weight: QuantizedWeight,
    *,
    partition: Partition,
    write_as: Quantization | None = None,
    stride: IntOrPair = 1,
    padding: Padding = 0,
    dilation: IntOrPair = 1,
    activation: str | None = None,
) -> torch.Tensor:
    """Convolve uint8 ``x`` in the groups of ``partition``; padding stands for 0.0.

    Args:
        x: uint8 ``[B, C, H, W]``, stored as ``weight.read_as`` says; the output keeps its memory
            format, of which channels_last is the faster.
        weight: Of :func:`prepare_weight`.
        partition: The one that the weight was prepared for.
        write_as: How the output is stored as uint8; ``None``: it is float32.
        stride: As in :func:`~groupconv_ext.conv2d`, like ``padding`` and ``dilation``.
        padding: See ``stride``.
        dilation: See ``stride``.
        activation: ``"relu"``, ``"relu6"`` or ``None``.

    Raises:
        TypeError: An argument or a dtype of the wrong kind.
        ValueError: A value that does not fit the partition, the window or the processor.
    """
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"x is {x!r}; expected a tensor")
    if not isinstance(weight, QuantizedWeight):
        raise TypeError(f"weight is {weight!r}; expected what prepare_weight returns")
    if not isinstance(partition, Partition):
        raise TypeError(f"partition is {partition!r}; expected a groupconv_ext.Partition")
    _check_on_cpu("x", x)
    if x.dtype != torch.uint8:
        raise TypeError(f"x is {x.dtype}; expected uint8: weight.read_as.quantize(x) makes that")
    if x.dim() != 4 or x.shape[1] != partition.in_channels:
        raise ValueError(
            f"x has shape {list(x.shape)}; expected [B, {partition.in_channels}, H, W] for "
            f"{partition}"
        )
    if activation not in QUANTIZED_ACTIVATIONS:
        raise ValueError(f"activation is {activation!r}; expected one of {QUANTIZED_ACTIVATIONS}")
    window = make_window(*weight.kernel_size, stride, padding, dilation)
    window.output_size(x.shape[2], x.shape[3], *weight.kernel_size)
    scale, zero_point = (1.0, 0) if write_as is None else write_as.checked("write_as")
    return _ops.quantized_conv2d(
        x,
        weight.packed,
        weight.start,
        weight.scale,
        partition.table(x.device),
        partition.out_channels,
        *weight.kernel_size,
        *window,
        ACTIVATIONS.index(activation or "none"),
        weight.read_as.zero_point,
        scale,
        zero_point,
        write_as is None,
    )


def _output_of_entry(partition: Partition) -> torch.Tensor:
    """The output channel that every entry of a packed weight adds to."""
    outputs = torch.arange(partition.out_channels)[:, None]
    return partition.pack(outputs.expand(-1, partition.in_channels))


def _check_on_cpu(name: str, x: torch.Tensor) -> None:
    if x.device.type not in ("cpu", "meta"):
        raise ValueError(
            f"{name} is on {x.device}; quantised convolutions run on the CPU: move it there, or "
            "keep the layer in floating point"
        )


def _check_no_grad(x: torch.Tensor) -> None:
    if torch.is_grad_enabled() and x.requires_grad:
        raise RuntimeError(
            "x requires a gradient, and rounding to whole numbers has none; call under "
            "torch.inference_mode() or torch.no_grad(), or train before the layers are quantised"
        )
