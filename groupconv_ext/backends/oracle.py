"""The reference implementation as a backend: slow, and right on every device and dtype."""

from __future__ import annotations

import torch

from .. import reference
from .._layout import is_channels_last
from ..partition import Partition
from ..prologue import Prologue
from ..window import Window
from .registry import Backend, Call

__all__ = ["REFERENCE"]


def _why_not(call: Call) -> str | None:
    return None


def _convolve(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    partition: Partition,
    window: Window,
    activation: str,
    prologue: Prologue | None = None,
) -> torch.Tensor:
    if prologue is not None:
        x = prologue.apply(x)
    y = reference.conv2d(
        x,
        weight,
        bias,
        partition,
        window.stride,
        window.padding,
        window.dilation,
        activation,
        residual,
    )
    return y.contiguous(memory_format=torch.channels_last) if is_channels_last(x) else y


REFERENCE = Backend("reference", _why_not, _convolve)
