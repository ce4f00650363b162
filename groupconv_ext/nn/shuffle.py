"""ShuffleNet's pair of operations as one layer: a group convolution, then the channel shuffle.

The shuffle views the N outputs as a G × N/G matrix and transposes it, so output i of group g
becomes channel i · G + g. That is a Partition like any other: the shuffle costs nothing.
"""

from __future__ import annotations

import torch

from ..partition import Partition
from ..window import IntOrPair, Padding
from .partitioned import PartitionedConv2d

__all__ = ["ShuffledConv2d"]


class ShuffledConv2d(PartitionedConv2d):
    """``nn.Conv2d(groups=G)`` followed by a channel shuffle with G groups."""

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
        activation: str | None = None,
        backend: str = "auto",
    ) -> None:
        """Take ``nn.Conv2d``'s arguments in its order, then an activation and a backend."""
        super().__init__(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            dilation,
            bias=bias,
            padding_mode=padding_mode,
            device=device,
            dtype=dtype,
            partition=Partition.shuffled(in_channels, out_channels, groups),
            activation=activation,
            backend=backend,
        )
