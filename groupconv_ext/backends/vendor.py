"""Group convolution by PyTorch's own libraries (oneDNN, cuDNN): what every use of them shares."""

from __future__ import annotations

import torch
from torch.nn import functional

from ..reference import activations, sound_conv2d
from ..window import Window

__all__ = ["finish", "grouped_conv2d"]


def grouped_conv2d(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, window: Window, groups: int
) -> torch.Tensor:
    """``F.conv2d`` for any window, uneven padding included."""
    top, bottom, left, right = window.padding
    stride, padding = window.stride, (top, left)
    pointwise = weight.shape[2:] == (1, 1)
    if top != bottom or left != right or (pointwise and (top or left)):
        x, padding = functional.pad(x, (left, right, top, bottom)), (0, 0)
    if pointwise and stride != (1, 1):
        # The same numbers by another way: PyTorch's weight gradient of a strided 1×1 convolution
        # corrupts the heap on channels_last inputs with channel counts off the vector width (seen
        # on the CPU in 2.13 and 2.15).
        x, stride = x[:, :, :: stride[0], :: stride[1]], (1, 1)
    return sound_conv2d(x, weight, bias, stride, padding, window.dilation, groups)


def finish(y: torch.Tensor, residual: torch.Tensor | None, activation: str) -> torch.Tensor:
    """The part of the epilogue that the vendor's convolution leaves over."""
    return activations[activation](y if residual is None else y + residual)
