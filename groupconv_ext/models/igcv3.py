"""IGCV3: MobileNetV2's form of IGCV3 blocks, twice as many (igcv2_igcv3, table 10).

    224²  stride 2   3×3, 32
          stride     t   channels   repeats
    112²  1          1   16         1
    112²  2          6   24         4
    56²   2          6   32         6
    28²   2          6   64         8
    14²   1          6   96         6
    14²   2          6   160        6
    7²    1          6   320        1
    7²               1×1, 1280

Every block but a stage's first has a shortcut.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from ..nn import IGCV3Block
from .blocks import Network, conv_norm, first_strides
from .convolutions import standard
from .mobilenet import INVERTED_RESIDUALS, scaled
from .registry import register

__all__ = ["igcv3"]

REPEATS = (1, 4, 6, 8, 6, 6, 1)


@register("igcv3", "IGCV3-1.0 for ImageNet; width=0.7 is the paper's other")
def igcv3(
    *,
    width: float = 1.0,
    groups: int = 2,
    second_shuffle: bool = False,
    repeats: Sequence[int] = REPEATS,
    classes: int = 1000,
) -> nn.Module:
    """IGCV3.

    Args:
        width: Of all channels.
        groups: Of both 1×1 in a block.
        second_shuffle: Shuffle after a block as well, as the paper draws it and the authors'
            network does not.
        repeats: Blocks of the seven stages.
        classes: Of the classifier.
    """
    channels = scaled(32, width)
    layers: list[nn.Module] = [conv_norm(nn.Conv2d(3, channels, 3, 2, 1, bias=False), nn.ReLU6)]
    if len(repeats) != len(INVERTED_RESIDUALS):
        raise ValueError(f"repeats has {len(repeats)} entries; expected one for each of 7 stages")
    for (expansion, wanted, _, stage_stride), blocks in zip(
        INVERTED_RESIDUALS, repeats, strict=True
    ):
        wider = scaled(wanted, width)
        for block, stride in enumerate(first_strides(stage_stride, blocks)):
            layers.append(
                IGCV3Block(
                    channels,
                    wider,
                    stride,
                    expansion,
                    groups,
                    second_shuffle=second_shuffle,
                    skip=block > 0,
                )
            )
            channels = wider
    outputs = scaled(1280, width)
    layers.append(conv_norm(standard(channels, outputs, 1), nn.ReLU6))
    return Network(nn.Sequential(*layers), nn.Linear(outputs, classes), 32)
