"""The networks of IGCV1 and IGCV2 on CIFAR, and IGCV1's on ImageNet.

All are a first 3×3, three stages of B blocks at 32², 16² and 8² whose width doubles, the mean and
a classifier: 3 B + 2 layers. A block is one of these and normalisation and ReLU::

    RegConv-Wc       3×3, c                                             (igcv1, table 2)
    SumFusion        the sum of four 3×3, 8
    IGC-LxMy         L × (3×3, M) and M × (1×1, L)
    Xception(Cx)     x × (3×3, 1) and 1×1, x                            (igcv2_igcv3, table 1)
    IGCV1(Cx)        x/2 × (3×3, 2) and 2 × (1×1, x/2)
    IGCV2(Cx)        x × (3×3, 1) and twice x/K × (1×1, K), K of the stage
    IGCV2*(Cx)       x × (3×3, 1) and ⌈log₈ x⌉ times x/8 × (1×1, 8); the first 3×3 has 64 channels

With identity mappings two blocks stand beside a shortcut, added before the second ReLU. The paper's
IGC networks double M when they halve the image; one doubles L.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn
from torch.nn import functional

from .._checks import count
from ..nn import DepthwiseSeparableConv2d, IGCV2Conv2d, InterleavedConv2d
from .blocks import Network, Residual, conv_norm, first_strides
from .convolutions import Convolution, kind, standard
from .registry import register

__all__ = [
    "PaddedShortcut",
    "SummedConv2d",
    "igc_resnet18",
    "igcnet",
    "igcv1",
    "igcv2",
    "igcv2_star",
    "regconv",
    "resnet18",
    "sum_fusion",
    "xception",
]


# ---- the frame ----------------------------------------------------------------------------------


def _stage(
    convolution: Convolution,
    projection: Convolution | None,
    in_channels: int,
    out_channels: int,
    stage_stride: int,
    blocks: int,
) -> list[nn.Module]:
    """``blocks`` blocks, with a projection two and two beside a shortcut."""
    layers: list[nn.Module] = []
    channels = in_channels
    for block, stride in enumerate(first_strides(stage_stride, blocks)):
        inside_pair = projection is not None and block % 2 == 1
        activation = None if inside_pair else nn.ReLU
        layer = conv_norm(convolution(channels, out_channels, 3, stride), activation)
        if projection is not None and inside_pair:
            first = layers.pop()
            # The shortcut spans what the first block of the pair did to the shape.
            ins, step = (in_channels, stage_stride) if block == 1 else (out_channels, 1)
            beside = None
            if ins != out_channels or step != 1:
                beside = projection(ins, out_channels, 1, step)
            layers.append(Residual(nn.Sequential(first, layer), beside))
        else:
            layers.append(layer)
        channels = out_channels
    return layers


def _network(
    stem: nn.Module,
    stem_channels: int,
    widths: Sequence[int],
    convolutions: Sequence[Convolution],
    projections: Sequence[Convolution] | None,
    blocks: int,
    classes: int,
    smallest_input: int = 4,
) -> Network:
    if projections is not None and blocks % 2:
        raise ValueError(
            f"a stage has {blocks} blocks; expected an even number, two beside each shortcut"
        )
    layers = [stem]
    channels = stem_channels
    for stage, (width, convolution) in enumerate(zip(widths, convolutions, strict=True)):
        projection = None if projections is None else projections[stage]
        stride = 1 if stage == 0 else 2
        layers += _stage(convolution, projection, channels, width, stride, blocks)
        channels = width
    return Network(nn.Sequential(*layers), nn.Linear(channels, classes), smallest_input)


def _blocks(depth: int) -> int:
    if depth < 5 or depth % 3 != 2:
        raise ValueError(f"depth is {depth}; expected 3 B + 2 for B blocks a stage, 5 at least")
    return (depth - 2) // 3


def _stem(channels: int) -> nn.Module:
    return conv_norm(nn.Conv2d(3, channels, 3, padding=1, bias=False))


# ---- the blocks ---------------------------------------------------------------------------------


class SummedConv2d(nn.Module):
    """Summation fusion (igcv1, eq. 21): ``branches`` convolutions of one input, added."""

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int, stride: int, branches: int
    ) -> None:
        super().__init__()
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.branches = nn.Conv2d(
            in_channels, branches * out_channels, kernel_size, stride, kernel_size // 2, bias=False
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Convolve and add."""
        y: torch.Tensor = self.branches(x).unflatten(1, (-1, self.out_channels)).sum(1)
        return y


def _summed(in_channels: int, out_channels: int, kernel_size: int, stride: int = 1) -> nn.Module:
    return SummedConv2d(in_channels, out_channels, kernel_size, stride, branches=4)


