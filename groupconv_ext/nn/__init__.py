"""Layers, one file a method."""

from .partitioned import PartitionedConv1d, PartitionedConv2d
from .shuffle import ShuffledConv2d

__all__ = ["PartitionedConv1d", "PartitionedConv2d", "ShuffledConv2d"]
