"""What every layer with a structure of its own has in common: it can be asked, frozen, deployed.

A :class:`GroupedLayer` is a convolution that behaves, at any moment, as the partitioned one of its
current :meth:`~GroupedLayer.partition`. While it trains the partition may change with every step;
:meth:`~GroupedLayer.freeze_structure` ends that, and :meth:`~GroupedLayer.deployed` gives the same
function as a plain layer whose groups are given and whose weight is packed.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import nn

from ..partition import Partition

__all__ = ["GroupedLayer"]


class GroupedLayer(nn.Module, ABC):
    """A layer that learns or chooses its groups.

    A checkpoint holds whether the structure was frozen; one that does not say leaves it as it is.
    """

    _frozen: bool

    def __init__(self) -> None:
        super().__init__()
        self._frozen = False

    @abstractmethod
    def partition(self) -> Partition:
        """The groups that a forward pass would use now."""

    @abstractmethod
    def deployed(self) -> nn.Module:
        """A copy with given groups and a packed weight, and the same outputs.

        A ``PartitionedConv2d`` (``PartitionedConv1d``) where one convolution is enough. The layer
        itself stays as it is; its structure need not be frozen.
        """

    def structure_parameters(self) -> list[nn.Parameter]:
        """The parameters that choose the groups (logits, gates) and not what they compute."""
        return []

    @property
    def frozen(self) -> bool:
        """Whether the groups stay as they are."""
        return self._frozen

    def freeze_structure(self) -> None:
        """Keep the groups of now; the structure's parameters stop learning. For good."""
        self._frozen = True
        self._stop_structure()

    def _stop_structure(self) -> None:
        # A gradient left behind would make an optimizer move them once more.
        for parameter in self.structure_parameters():
            parameter.requires_grad_(False)
            parameter.grad = None

    # ---- state --------------------------------------------------------------------------------

    def get_extra_state(self) -> torch.Tensor:
        """Whether the structure is frozen: safe to load with ``weights_only``."""
        return torch.tensor(self._frozen)

    def set_extra_state(self, state: torch.Tensor) -> None:
        """Freeze, or go on learning, as the layer of the checkpoint did."""
        self._frozen = bool(state)
        if self._frozen:
            self._stop_structure()
        else:
            for parameter in self.structure_parameters():
                parameter.requires_grad_(True)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        state_dict.setdefault(prefix + "_extra_state", self.get_extra_state())
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