def _of(layer: Callable[..., nn.Module], **options: object) -> Convolution:
    """A layer with options of its own as a kind of convolution."""

    def make(in_channels: int, out_channels: int, kernel_size: int, stride: int = 1) -> nn.Module:
        arguments = (in_channels, out_channels, kernel_size, stride, kernel_size // 2)
        return layer(*arguments, bias=False, **options)

    return make


def _interleaved(primary_groups: int) -> Convolution:
    return _of(InterleavedConv2d, primary_groups=primary_groups)


def _structured(branch_channels: int | Sequence[int], stages: int | None = None) -> Convolution:
    return _of(IGCV2Conv2d, branch_channels=branch_channels, stages=stages)


def _projection(groups: int) -> Convolution:
    """What stands beside two blocks that change the shape: 1×1 in groups, normalised."""

    def make(in_channels: int, out_channels: int, kernel_size: int, stride: int = 1) -> nn.Module:
        convolution = kind("gc", groups)(in_channels, out_channels, kernel_size, stride)
        return conv_norm(convolution, None)

    return make


class PaddedShortcut(nn.Module):
    """ResNet's shortcut without parameters: every s-th pixel, and zeros for further channels."""

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int, stride: int = 1
    ) -> None:
        super().__init__()
        del kernel_size  # there is nothing to convolve
        self.added = out_channels - in_channels
        self.stride = stride

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Subsample and widen."""
        x = x[:, :, :: self.stride, :: self.stride]
        return functional.pad(x, (0, 0, 0, 0, 0, self.added))


# ---- IGCV1 --------------------------------------------------------------------------------------


@register("igcnet", "IGC-LxMy for CIFAR, plain or with identity mappings", 32)
@register("igc_l4m8", "IGC-L4M8, 20 layers", 32, primary=4, secondary=8)
@register("igc_l24m2", "IGC-L24M2, 20 layers", 32, primary=24, secondary=2)
@register("igc_l16m32", "IGC-L16M32", 32, primary=16, secondary=32, classes=100)
@register("igc_l450m2", "IGC-L450M2", 32, primary=450, secondary=2, classes=100)
@register("igc_l32m26", "IGC-L32M26", 32, primary=32, secondary=26, classes=100)
def igcnet(
    *,
    primary: int = 24,
    secondary: int = 2,
    depth: int = 20,
    identity: bool = False,
    classes: int = 10,
) -> nn.Module:
    """IGC-LxMy, of width L·M, 2 L·M, 4 L·M (igcv1, table 2 and 7).

    Args:
        primary: L, in all stages.
        secondary: M, of the first stage.
        depth: 3 B + 2.
        identity: Two blocks beside a shortcut; one that projects is 1×1 in L groups.
        classes: Of the classifier.
    """
    width = count("primary", primary) * count("secondary", secondary)
    convolutions = [_interleaved(primary)] * 3
    projections = [_projection(primary)] * 3 if identity else None
    widths = (width, 2 * width, 4 * width)
    return _network(_stem(width), width, widths, convolutions, projections, _blocks(depth), classes)


@register("igc_resnet18", "IGC-LxMy + identity for ImageNet, of 18 layers")
@register("igc_resnet18_l4m32", "IGC-L4M32 + identity for ImageNet", primary=4, secondary=32)
@register("igc_resnet18_l16m16", "IGC-L16M16 + identity for ImageNet", primary=16, secondary=16)
@register(
    "igc_resnet18_l100m2",
    "IGC-L100M2 + identity for ImageNet; L doubles",
    primary=100,
    secondary=2,
    doubles="primary",
    stem_channels=100,
)
def igc_resnet18(
    *,
    primary: int = 4,
    secondary: int = 32,
    doubles: str = "secondary",
    stem_channels: int | None = None,
    classes: int = 1000,
) -> nn.Module:
    """IGC networks in ResNet-18's place (igcv1, table 6).

    Args:
        primary: L of the first stage.
        secondary: M of the first stage.
        doubles: Which of the two doubles from stage to stage.
        stem_channels: Of the 7×7; default: those of the first stage.
        classes: Of the classifier.
    """
    if doubles not in ("primary", "secondary"):
        raise ValueError(f"doubles is {doubles!r}; expected 'primary' or 'secondary'")
    width = count("primary", primary) * count("secondary", secondary)
    partitions = [primary << stage if doubles == "primary" else primary for stage in range(4)]
    convolutions = [_interleaved(groups) for groups in partitions]
    projections = [_projection(groups) for groups in partitions]
    return _imagenet(stem_channels or width, width, convolutions, projections, classes)


@register("resnet18", "ResNet of 18 layers, of standard convolutions")
def resnet18(*, width: int = 64, classes: int = 1000) -> nn.Module:
    """ResNet-18 of any width, which IGC's ImageNet networks take the form of."""
    count("width", width)
    return _imagenet(width, width, [standard] * 4, [_projection(1)] * 4, classes)


