"""Layers, one file a method."""

from ._learned import GroupedLayer, name_layers
from .condense import CondenseConv2d
from .convert import convert, parameter_groups, structure
from .dgconv import DGConv2d, ResourceConstraint
from .flgc import FLGConv1d, FLGConv2d
from .fold import fold
from .interleaved import (
    IGCV2Conv2d,
    IGCV3Block,
    InterleavedConv2d,
    balanced,
    complementary,
    compose,
)
from .partitioned import PartitionedConv1d, PartitionedConv2d
from .quantized import QuantizedPartitionedConv2d, quantize
from .replace import replace
from .separable import DepthwiseSeparableConv2d, XceptionConv2d
from .shuffle import ShuffledConv2d
from .take_over import Linear, take_over
from .two_level import TwoLevelConv2d

__all__ = [
    "CondenseConv2d",
    "DGConv2d",
    "DepthwiseSeparableConv2d",
    "FLGConv1d",
    "FLGConv2d",
    "GroupedLayer",
    "IGCV2Conv2d",
    "IGCV3Block",
    "InterleavedConv2d",
    "Linear",
    "PartitionedConv1d",
    "PartitionedConv2d",
    "QuantizedPartitionedConv2d",
    "ResourceConstraint",
    "ShuffledConv2d",
    "TwoLevelConv2d",
    "XceptionConv2d",
    "balanced",
    "complementary",
    "compose",
    "convert",
    "fold",
    "name_layers",
    "parameter_groups",
    "quantize",
    "replace",
    "structure",
    "take_over",
]
