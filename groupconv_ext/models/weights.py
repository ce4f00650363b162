"""Weights that others have trained: loaded by structure, whatever their names are.

A state dict in one of the public layouts of a network holds the same convolutions, normalisations
and linear layers in the same order as the network here, under other names. So layers are paired in
order, and everything has to fit: kind, shape, and how many there are. Nothing is copied before all
of it does.

Three things differ in more than names, and are put right:

- A public network shuffles after a normalisation (or after the channelwise convolution) by an
  operation of its own; here the convolution before them writes shuffled channels. The parameters
  between the two change places.
- CondenseNet's layers have a ``_mask``: which inputs a group has kept.
- A linear layer may be a 1×1 convolution, and one without a bias has a bias of zero.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from ..nn import CondenseConv2d, PartitionedConv2d, ShuffledConv2d

__all__ = ["load_public"]

Tensors = Mapping[str, torch.Tensor]
# How many layers stand between a convolution and the shuffle.
SHUFFLES = {"norm": 1, "depthwise": 3}


def load_public(
    network: nn.Module, source: Mapping[str, Any] | str | os.PathLike[str], shuffled: str = "norm"
) -> nn.Module:
    """Load weights of a public layout into ``network``, in place.

    Args:
        network: ResNet, ResNeXt, MobileNetV2, WideResNet, ShuffleNet, IGCV3 or CondenseNet of this
            library, built with the options of the network that was trained; any other whose layers
            stand in the order of the public one.
        source: A state dict, a checkpoint that holds one, or the path of either.
        shuffled: Behind what the public network shuffles: the normalisation of the convolution
            (``"norm"``) or the normalisation of the channelwise convolution (``"depthwise"``).

    Raises:
        ValueError: Something does not fit; the first tensor that does not is named.
    """
    if shuffled not in SHUFFLES:
        raise ValueError(f"shuffled is {shuffled!r}; expected one of {tuple(SHUFFLES)}")
    ours = list(_own_layers(network))
    theirs = list(_source_layers(_state(source)))
    copies: list[tuple[torch.Tensor, torch.Tensor]] = []
    kept: list[tuple[CondenseConv2d, torch.Tensor]] = []
    order: torch.Tensor | None = None  # where a channel of the public network stands in ours,
    left = 0  # for so many layers more
    for mine, given in zip_longest(ours, theirs):
        if mine is None:
            raise ValueError(
                f"{given.first} has no counterpart: the network ends with {ours[-1].name!r}"
            )
        if given is None:
            raise ValueError(f"nothing is left for {mine.name!r}, a {mine.kind} of the network")
        if mine.kind != given.kind and {mine.kind, given.kind} != {"convolution", "linear"}:
            raise ValueError(
                f"{given.first} belongs to a {given.kind}; expected a {mine.kind} for {mine.name!r}"
            )
        copies += _paired(mine, given, order if left > 0 else None)
        left -= 1
        if isinstance(mine.module, CondenseConv2d) and "_mask" in given.tensors:
            kept.append((mine.module, _kept(mine.module, mine, given)))
        if isinstance(mine.module, ShuffledConv2d):
            outputs = [channel for group in mine.module.partition.outputs for channel in group]
            order, left = torch.tensor(outputs), SHUFFLES[shuffled]
    for condensing, rows in kept:
        state = torch.cat((torch.tensor([condensing.frozen]), rows.flatten()))
        condensing.set_extra_state(state)
    with torch.no_grad():
        for target, value in copies:
            target.copy_(value)
    return network


# ---- the two sides ------------------------------------------------------------------------------


@dataclass
class _Given:
    """A layer of the source: the tensors below one prefix."""

    prefix: str
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)

    @property
    def kind(self) -> str:
        if "running_mean" in self.tensors:
            return "normalisation"
        dimensions = self.tensors["weight"].dim()
        return {4: "convolution", 3: "convolution", 2: "linear"}.get(dimensions, "normalisation")

    @property
    def first(self) -> str:
        return f"tensor {f'{self.prefix}.weight'.lstrip('.')!r}"


def _state(source: Any) -> Tensors:
    """The state dict itself, out of a file and of what checkpoints wrap around it."""
    if isinstance(source, str | os.PathLike):
        source = torch.load(source, map_location="cpu", weights_only=True)
    while isinstance(source, Mapping):
        if source and all(isinstance(value, torch.Tensor) for value in source.values()):
            return source
        inner = [value for value in source.values() if isinstance(value, Mapping) and value]
        states = [value for value in inner if _holds_weights(value)]
        if len(states) != 1:
            break
        source = states[0]
    raise ValueError(
        f"source is a {type(source).__name__} with {_names(source)}; expected a state dict, or a "
        "checkpoint with exactly one"
    )


def _holds_weights(value: Mapping[Any, Any]) -> bool:
    return any(isinstance(name, str) and name.endswith("weight") for name in value)


def _names(source: Any) -> str:
    return f"the keys {list(source)[:5]}" if isinstance(source, Mapping) else "no keys"


def _source_layers(state: Tensors) -> Iterator[_Given]:
    layers: dict[str, _Given] = {}
    mask: torch.Tensor | None = None
    for key, tensor in state.items():
        prefix, _, name = key.rpartition(".")
        if name == "_mask":  # of the layer that holds the convolution, before it
            mask = tensor
        elif name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked"):
            layer = layers.setdefault(prefix, _Given(prefix))
            layer.tensors[name] = tensor
            if mask is not None and name == "weight" and tensor.dim() == 4:
                layer.tensors["_mask"] = mask
                mask = None
        elif name not in ("_count", "_stage"):
            raise ValueError(
                f"tensor {key!r} is none of a convolution, normalisation or linear one"
            )
    for layer in layers.values():
        if "weight" not in layer.tensors:
            raise ValueError(f"{layer.prefix!r} has {sorted(layer.tensors)} and no weight")
        yield layer


_LOADABLE = (nn.Conv2d, nn.Linear, _NormBase, PartitionedConv2d, CondenseConv2d)


@dataclass(frozen=True)
class _Own:
    """A layer of the network."""

    name: str
    module: Any

    @property
    def kind(self) -> str:
        if isinstance(self.module, _NormBase):
            return "normalisation"
        return "linear" if isinstance(self.module, nn.Linear) else "convolution"


def _own_layers(network: nn.Module) -> Iterator[_Own]:
    for name, module in network.named_modules():
        if isinstance(module, _LOADABLE):
            yield _Own(name, module)
        elif any(True for _ in module.parameters(recurse=False)):
            raise ValueError(
                f"{name!r} is a {type(module).__name__}; no public layout has one, so only "
                "networks of convolutions, normalisations and linear layers can be loaded"
            )


# ---- a pair of layers ---------------------------------------------------------------------------


def _paired(
    mine: _Own, given: _Given, order: torch.Tensor | None
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """What is copied, from where, all of the right shape and in the order of our channels."""
    own = dict(mine.module.named_parameters()) | dict(mine.module.named_buffers())
    for name, target in own.items():
        value = given.tensors.get(name)
        if value is None:
            if name == "bias" and mine.kind != "normalisation":
                yield target, torch.zeros_like(target)
                continue
            if name == "num_batches_tracked":
                continue
            raise ValueError(
                f"{given.prefix!r} has no {name!r}; expected one for {mine.name}.{name}"
            )
        if name == "weight":
            wanted = _wanted(mine.module)
            if value.dim() == 2 and len(wanted) == 4:
                value = value[:, :, None, None]
        else:
            wanted = tuple(target.shape)
        if tuple(value.shape) != wanted:
            raise ValueError(
                f"tensor '{given.prefix}.{name}' has shape {list(value.shape)}; expected "
                f"{list(wanted)} for '{mine.name}.{name}'"
            )
        # The order is that of a normalisation or of channels that stay by themselves.
        if order is not None and value.dim() > 0:
            value = torch.empty_like(value).index_copy_(0, order, value)
        yield target, value.reshape(target.shape)
    extra = set(given.tensors) - set(own) - {"_mask", "num_batches_tracked"}
    if extra:
        raise ValueError(
            f"tensor '{given.prefix}.{min(extra)}' has no counterpart in {mine.name!r}, a "
            f"{type(mine.module).__name__} without it"
        )


def _wanted(module: Any) -> tuple[int, ...]:
    """The shape of a weight as ``nn.Conv2d`` or ``nn.Linear`` has it."""
    if isinstance(module, PartitionedConv2d) and module.partition.is_even:
        return (module.out_channels, module.partition.sizes[0][1], *module.kernel_size)
    return tuple(module.weight.shape)


def _kept(layer: CondenseConv2d, mine: _Own, given: _Given) -> torch.Tensor:
    """Which inputs every group has kept, ``[groups, inputs]``."""
    mask = given.tensors["_mask"].flatten(1)
    if mask.shape != (layer.out_channels, layer.in_channels):
        raise ValueError(
            f"the mask of '{given.prefix}' has shape {list(given.tensors['_mask'].shape)}; "
            f"expected [{layer.out_channels}, {layer.in_channels}, 1, 1] for {mine.name!r}"
        )
    # Output n stands in group n mod G, in both.
    by_group = (mask != 0).view(-1, layer.groups, layer.in_channels)
    if not bool((by_group == by_group[0]).all()):
        raise ValueError(
            f"the mask of '{given.prefix}' differs within a group of {layer.groups}; expected the "
            "outputs n, n + G, n + 2 G, … to read the same inputs"
        )
    return by_group[0]
