"""Depthwise separable convolutions and Xception's: space and channels one after the other.

    depthwise separable    y = W^1×1 (W^dw * x)      channelwise k×k, then pointwise
    Xception               y = W^dw * (W^1×1 x)      pointwise, then channelwise k×k

Nothing stands between the two. Both are IGC blocks at the end of their range (igcv1, section 4):
primary groups of one channel, M = 1, and one dense secondary group.
"""

from __future__ import annotations

import torch
from torch import nn

from ..functional import conv2d
from ..partition import Partition
from ..separable import separable_conv2d
from ..window import IntOrPair, Padding
from ._windowed import ParameterFactory, Windowed, check_backend

__all__ = ["DepthwiseSeparableConv2d", "XceptionConv2d"]


class _Separable(Windowed):
    """The parameters of both: ``depthwise`` and ``pointwise``, and a bias at the end.

    Attributes:
        depthwise: ``[channels, 1, kh, kw]``; carries stride, padding and dilation.
        pointwise: ``[N, C, 1, 1]``.
        bias: ``[N]`` or ``None``.
        partitions: The groups of both.
    """

    pointwise_first: bool
    depthwise: nn.Parameter
    pointwise: nn.Parameter
    bias: nn.Parameter | None

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: IntOrPair,
        stride: IntOrPair = 1,
        padding: Padding = 0,
        dilation: IntOrPair = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        backend: str = "auto",
    ) -> None:
        """Take ``nn.Conv2d``'s arguments in its order, then a backend.

        ``groups`` are those of the pointwise convolution; kernel size, stride, padding and
        dilation belong to the channelwise one.
        """
        super().__init__()
        check_backend(backend)
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.groups = groups
        self.backend = backend
        self._keep_arguments(kernel_size, stride, padding, dilation, padding_mode)
        width = out_channels if self.pointwise_first else in_channels
        self.partitions = {
            "depthwise": Partition.contiguous(width, width, width),
            "pointwise": Partition.contiguous(in_channels, out_channels, groups),
        }
        new = ParameterFactory(device, dtype)
        self.depthwise = new(width, 1, *self.kernel_size)
        self.pointwise = new(out_channels, in_channels // groups, 1, 1)
        self.register_parameter("bias", new(out_channels) if bias else None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start both as ``nn.Conv2d`` would start them as layers of their own."""
        for weight in (self.depthwise, self.pointwise):
            nn.init.kaiming_uniform_(weight, a=5**0.5)
        if self.bias is not None:
            last = self.depthwise if self.pointwise_first else self.pointwise
            bound = last[0].numel() ** -0.5
            nn.init.uniform_(self.bias, -bound, bound)

    def extra_repr(self) -> str:
        """The arguments."""
        parts = [f"{self.in_channels}, {self.out_channels}"]
        if self.groups != 1:
            parts.append(f"groups={self.groups}")
        return self._describe(*parts)


class DepthwiseSeparableConv2d(_Separable):
    """A channelwise k×k convolution, then a pointwise one."""

    pointwise_first = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Convolve ``x``."""
        x, padding = self._padded(x)
        return separable_conv2d(
            x,
            self.depthwise,
            self.pointwise,
            pointwise_bias=self.bias,
            partition=self.partitions["depthwise"],
            pointwise_partition=self.partitions["pointwise"],
            stride=self.stride,
            padding=padding,
            dilation=self.dilation,
            backend=self.backend,
        )


class XceptionConv2d(_Separable):
    """A pointwise convolution, then a channelwise k×k one."""

    pointwise_first = True

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Convolve ``x``."""
        x = conv2d(x, self.pointwise, partition=self.partitions["pointwise"], backend=self.backend)
        x, padding = self._padded(x)
        return conv2d(
            x,
            self.depthwise,
            self.bias,
            partition=self.partitions["depthwise"],
            stride=self.stride,
            padding=padding,
            dilation=self.dilation,
            backend=self.backend,
        )
