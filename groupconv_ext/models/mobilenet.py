"""MobileNetV1 and V2, their 1×1 convolutions of any kind.

MobileNetV2 (the right half of igcv2_igcv3, table 10), t times wider inside a block::

    stride 2   3×3, 32
    blocks     t   channels   repeats   stride
               1   16         1         1
               6   24         2         2
               6   32         3         2
               6   64         4         2
               6   96         3         1
               6   160        3         2
               6   320        1         1
    1×1, 1280

A block is 1×1, ReLU6, channelwise 3×3, ReLU6, 1×1, with a shortcut where the shapes allow it.
For GC-2L (two_level, table 4) every 1×1 changes but, of that kind alone, the last, which is then a
group convolution; for FLGC (flgc, section 3.1) those with 96 filters or more.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from .blocks import Network, Residual, conv_norm, first_strides
from .convolutions import Convolution, depthwise, kind, standard
from .registry import register

__all__ = ["INVERTED_RESIDUALS", "mobilenet_v1", "mobilenet_v2", "scaled"]

# (t, channels, repeats, stride)
INVERTED_RESIDUALS = (
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)
CIFAR_STRIDES = (1, 1, 2, 1, 1, 2, 1)

# (channels, stride) of the separable convolutions of MobileNetV1
SEPARABLE = (
    (64, 1),
    (128, 2),
    (128, 1),
    (256, 2),
    (256, 1),
    (512, 2),
    *((512, 1),) * 5,
    (1024, 2),
    (1024, 1),
)


def scaled(channels: int, width: float, divisor: int = 8) -> int:
    """``channels · width`` rounded to a multiple of ``divisor``, by at most a tenth downwards."""
    if not width > 0:
        raise ValueError(f"width is {width}; expected a positive factor of all channels")
    rounded = max(divisor, int(channels * width + divisor / 2) // divisor * divisor)
    return rounded + divisor if rounded < 0.9 * channels * width else rounded


def _inverted_residual(
    convolution: Convolution, in_channels: int, out_channels: int, stride: int, expansion: int
) -> nn.Module:
    hidden = in_channels * expansion
    body = nn.Sequential(
        conv_norm(depthwise(hidden, hidden, 3, stride), nn.ReLU6),
        conv_norm(convolution(hidden, out_channels, 1), None),
    )
    if expansion != 1:
        body.insert(0, conv_norm(convolution(in_channels, hidden, 1), nn.ReLU6))
    same = stride == 1 and in_channels == out_channels
    return Residual(body, activation=None) if same else body


@register("mobilenet_v1", "MobileNetV1, its 1×1 convolutions of any kind")
def mobilenet_v1(
    *,
    width: float = 1.0,
    convolution: str = "sc",
    groups: int = 1,
    even_start: bool = False,
    classes: int = 1000,
) -> nn.Module:
    """MobileNetV1: thirteen times a channelwise 3×3 and a 1×1."""
    pointwise = kind(convolution, groups, even_start=even_start)
    channels = scaled(32, width)
    layers: list[nn.Module] = [conv_norm(nn.Conv2d(3, channels, 3, 2, 1, bias=False))]
    for wanted, stride in SEPARABLE:
        wider = scaled(wanted, width)
        layers.append(
            nn.Sequential(
                conv_norm(depthwise(channels, channels, 3, stride)),
                conv_norm(pointwise(channels, wider, 1)),
            )
        )
        channels = wider
    return Network(nn.Sequential(*layers), nn.Linear(channels, classes), 32)


@register("mobilenet_v2", "MobileNetV2, its 1×1 convolutions of any kind")
@register(
    "flgc_mobilenet_v2",
    "MobileNetV2-FLGC for CIFAR: the 1×1 convolutions of 96 filters or more as FLGC",
    32,
    convolution="flgc",
    groups=4,
    fewest_filters=96,
    stem_stride=1,
    strides=CIFAR_STRIDES,
    classes=10,
)
def mobilenet_v2(
    *,
    width: float = 1.0,
    convolution: str = "sc",
    groups: int = 1,
    even_start: bool = False,
    fewest_filters: int = 1,
    stem_stride: int = 2,
    strides: Sequence[int] | None = None,
    classes: int = 1000,
) -> nn.Module:
    """MobileNetV2.

    Args:
        width: Of all channels but the last, at least 1280.
        convolution: The kind of the 1×1 convolutions.
        groups: Of those.
        even_start: FLGC starts from even groups.
        fewest_filters: 1×1 convolutions with fewer outputs stay standard ones.
        stem_stride: Of the first convolution.
        strides: Of the seven stages; default: those of ImageNet.
        classes: Of the classifier.
    """
    if strides is None:
        strides = [stage[3] for stage in INVERTED_RESIDUALS]
    if len(strides) != len(INVERTED_RESIDUALS):
        raise ValueError(f"strides has {len(strides)} entries; expected one for each of 7 stages")
    chosen = kind(convolution, groups, even_start=even_start)
    last = kind("gc", groups) if convolution == "gc2l" else chosen

    def pointwise(
        in_channels: int, out_channels: int, kernel_size: int, stride: int = 1
    ) -> nn.Module:
        made = chosen if out_channels >= fewest_filters else standard
        return made(in_channels, out_channels, kernel_size, stride)

    channels = scaled(32, width)
    smallest = stem_stride
    layers: list[nn.Module] = [
        conv_norm(nn.Conv2d(3, channels, 3, stem_stride, 1, bias=False), nn.ReLU6)
    ]
    for (expansion, wanted, repeats, _), stage_stride in zip(
        INVERTED_RESIDUALS, strides, strict=True
    ):
        wider = scaled(wanted, width)
        smallest *= stage_stride
        for stride in first_strides(stage_stride, repeats):
            layers.append(_inverted_residual(pointwise, channels, wider, stride, expansion))
            channels = wider
    outputs = max(1280, scaled(1280, width))
    layers.append(conv_norm(last(channels, outputs, 1), nn.ReLU6))
    return Network(nn.Sequential(*layers), nn.Linear(outputs, classes), smallest)
