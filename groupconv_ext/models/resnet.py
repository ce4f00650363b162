"""ResNet, ResNeXt and what the papers make of them: FLGC's, standard groups', Groupable ResNeXt.

    stage    output   ResNet50             ResNeXt50 32×4d           Groupable ResNeXt50
    conv1    112²     7×7, 64, stride 2
    pool     56²      3×3 max, stride 2
    conv2    56²      1×1, 64              1×1, 128                  1×1, 128
                      3×3, 64              3×3, 128, 32 groups       3×3, 128, DGConv
                      1×1, 256  × 3        1×1, 256  × 3             1×1, 256  × 3
    conv3    28²      twice as wide, × 4
    conv4    14²      twice as wide, × 6 (of 101 layers: × 23)
    conv5    7²       twice as wide, × 3

A stage's stride is that of its first 3×3. ResNet50-FLGC (flgc, section 3.1) has for every 3×3 a
channelwise 3×3 and a 1×1, FLGC for every 1×1, and a first convolution of stride 4.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import repeat

from torch import nn

from ..nn import DGConv2d
from .blocks import Network, Residual, conv_norm, first_strides, shortcut
from .convolutions import Convolution, depthwise, kind, standard
from .registry import register

__all__ = ["flgc_resnet", "learned_groups", "resnet", "resnext"]

STAGES = {14: (1, 1, 1, 1), 26: (2, 2, 2, 2), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3)}

Window = Callable[[int, int], nn.Module]  # (channels, stride): what a bottleneck has for its 3×3


def _network(
    depth: int, width: int, pointwise: Convolution, window: Window, stem_stride: int, classes: int
) -> Network:
    """A ResNet of bottlenecks; ``width`` is that inside the first of them."""
    if depth not in STAGES:
        raise ValueError(f"depth is {depth}; expected one of {tuple(STAGES)}")
    layers = [
        conv_norm(nn.Conv2d(3, 64, 7, stem_stride, 3, bias=False)),
        nn.MaxPool2d(3, 2, 1),
    ]
    channels = 64
    for stage, blocks in enumerate(STAGES[depth]):
        inside, outside = width << stage, 256 << stage
        for stride in first_strides(1 if stage == 0 else 2, blocks):
            layers.append(
                Residual(
                    nn.Sequential(
                        conv_norm(pointwise(channels, inside, 1)),
                        window(inside, stride),
                        conv_norm(pointwise(inside, outside, 1), None),
                    ),
                    shortcut(pointwise, channels, outside, stride),
                )
            )
            channels = outside
    return Network(nn.Sequential(*layers), nn.Linear(channels, classes), 16 * stem_stride)


def _plain(convolution: Convolution) -> Window:
    return lambda channels, stride: conv_norm(convolution(channels, channels, 3, stride))


@register("resnet50", "ResNet of 50 layers")
@register("resnet101", "ResNet of 101 layers", depth=101)
def resnet(*, depth: int = 50, classes: int = 1000) -> nn.Module:
    """ResNet, the stride of a stage in its 3×3."""
    return _network(depth, 64, standard, _plain(standard), 2, classes)


@register("flgc_resnet50", "ResNet50-FLGC: 3×3 made depthwise and 1×1, every 1×1 FLGC", 256)
@register(
    "sgc_resnet50", "ResNet50-FLGC with groups of neighbouring channels", 256, convolution="gc"
)
def flgc_resnet(
    *,
    groups: int = 4,
    convolution: str = "flgc",
    stem_stride: int = 4,
    even_start: bool = False,
    depth: int = 50,
    classes: int = 10575,
) -> nn.Module:
    """ResNet50-FLGC and -SGC (flgc, table 1), on CASIA-WebFace's 10,575 identities."""
    pointwise = kind(convolution, groups, even_start=even_start)

    def separated(channels: int, stride: int) -> nn.Module:
        return nn.Sequential(
            conv_norm(depthwise(channels, channels, 3, stride)),
            conv_norm(pointwise(channels, channels, 1)),
        )

    return _network(depth, 64, pointwise, separated, stem_stride, classes)


@register("resnext50", "ResNeXt50 32×4d")
@register("resnext101", "ResNeXt101 32×4d", depth=101)
@register(
    "groupable_resnext50", "G-ResNeXt50: the grouped 3×3 of ResNeXt50 as DGConv", groups="dgconv"
)
@register(
    "groupable_resnext101",
    "G-ResNeXt101: the grouped 3×3 of ResNeXt101 as DGConv",
    groups="dgconv",
    depth=101,
)
def resnext(
    *,
    groups: int | str | Sequence[int] = 32,
    width: int = 128,
    gates: Callable[[int], Sequence[int]] | None = None,
    depth: int = 50,
    classes: int = 1000,
) -> nn.Module:
    """ResNeXt (dgconv_groupnet, table 1).

    Args:
        groups: Of every 3×3; one number for each of them makes ResNeXt* (table 6), and
            ``"dgconv"`` has them learned.
        width: Inside the first bottleneck: 128 for 32×4d and 2×64d, 256 for 64×4d.
        gates: For ``"dgconv"`` the gates to start from, by the number of channels.
        depth: 14, 26, 50 or 101.
        classes: Of the classifier.
    """
    blocks = sum(STAGES.get(depth, ()))
    convolutions: Iterator[Convolution]
    if groups == "dgconv":
        convolutions = repeat(kind("dgconv", gates=gates))
    elif isinstance(groups, str):
        raise ValueError(f"groups is {groups!r}; expected a number, a list or 'dgconv'")
    elif isinstance(groups, int):
        convolutions = repeat(kind("gc", groups))
    elif len(groups) != blocks:
        raise ValueError(f"groups has {len(groups)} entries; expected one for each of {blocks} 3×3")
    else:
        convolutions = iter([kind("gc", number) for number in groups])

    def window(channels: int, stride: int) -> nn.Module:
        return conv_norm(next(convolutions)(channels, channels, 3, stride))

    return _network(depth, width, standard, window, 2, classes)


def learned_groups(network: nn.Module) -> list[int]:
    """The numbers of groups that a Groupable ResNeXt has learned, for ``groups`` of a ResNeXt*."""
    found = [m.partition().groups for m in network.modules() if isinstance(m, DGConv2d)]
    if not found:
        raise ValueError("the network has no DGConv2d; expected a groupable ResNeXt")
    return found
