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

__all__ = ["GroupedLayer", "name_layers"]


class GroupedLayer(nn.Module, ABC):
    """A layer that learns or chooses its groups.

    A checkpoint holds whether the structure was frozen and how many training steps it saw; one that
    does not say leaves them as they are.

    Attributes:
        path: Where the layer stands in its model, for errors; see :func:`name_layers`.
    """

    path: str
    _frozen: bool
    _steps: int  # training steps, where a layer counts them
    _counted: bool  # whether the last pass of training before a backward pass was counted

    def __init__(self) -> None:
        super().__init__()
        self.path = ""
        self._frozen = False
        self._steps = 0
        self._counted = False

    def _name(self) -> str:
        """Who is blamed in errors."""
        return f"layer {self.path!r}, {self._description()}" if self.path else self._description()

    def _description(self) -> str:
        return type(self).__name__

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

    @property
    def steps(self) -> int:
        """How many training steps the layer saw, where it counts them."""
        return self._steps

    def freeze_structure(self) -> None:
        """Keep the groups of now; the structure's parameters stop learning. For good."""
        self._frozen = True
        self._stop_structure()

    def _stop_structure(self) -> None:
        # A gradient left behind would make an optimizer move them once more.
        for parameter in self.structure_parameters():
            parameter.requires_grad_(False)
            parameter.grad = None

    def _begins_step(self) -> bool:
        """Whether this forward pass is that of a new training step.

        A checkpointed pass (``torch.utils.checkpoint``) runs once more inside the backward pass. It
        is a step of its own only where the first one had no gradient, as in the reentrant kind.
        """
        if not self.training:
            return False
        in_backward = torch._C._current_graph_task_id() != -1
        begins = torch.is_grad_enabled() and not (in_backward and self._counted)
        if not in_backward:
            self._counted = begins
        return begins

    # ---- state --------------------------------------------------------------------------------

    def get_extra_state(self) -> torch.Tensor:
        """Whether the structure is frozen, and the step: safe to load with ``weights_only``."""
        return torch.tensor([self._frozen, self._steps], dtype=torch.int64, device="cpu")

    def set_extra_state(self, state: torch.Tensor) -> None:
        """Freeze, or go on learning, as the layer of the checkpoint did."""
        if state.dtype != torch.int64 or state.dim() != 1 or len(state) < 2:
            raise ValueError(
                f"{self._name()}: the checkpoint's state is {state.dtype} of shape "
                f"{list(state.shape)}; expected torch.int64, whether the structure is frozen and "
                "the number of training steps"
            )
        frozen, self._steps = state[:2].tolist()
        self._resume(bool(frozen))

    def _resume(self, frozen: bool) -> None:
        was_frozen, self._frozen = self._frozen, frozen
        if frozen:
            self._stop_structure()
        elif was_frozen:  # and not where somebody else keeps the parameters from learning
            for parameter in self.structure_parameters():
                parameter.requires_grad_(True)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        state_dict.setdefault(prefix + "_extra_state", self.get_extra_state())
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


def name_layers(model: nn.Module) -> None:
    """Tell every :class:`GroupedLayer` of ``model`` its name, so that errors say which one it was.

    A module cannot know by itself where it stands. One in several places gets the first name.
    """
    for name, layer in model.named_modules():
        if isinstance(layer, GroupedLayer):
            layer.path = name
