"""ShuffleNet with 1, 2, 3, 4 and 8 groups.

    224²  stride 2    3×3, 24; 3×3 max pool, stride 2
                      units      g=1   g=2   g=3   g=4   g=8
    28²               1 + 3      144   200   240   272   384     channels
    14²               1 + 7      288   400   480   544   768
    7²                1 + 3      576   800   960   1088  1536

A unit is 1×1 in g groups to a quarter of the channels, ReLU, shuffle · channelwise 3×3 · 1×1 in g
groups. The first of a stage has stride 2 and is joined to an average pool of its input, the others
are added to it. The first 1×1 of all reads 24 channels and has no groups.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from ..nn import PartitionedConv2d, ShuffledConv2d
from .blocks import Network, Residual, conv_norm, last_convolution
from .convolutions import depthwise
from .registry import register

__all__ = ["shufflenet"]

WIDTHS = {1: 144, 2: 200, 3: 240, 4: 272, 8: 384}


class _Joined(nn.Module):
    """``relu([pool(x), body(x)])``: half the image, more channels."""

    def __init__(self, in_channels: int, body: nn.Module) -> None:
        super().__init__()
        self.in_channels = in_channels
        self.body = body
        self.pool: nn.Module = nn.AvgPool2d(3, 2, 1)
        self.activation: nn.Module = nn.ReLU(inplace=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Apply the unit."""
        y: torch.Tensor = self.activation(torch.cat((self.pool(x), self.body(x)), 1))
        return y

    def after_fold(self) -> None:
        """Apply the ReLU inside what is joined; the pool is a convolution by ninths."""
        _, last = last_convolution(self.body)
        if last is None or last.activation is not None or isinstance(self.pool, PartitionedConv2d):
            return
        channels = self.in_channels
        pool = PartitionedConv2d(
            channels,
            channels,
            3,
            2,
            1,
            groups=channels,
            bias=False,
            device=last.weight.device,
            dtype=last.weight.dtype,
            activation="relu",
        )
        nn.init.constant_(pool.weight, 1 / 9)
        last.activation = "relu"
        self.pool, self.activation = pool.train(self.training), nn.Identity()


def _body(
    in_channels: int, inside: int, out_channels: int, stride: int, first: int, groups: int
) -> nn.Module:
    # The shuffle is there for the second 1×1, also where the first has no groups of its own.
    reduce = ShuffledConv2d(in_channels, inside, 1, groups=first, bias=False)
    expand = PartitionedConv2d(inside, out_channels, 1, groups=groups, bias=False)
    return nn.Sequential(
        conv_norm(reduce),
        conv_norm(depthwise(inside, inside, 3, stride), None),
        conv_norm(expand, None),
    )


@register("shufflenet", "ShuffleNet with groups=1, 2, 3, 4 or 8")
def shufflenet(
    *,
    groups: int = 3,
    width: float = 1.0,
    repeats: Sequence[int] = (3, 7, 3),
    classes: int = 1000,
) -> nn.Module:
    """ShuffleNet.

    Args:
        groups: Of every 1×1 but the first.
        width: Multiplies the channels of the units.
        repeats: How many units follow the first of each stage.
        classes: Of the classifier.
    """
    if groups not in WIDTHS:
        raise ValueError(f"groups is {groups}; expected one of {tuple(WIDTHS)}")
    channels = 24
    layers = [
        conv_norm(nn.Conv2d(3, channels, 3, 2, 1, bias=False)),
        nn.MaxPool2d(3, 2, 1),
    ]
    for stage, added in enumerate(repeats):
        wider = int(WIDTHS[groups] * width) << stage
        first = 1 if stage == 0 else groups
        inside = wider // 4
        body = _body(channels, inside, wider - channels, 2, first, groups)
        layers.append(_Joined(channels, body))
        layers += [Residual(_body(wider, inside, wider, 1, groups, groups)) for _ in range(added)]
        channels = wider
    return Network(nn.Sequential(*layers), nn.Linear(channels, classes), 32)
