"""The kinds of convolution that a network can be built with, by name.

A network's file says where a convolution stands; a kind says what it is::

    convolution = kind("gc2l", groups=8)
    layer = convolution(64, 128, 3, stride=2)

Every layer is padded to keep the image (k // 2) and has no bias: a normalisation follows it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Protocol

from torch import nn

from .._checks import count
from ..nn import (
    CondenseConv2d,
    DGConv2d,
    FLGConv2d,
    PartitionedConv2d,
    ShuffledConv2d,
    TwoLevelConv2d,
)
from ..partition import Partition
from .names import check_known

__all__ = ["KINDS", "Convolution", "depthwise", "kind", "standard"]


class Convolution(Protocol):
    """Makes a layer."""

    def __call__(
        self, in_channels: int, out_channels: int, kernel_size: int, stride: int = 1
    ) -> nn.Module:
        """Make the layer, without a bias, padded by ``kernel_size // 2``."""


def standard(in_channels: int, out_channels: int, kernel_size: int, stride: int = 1) -> nn.Module:
    """SC: every output reads every input."""
    return nn.Conv2d(in_channels, out_channels, kernel_size, stride, kernel_size // 2, bias=False)


def depthwise(in_channels: int, out_channels: int, kernel_size: int, stride: int = 1) -> nn.Module:
    """Every channel by itself."""
    return _layer(PartitionedConv2d, in_channels, in_channels, out_channels, kernel_size, stride)


def _layer(
    layer: Callable[..., nn.Module],
    groups: int,
    in_channels: int,
    out_channels: int,
    kernel_size: int,
    stride: int = 1,
) -> nn.Module:
    """What most kinds are: a layer with a number of groups."""
    return layer(
        in_channels,
        out_channels,
        kernel_size,
        stride,
        kernel_size // 2,
        groups=groups,
        bias=False,
    )


def _learned(
    groups: int,
    even_start: bool,
    in_channels: int,
    out_channels: int,
    kernel_size: int,
    stride: int = 1,
) -> nn.Module:
    """FLGC; its groups start at random, or as even as the channels allow."""
    partition = None
    if even_start:
        in_labels, out_labels = (
            [c % groups for c in range(channels)] for channels in (in_channels, out_channels)
        )
        partition = Partition.from_labels(in_labels, out_labels, groups)
    return FLGConv2d(
        in_channels,
        out_channels,
        kernel_size,
        stride,
        kernel_size // 2,
        groups=groups,
        bias=False,
        partition=partition,
    )


def _dynamic(
    gates: Callable[[int], Sequence[int]] | None,
    in_channels: int,
    out_channels: int,
    kernel_size: int,
    stride: int = 1,
) -> nn.Module:
    """DGConv; which gates are open at first is given for every width, or random."""
    chosen = None if gates is None else gates(in_channels)
    return DGConv2d(
        in_channels,
        out_channels,
        kernel_size,
        stride,
        kernel_size // 2,
        bias=False,
        gates=chosen,
    )


KINDS: dict[str, str] = {
    "sc": "standard convolution",
    "gc": "group convolution, groups of neighbouring channels",
    "shuffle": "group convolution and ShuffleNet's channel shuffle",
    "gc2l": "two-level group convolution (GC-2L)",
    "flgc": "fully learnable group convolution",
    "lgc": "CondenseNet's learned group convolution",
    "dgconv": "dynamic grouping convolution, learns the number of groups as well",
}


def kind(
    name: str,
    groups: int = 1,
    *,
    even_start: bool = False,
    gates: Callable[[int], Sequence[int]] | None = None,
) -> Convolution:
    """The kind of convolution called ``name``.

    Args:
        name: One of ``KINDS``.
        groups: Of every layer; ``"sc"`` and ``"dgconv"`` have none.
        even_start: ``"flgc"`` starts with groups as even as can be, and not at random.
        gates: For ``"dgconv"`` the gates to start from, by the number of channels.
    """
    check_known("convolution", name, KINDS)
    count("groups", groups)
    if name in ("sc", "dgconv") and groups != 1:
        raise ValueError(f"groups is {groups}; {KINDS[name]} takes no number of groups")
    match name:
        case "sc":
            return standard
        case "dgconv":
            return partial(_dynamic, gates)
        case "flgc":
            return partial(_learned, groups, even_start)
    layers: dict[str, Callable[..., nn.Module]] = {
        "gc": PartitionedConv2d,
        "shuffle": ShuffledConv2d,
        "gc2l": TwoLevelConv2d,
        "lgc": CondenseConv2d,
    }
    return partial(_layer, layers[name], groups)
