"""Pictures of partitions, of what a network learned, and of what was measured."""

from .partition_plot import plot_partition
from .structure_plot import plot_structure

__all__ = ["plot_partition", "plot_structure"]
