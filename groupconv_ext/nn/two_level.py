"""GC-2L, two-level group convolution (two_level, eq. 3.3-3.5): groups that hear of each other.

A group convolution is a block-diagonal matrix, and no group knows what the others see. Each group
k now also makes one representative channel, and every group adds what it wants of all of them::

    z_k = R_k * x_k               one channel a group, R_k of A_k's window and stride      (3.3)
    y_k = A_k * x_k + S_k z       S_k: 1×1, from all G representatives to group k          (3.4)

for the C / G input channels x_k of group k. Of z there are few channels, so R is cheap, and S z is
no pass of its own: the representatives are G more rows in the sum of each of A's groups
(:mod:`groupconv_ext.two_level`). Beyond a group convolution there are C·kh·kw weights of R and N·G
of S.
"""

from __future__ import annotations

import torch
from torch import nn

from ..learned import check_tensor
from ..two_level import TwoLevelPartitions, two_level_conv2d
from ..window import IntOrPair, Padding
from ._windowed import ParameterFactory, Windowed, check_backend

__all__ = ["TwoLevelConv2d"]


class TwoLevelConv2d(Windowed):
    """``nn.Conv2d(groups=G)`` plus what all groups share of one representative channel each.

    Attributes:
        weight: A, ``[N, C / G, kh, kw]``.
        restriction: R, ``[G, C / G, kh, kw]``.
        coarse: S, ``[N, G]``.
        bias: ``[N]`` or ``None``.
        partition: The groups of A.
    """

    weight: nn.Parameter
    restriction: nn.Parameter
    coarse: nn.Parameter
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
        """Take ``nn.Conv2d``'s arguments in its order, then a backend."""
        super().__init__()
        self._partitions = TwoLevelPartitions(in_channels, out_channels, groups)
        self.partition = self._partitions.within
        check_backend(backend)
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.groups = groups
        self.backend = backend
        self._keep_arguments(kernel_size, stride, padding, dilation, padding_mode)
        new = ParameterFactory(device, dtype)
        window = (in_channels // groups, *self.kernel_size)
        self.weight = new(out_channels, *window)
        self.restriction = new(groups, *window)
        self.coarse = new(out_channels, groups)
        self.register_parameter("bias", new(out_channels) if bias else None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start A and R as ``nn.Conv2d`` starts a layer of a group's size, S as one from z to y."""
        for weight in (self.weight, self.restriction, self.coarse):
            nn.init.kaiming_uniform_(weight, a=5**0.5)
        if self.bias is not None:
            bound = self.weight[0].numel() ** -0.5
            nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Convolve ``x``."""
        check_tensor(x)
        if x.dim() == 3:
            return self.forward(x.unsqueeze(0)).squeeze(0)  # not through __call__: hooks run once
        x, padding = self._padded(x)
        return two_level_conv2d(
            x,
            self.weight,
            self.restriction,
            self.coarse,
            self.bias,
            partitions=self._partitions,
            stride=self.stride,
            padding=padding,
            dilation=self.dilation,
            backend=self.backend,
        )

    def compose(self) -> torch.Tensor:
        """The dense kernel ``[N, C, kh, kw]`` that this layer is, A + S R; differentiable."""
        dense = self.partition.unpack(self.weight.flatten(0, 1))
        return dense + torch.einsum(
            "ng,gcij->ncij",
            self.coarse,
            self._partitions.restrict.unpack(self.restriction.flatten(0, 1)),
        )

    def extra_repr(self) -> str:
        """The arguments."""
        parts = [f"{self.in_channels}, {self.out_channels}", f"groups={self.groups}"]
        return self._describe(*parts)
