"""WideResNet with every kind of convolution (two_level, section 4.1).

    stage    output (CIFAR)   WideResNet-28-w          output (ImageNet)  WideResNet-34-w
    stem     32²              3×3, 16                  56²                7×7, 64, stride 2; pool
    conv2    32²              [3×3, 16 w] × 2, × 4     56²                [3×3, 64 w] × 2, × 3
    conv3    16²              [3×3, 32 w] × 2, × 4     28²                [3×3, 128 w] × 2, × 4
    conv4    8²               [3×3, 64 w] × 2, × 4     14²                [3×3, 256 w] × 2, × 6
    conv5                                              7²                 [3×3, 512 w] × 2, × 3

Normalisation and ReLU come before a convolution. Where a block changes the number of channels it
has a 1×1 shortcut behind its first ReLU. Every convolution but the stem is of the chosen kind.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from .blocks import Network, NormConv, conv_norm, first_strides
from .convolutions import Convolution, kind
from .registry import register

__all__ = ["wide_resnet28", "wide_resnet34"]


class PreActivationBlock(nn.Module):
    """Twice normalisation, ReLU and a 3×3, beside a shortcut."""

    def __init__(
        self, convolution: Convolution, in_channels: int, out_channels: int, stride: int
    ) -> None:
        super().__init__()
        self.first = NormConv(convolution(in_channels, out_channels, 3, stride))
        self.second = NormConv(convolution(out_channels, out_channels, 3))
        projects = stride != 1 or in_channels != out_channels
        self.shortcut = convolution(in_channels, out_channels, 1, stride) if projects else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Apply the block."""
        y: torch.Tensor
        if self.shortcut is None:
            y = self.second(self.first(x))
            return y + x
        activated = self.first.activate(x)
        y = self.second(self.first.conv(activated))
        return torch.add(y, self.shortcut(activated))


def _network(
    stem: Sequence[nn.Module],
    stem_channels: int,
    stages: Sequence[tuple[int, int, int]],
    convolution: Convolution,
    classes: int,
    smallest_input: int,
) -> Network:
    """Stages of ``(blocks, channels, stride)``."""
    layers = [*stem]
    channels = stem_channels
    for blocks, width, stage_stride in stages:
        for stride in first_strides(stage_stride, blocks):
            layers.append(PreActivationBlock(convolution, channels, width, stride))
            channels = width
    layers += [nn.BatchNorm2d(channels), nn.ReLU()]
    return Network(nn.Sequential(*layers), nn.Linear(channels, classes), smallest_input)


@register("wide_resnet28", "WideResNet-28-w for CIFAR, every convolution of one kind", 32)
def wide_resnet28(
    *,
    width: int = 10,
    convolution: str = "sc",
    groups: int = 1,
    even_start: bool = False,
    depth: int = 28,
    classes: int = 10,
) -> nn.Module:
    """WideResNet-28-w; ``depth`` may be any 6 n + 4."""
    if depth < 10 or depth % 6 != 4:
        raise ValueError(f"depth is {depth}; expected 6 n + 4 for n blocks a stage, 10 at least")
    made = kind(convolution, groups, even_start=even_start)
    blocks = (depth - 4) // 6
    stem = [nn.Conv2d(3, 16, 3, padding=1, bias=False)]
    stages = [(blocks, 16 * width, 1), (blocks, 32 * width, 2), (blocks, 64 * width, 2)]
    return _network(stem, 16, stages, made, classes, 4)


@register("wide_resnet34", "WideResNet-34-w for ImageNet, every convolution of one kind")
def wide_resnet34(
    *,
    width: int = 2,
    convolution: str = "sc",
    groups: int = 1,
    even_start: bool = False,
    classes: int = 1000,
) -> nn.Module:
    """WideResNet-34-w."""
    made = kind(convolution, groups, even_start=even_start)
    stem = [conv_norm(nn.Conv2d(3, 64, 7, 2, 3, bias=False)), nn.MaxPool2d(3, 2, 1)]
    stages = [
        (blocks, (64 * width) << stage, 1 if stage == 0 else 2)
        for stage, blocks in enumerate((3, 4, 6, 3))
    ]
    return _network(stem, 64, stages, made, classes, 32)
