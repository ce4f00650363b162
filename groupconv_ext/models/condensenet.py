"""CondenseNet, its 1×1 convolutions learned by condensing (LGC), FLGC's or in fixed groups.

A stage is densely connected: a layer reads everything before it in the stage and adds as many
channels as the stage grows by; the growth doubles from stage to stage, and an average pool halves
the image between them::

    layer    normalisation, ReLU, 1×1 to 4 growth channels in G groups
             normalisation, ReLU, 3×3 to growth channels in G groups

    74       stages 4, 6, 8, 10, 8     growth 8, 16, 32, 64, 128     224², first stride 2
    CIFAR    three stages of (depth - 2) / 6 layers, growth 8, 16, 32     32²

The outputs of the 1×1 stand in interleaved groups, so that each group of the 3×3 reads from all.
The classifier condenses too, to half of its inputs.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from ..nn import CondenseConv2d
from .blocks import Flat, Network, NormConv
from .convolutions import Convolution, kind
from .registry import register

__all__ = ["condense", "condensenet", "condensenet_cifar"]

BOTTLENECK = 4


class DenseLayer(nn.Module):
    """``[x, new]``: what it read and what it adds."""

    def __init__(
        self, pointwise: Convolution, window: Convolution, in_channels: int, growth: int
    ) -> None:
        super().__init__()
        self.pointwise = NormConv(pointwise(in_channels, BOTTLENECK * growth, 1))
        self.window = NormConv(window(BOTTLENECK * growth, growth, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Apply the layer."""
        return torch.cat((x, self.window(self.pointwise(x))), 1)


def _network(
    stages: Sequence[int],
    growth: Sequence[int],
    stem_stride: int,
    convolution: str,
    groups: int,
    even_start: bool,
    classes: int,
) -> Network:
    pointwise = kind(convolution, groups, even_start=even_start)
    window = kind("gc", groups)
    channels = 2 * growth[0]
    layers: list[nn.Module] = [nn.Conv2d(3, channels, 3, stem_stride, 1, bias=False)]
    for stage, (repeats, grown) in enumerate(zip(stages, growth, strict=True)):
        if stage > 0:
            layers.append(nn.AvgPool2d(2))
        for _ in range(repeats):
            layers.append(DenseLayer(pointwise, window, channels, grown))
            channels += grown
    layers += [nn.BatchNorm2d(channels), nn.ReLU()]
    smallest = stem_stride << (len(stages) - 1)
    # A linear layer that forgets half of what it reads, when the other layers have condensed.
    classifier = CondenseConv2d(channels, classes, 1, condense_factor=2)
    return Network(nn.Sequential(*layers), Flat(classifier), smallest)


@register("condensenet74", "CondenseNet-74 for ImageNet: 1×1 that condense (LGC)")
@register(
    "sgc_condensenet74", "CondenseNet-74 with fixed groups and a shuffle", convolution="shuffle"
)
@register("flgc_condensenet74", "CondenseNet-74 with FLGC for every LGC", convolution="flgc")
def condensenet(
    *,
    groups: int = 4,
    convolution: str = "lgc",
    even_start: bool = False,
    stages: Sequence[int] = (4, 6, 8, 10, 8),
    growth: Sequence[int] = (8, 16, 32, 64, 128),
    classes: int = 1000,
) -> nn.Module:
    """CondenseNet for ImageNet (G=4 and G=8)."""
    return _network(stages, growth, 2, convolution, groups, even_start, classes)


@register("condensenet_cifar", "CondenseNet for CIFAR, depths 50, 74, 86, 98, 110, 122", 32)
def condensenet_cifar(
    *,
    depth: int = 86,
    groups: int = 4,
    convolution: str = "lgc",
    even_start: bool = False,
    classes: int = 10,
) -> nn.Module:
    """CondenseNet for CIFAR; ``depth`` may be any 6 n + 2."""
    if depth < 8 or depth % 6 != 2:
        raise ValueError(f"depth is {depth}; expected 6 n + 2 for n layers a stage, 8 at least")
    stages = ((depth - 2) // 6,) * 3
    return _network(stages, (8, 16, 32), 1, convolution, groups, even_start, classes)


def condense(network: nn.Module, progress: float = 1.0) -> nn.Module:
    """Do the condensing stages that are due in every layer of ``network``, in place."""
    for layer in network.modules():
        if isinstance(layer, CondenseConv2d):
            layer.condense(progress)
    return network
