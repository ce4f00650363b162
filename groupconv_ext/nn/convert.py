"""From a network that learned its groups to one that has them, and what to know on the way.

:func:`convert` puts the deployed form of every layer that learns or chooses its groups in its
place: a packed weight, no logits, gates or dropped connections, the same outputs.
:func:`parameter_groups` keeps weight decay away from the parameters that choose groups, and
:func:`structure` says which groups every layer has.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from ..partition import Partition
from ._learned import GroupedLayer, name_layers
from .replace import substitute

__all__ = ["convert", "named_partitions", "parameter_groups", "structure"]


def convert(model: nn.Module) -> nn.Module:
    """Replace every :class:`GroupedLayer` in ``model`` by its deployed form, in place.

    A layer whose structure is not frozen is deployed with the groups of now. One that stands in
    several places is replaced by one layer in all of them. What is deployed already stays as it
    is, so converting twice changes nothing.

    Returns:
        ``model``, or, where that is such a layer itself, its deployed form.

    Raises:
        ValueError: The logits or gates of a layer hold NaN or Inf; no layer is replaced.
    """
    _check_model(model)
    deployed: dict[nn.Module, nn.Module] = {}
    for name, layer in model.named_modules():
        if isinstance(layer, GroupedLayer):
            try:
                deployed[layer] = layer.deployed()
            except ValueError as error:
                where = name or type(layer).__name__
                raise ValueError(f"layer {where!r} cannot be converted: {error}") from error
    return substitute(model, deployed)


def parameter_groups(
    model: nn.Module, weight_decay: float, *, decay_structure: bool = False
) -> list[dict[str, Any]]:
    """Parameters for an optimizer: decayed, and not decayed.

    The second group has the parameters that choose groups (logits, gates), since decay would pull
    an undecided choice towards whatever zero stands for. The layers are told their names
    (:func:`name_layers`): whoever calls this begins to train, and may have to know which diverged.

    Args:
        model: The network.
        weight_decay: Of everything else.
        decay_structure: Decay them too; then there is one group.
    """
    _check_model(model)
    if not weight_decay >= 0:
        raise ValueError(f"weight_decay is {weight_decay}; expected a number that is not negative")
    name_layers(model)
    choosing = {
        id(parameter)
        for layer in model.modules()
        if isinstance(layer, GroupedLayer) and not decay_structure
        for parameter in layer.structure_parameters()
    }
    decayed = [p for p in model.parameters() if id(p) not in choosing]
    kept = [p for p in model.parameters() if id(p) in choosing]
    groups: list[dict[str, Any]] = [{"params": decayed, "weight_decay": weight_decay}]
    if kept:
        groups.append({"params": kept, "weight_decay": 0.0})
    return groups


def structure(model: nn.Module) -> dict[str, Partition]:
    """The partition of every layer of this library in ``model``, by the layer's name.

    A layer with several (IGC's, separable ones) has an entry for each, its name and the
    parameter's: ``"block.conv.primary"``.
    """
    _check_model(model)
    return {
        ".".join(filter(None, (name, part))): partition
        for name, layer in model.named_modules()
        for part, partition in named_partitions(layer)
    }


def named_partitions(layer: nn.Module) -> Iterator[tuple[str, Partition]]:
    """The partitions of one layer, its children's not among them; one alone has no name."""
    if isinstance(layer, GroupedLayer):
        yield "", layer.partition()
    elif isinstance(partition := getattr(layer, "partition", None), Partition):
        yield "", partition
    elif isinstance(partitions := getattr(layer, "partitions", None), dict):
        for part, partition in partitions.items():
            if isinstance(partition, Partition):
                yield part, partition


def _check_model(model: object) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is {model!r}; expected an nn.Module")
