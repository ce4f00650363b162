"""The weight expanded with zeros: more multiply-adds, in the vendor's best kernel."""

from __future__ import annotations

import torch

from ..partition import Partition
from ..prologue import Prologue
from ..window import Window
from .registry import Backend, Call
from .vendor import finish, grouped_conv2d

__all__ = ["DENSE"]


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
    y = grouped_conv2d(x, partition.unpack(weight), bias, window, 1)
    return finish(y, residual, activation)


DENSE = Backend("dense", _why_not, _convolve)
