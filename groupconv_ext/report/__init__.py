"""Pictures of partitions and of what was measured."""

from .partition_plot import plot_partition

__all__ = ["plot_partition"]
