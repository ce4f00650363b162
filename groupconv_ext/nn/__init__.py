"""Layers, one file a method."""

from ._learned import GroupedLayer
from .dgconv import DGConv2d, ResourceConstraint
from .flgc import FLGConv1d, FLGConv2d
from .partitioned import PartitionedConv1d, PartitionedConv2d
from .shuffle import ShuffledConv2d

__all__ = [
    "DGConv2d",
    "FLGConv1d",
    "FLGConv2d",
    "GroupedLayer",
    "PartitionedConv1d",
    "PartitionedConv2d",
    "ResourceConstraint",
    "ShuffledConv2d",
]
