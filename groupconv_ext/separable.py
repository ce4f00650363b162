"""A convolution and a pointwise one after it, in one operation.

    t = activation( W * x + bias )
    y = pointwise_activation( W' t + pointwise_bias + residual )

each in the groups of a partition of its own: depthwise separable convolutions, and the block of
IGCV1. Without gradients the native operation makes t part by part, in memory that stays in cache,
and no tensor holds all of it. A training step keeps t for the backward pass anyway, so there it is
two convolutions.
"""

from __future__ import annotations

import torch
from torch.autograd import forward_ad

from . import _ops
from .autograd import ACTIVATIONS, wants_grad
from .backends import Call, choose
from .functional import conv2d, packed_weight
from .partition import Partition
from .window import IntOrPair, Padding, make_window

__all__ = ["separable_conv2d"]


def separable_conv2d(
    x: torch.Tensor,
    weight: torch.Tensor,
    pointwise_weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    pointwise_bias: torch.Tensor | None = None,
    *,
    partition: Partition,
    pointwise_partition: Partition,
    stride: IntOrPair = 1,
    padding: Padding = 0,
    dilation: IntOrPair = 1,
    activation: str | None = None,
    pointwise_activation: str | None = None,
    residual: torch.Tensor | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """Convolve ``x`` by ``weight``, and the result by the 1×1 ``pointwise_weight``.

    Args:
        x: ``[B, C, H, W]`` or ``[C, H, W]``; the output keeps its memory format.
        weight: As in :func:`~groupconv_ext.conv2d`, of ``partition``.
        pointwise_weight: The same with a 1×1 window, of ``pointwise_partition``.
        bias: Of the first convolution.
        pointwise_bias: Of the second.
        partition: The groups of the first; channelwise: ``Partition.contiguous(C, C, C)``.
        pointwise_partition: The groups of the second; it reads what the first writes.
        stride: Of the first, and so are ``padding`` and ``dilation``.
        padding: See ``stride``.
        dilation: See ``stride``.
        activation: Between the two, as in :func:`~groupconv_ext.conv2d`.
        pointwise_activation: At the end.
        residual: Added before the last activation; the shape of the output.
        backend: As in :func:`~groupconv_ext.conv2d`, for both.

    Raises:
        TypeError: An argument or a dtype of the wrong kind.
        ValueError: A value that does not fit a partition or the window.
        groupconv_ext.backends.BackendError: A backend asked for by name that cannot run.
    """
    _check_tensors(
        {"x": x, "weight": weight, "pointwise_weight": pointwise_weight},
        {"bias": bias, "pointwise_bias": pointwise_bias, "residual": residual},
    )
    _check_stages(pointwise_weight, partition, pointwise_partition)
    if x.dim() == 3:
        return separable_conv2d(
            x.unsqueeze(0),
            weight,
            pointwise_weight,
            bias,
            pointwise_bias,
            partition=partition,
            pointwise_partition=pointwise_partition,
            stride=stride,
            padding=padding,
            dilation=dilation,
            activation=activation,
            pointwise_activation=pointwise_activation,
            residual=None if residual is None else residual.unsqueeze(0),
            backend=backend,
        ).squeeze(0)

    def one_by_one() -> torch.Tensor:
        between = conv2d(
            x,
            weight,
            bias,
            partition=partition,
            stride=stride,
            padding=padding,
            dilation=dilation,
            activation=activation,
            backend=backend,
        )
        return conv2d(
            between,
            pointwise_weight,
            pointwise_bias,
            partition=pointwise_partition,
            activation=pointwise_activation,
            residual=residual,
            backend=backend,
        )

    needs_grad = wants_grad(x, weight, bias, pointwise_weight, pointwise_bias, residual)
    device = x.device.type
    autocast = device != "meta" and torch.is_autocast_enabled(device)
    call = Call(device, x.dtype, needs_grad, forward_ad._current_level >= 0)
    if needs_grad or autocast or device not in ("cpu", "meta"):
        return one_by_one()
    if choose(backend, call).name != "native" or x.dim() != 4:
        return one_by_one()
    if any(a is not None and a not in ACTIVATIONS for a in (activation, pointwise_activation)):
        return one_by_one()  # which refuses it
    first = packed_weight(weight, partition)
    try:
        return _ops.separable_conv2d(
            x,
            first,
            bias,
            partition.table(x.device),
            _CODES[activation],
            packed_weight(pointwise_weight, pointwise_partition),
            pointwise_bias,
            pointwise_partition.table(x.device),
            _CODES[pointwise_activation],
            residual,
            partition.out_channels,
            pointwise_partition.out_channels,
            *make_window(first.shape[1], first.shape[2], stride, padding, dilation),
        )
    except RuntimeError:
        one_by_one()  # says in everyone's words what does not fit
        raise


_CODES: dict[str | None, int] = {name: code for code, name in enumerate(ACTIVATIONS)}
_CODES[None] = 0


def _check_tensors(operands: dict[str, object], optional: dict[str, object]) -> None:
    for name, value in (operands | optional).items():
        if isinstance(value, torch.Tensor) or (value is None and name in optional):
            continue
        raise TypeError(f"{name} is {value!r}; expected a tensor{' or None' * (name in optional)}")


def _check_stages(
    pointwise_weight: torch.Tensor, partition: object, pointwise_partition: object
) -> None:
    if pointwise_weight.shape[-2:] != (1, 1):
        raise ValueError(
            f"pointwise_weight has shape {list(pointwise_weight.shape)}; expected a 1×1 window"
        )
    for name, value in (("partition", partition), ("pointwise_partition", pointwise_partition)):
        if not isinstance(value, Partition):
            raise TypeError(f"{name} is {value!r}; expected a groupconv_ext.Partition")
    assert isinstance(partition, Partition)
    assert isinstance(pointwise_partition, Partition)
    if pointwise_partition.in_channels != partition.out_channels:
        raise ValueError(
            f"pointwise_partition reads {pointwise_partition.in_channels} channels and partition "
            f"writes {partition.out_channels}; expected the same number"
        )
