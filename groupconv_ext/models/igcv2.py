"""IGCV2-1.0, -0.5, -0.25: IGCV2 in MobileNetV1's place (igcv2_igcv3, table 8).

    224²  stride 2   3×3, 64
    112²             64 → 128
    112²  stride 2   128 → 256
    56²              256 → 256
    56²   stride 2   256 → 512
    28²              512 → 512
    28²   stride 2   512 → 1024
    14²              1024 → 1024, × 5
    14²   stride 2   1024 → 2048
    7²               2048 → 2048
    1²               2048 → 1000 without a 3×3, in 8 and 4 branches

A block is channelwise 3×3, ReLU · 1×1 in 8 branches · 1×1 in 8 branches, ReLU, each normalised; the
channels are permuted between the two and back after them, and the second one widens. The table
prints ten blocks at 14²; five, as MobileNetV1 has, give the numbers of table 9.
"""

from __future__ import annotations

from torch import nn

from ..nn import PartitionedConv2d
from ..partition import Partition
from .blocks import Flat, Network, conv_norm
from .convolutions import depthwise
from .mobilenet import SEPARABLE, scaled
from .registry import register

__all__ = ["igcv2"]

BRANCHES = 8


def _pointwise(
    in_channels: int, out_channels: int, first: int, second: int
) -> tuple[nn.Module, nn.Module]:
    """Two 1×1 in branches; each of the second reads from all of the first."""
    contiguous = Partition.contiguous(in_channels, in_channels, first)
    interleaved = Partition.interleaved(in_channels, out_channels, second)
    return (
        PartitionedConv2d(in_channels, in_channels, 1, partition=contiguous, bias=False),
        PartitionedConv2d(in_channels, out_channels, 1, partition=interleaved, bias=False),
    )


def _block(in_channels: int, out_channels: int, stride: int) -> nn.Module:
    first, second = _pointwise(in_channels, out_channels, BRANCHES, BRANCHES)
    return nn.Sequential(
        conv_norm(depthwise(in_channels, in_channels, 3, stride)),
        conv_norm(first, None),
        conv_norm(second),
    )


@register("igcv2", "IGCV2-1.0 for ImageNet; width=0.5 and 0.25 are the paper's others")
def igcv2(*, width: float = 1.0, classes: int = 1000) -> nn.Module:
    """IGCV2 of MobileNetV1's form, everything twice as wide."""
    channels = scaled(64, width)
    layers: list[nn.Module] = [conv_norm(nn.Conv2d(3, channels, 3, 2, 1, bias=False))]
    for wanted, stride in SEPARABLE:
        wider = scaled(2 * wanted, width)
        layers.append(_block(channels, wider, stride))
        channels = wider
    return Network(nn.Sequential(*layers), Flat(*_pointwise(channels, classes, 8, 4)), 32)