def _imagenet(
    stem_channels: int,
    width: int,
    convolutions: Sequence[Convolution],
    projections: Sequence[Convolution],
    classes: int,
) -> Network:
    stem = nn.Sequential(
        conv_norm(nn.Conv2d(3, stem_channels, 7, 2, 3, bias=False)), nn.MaxPool2d(3, 2, 1)
    )
    widths = [width << stage for stage in range(4)]
    return _network(stem, stem_channels, widths, convolutions, projections, 4, classes, 32)


@register("regconv", "RegConv-Wc: standard convolutions in the place of IGC blocks", 32)
def regconv(
    *, width: int = 16, depth: int = 20, identity: bool = False, classes: int = 10
) -> nn.Module:
    """RegConv-Wc (igcv1, table 2)."""
    count("width", width)
    projections = [_projection(1)] * 3 if identity else None
    widths = (width, 2 * width, 4 * width)
    return _network(
        _stem(width), width, widths, [standard] * 3, projections, _blocks(depth), classes
    )


@register("sum_fusion", "SumFusion: sums of four convolutions in the place of IGC blocks", 32)
def sum_fusion(*, width: int = 8, depth: int = 20, classes: int = 10) -> nn.Module:
    """SumFusion (igcv1, table 2)."""
    count("width", width)
    widths = (width, 2 * width, 4 * width)
    return _network(_stem(width), width, widths, [_summed] * 3, None, _blocks(depth), classes)


# ---- IGCV2 --------------------------------------------------------------------------------------


@register("xception_cifar", "Xception(Cx): channelwise 3×3 and 1×1", 32)
def xception(*, width: int = 58, depth: int = 20, classes: int = 100) -> nn.Module:
    """Xception(Cx); its projections are dense."""
    convolutions = [_of(DepthwiseSeparableConv2d)] * 3
    return _with_identities(width, width, convolutions, [_projection(1)] * 3, depth, classes)


@register("igcv1_cifar", "IGCV1(Cx): IGC with M = 2 and identity mappings", 32)
def igcv1(*, width: int = 96, depth: int = 20, classes: int = 100) -> nn.Module:
    """IGCV1(Cx): L = x/2 in all stages.

    The paper's table 1 draws 2 channels a group in all stages, so that L doubles; all its counts
    are those of IGC-L(x/2)M2, where M does.
    """
    return igcnet(primary=_half(width), secondary=2, depth=depth, identity=True, classes=classes)


@register("igcv2_cifar", "IGCV2(Cx): channelwise 3×3 and two 1×1 in branches of K channels", 32)
def igcv2(
    *, width: int = 64, branches: Sequence[int] = (8, 16, 32), depth: int = 20, classes: int = 100
) -> nn.Module:
    """IGCV2(Cx); ``branches`` are K of the three stages, projections have x/2 groups."""
    if len(branches) != 3:
        raise ValueError(f"branches has {len(branches)} entries; expected K for each of 3 stages")
    convolutions = [_structured(size, 2) for size in branches]
    projections = [_projection(_half(width))] * 3
    return _with_identities(width, width, convolutions, projections, depth, classes)


@register("igcv2_star", "IGCV2*(Cx): channelwise 3×3 and ⌈log₈ x⌉ 1×1 in branches of 8", 32)
def igcv2_star(*, width: int = 416, depth: int = 20, classes: int = 100) -> nn.Module:
    """IGCV2*(Cx); its shortcuts have no parameters."""
    convolutions = []
    for stage in range(3):
        pointwise = 1
        while 8**pointwise < count("width", width) << stage:
            pointwise += 1
        convolutions.append(_structured(8, pointwise))
    return _with_identities(64, width, convolutions, [PaddedShortcut] * 3, depth, classes)


def _with_identities(
    stem_channels: int,
    width: int,
    convolutions: Sequence[Convolution],
    projections: Sequence[Convolution],
    depth: int,
    classes: int,
) -> Network:
    """IGCV2's frame: a shortcut beside every two blocks."""
    count("width", width)
    widths = (width, 2 * width, 4 * width)
    stem = _stem(stem_channels)
    return _network(stem, stem_channels, widths, convolutions, projections, _blocks(depth), classes)


def _half(width: int) -> int:
    if count("width", width) % 2:
        raise ValueError(f"width is {width}; expected an even number, two channels a group")
    return width // 2
