"""Batch normalisation folded into the convolution before it, and the activation behind it fused.

    norm(conv(x)) = scale · (W * x) + (bias − mean) · scale + shift,   scale = γ / √(variance + ε)

for every output channel, so that a normalisation with running statistics is another weight and
another bias. What follows what is known where a network says so: inside ``nn.Sequential``, and in
this library's own blocks, which then also add their shortcut inside the last convolution.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from itertools import pairwise
from typing import Any, Protocol, runtime_checkable

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..partition import Partition
from .interleaved import IGCV2Conv2d, IGCV3Block, InterleavedConv2d
from .partitioned import PartitionedConv1d, PartitionedConv2d
from .separable import DepthwiseSeparableConv2d
from .two_level import TwoLevelConv2d

__all__ = ["fold"]

_CONVOLUTIONS = (
    nn.Conv1d,
    nn.Conv2d,
    PartitionedConv1d,
    PartitionedConv2d,
    TwoLevelConv2d,
    InterleavedConv2d,
    IGCV2Conv2d,
    DepthwiseSeparableConv2d,
)
_FUSED = {nn.ReLU: "relu", nn.ReLU6: "relu6", nn.SiLU: "silu", nn.Hardswish: "hardswish"}


@runtime_checkable
class Foldable(Protocol):
    """A block that can do better once its normalisations are gone: add in the convolution, say."""

    def after_fold(self) -> None:
        """Called by :func:`fold` when all normalisations have been folded; maybe more than once."""


def fold(model: nn.Module) -> nn.Module:
    """Fold every normalisation that follows a convolution into it, in place.

    Convert a network that learned its groups first (:func:`convert`): a layer that still learns is
    left as it is, and so is a module that stands in several places. The model has to be in
    evaluation mode, and cannot be trained as before afterwards.

    Raises:
        ValueError: A normalisation would use the statistics of the batch.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is {model!r}; expected an nn.Module")
    places = Counter(
        child for parent in set(model.modules()) for child in parent._modules.values() if child
    )
    pairs = [
        (parent, conv, follower, activation)
        for parent in model.modules()
        for conv, follower, activation in _followers(parent)
        if all(places[parent.get_submodule(name)] == 1 for name in (conv, follower))
    ]
    for parent, _, norm_name, _ in pairs:
        norm: Any = parent._modules[norm_name]
        if norm.training or norm.running_mean is None:
            raise ValueError(
                f"{norm} uses the statistics of each batch; put the model into eval() mode, with "
                "running statistics, before it is folded"
            )
    for pair in pairs:
        _fold(*pair)
    for module in list(model.modules()):
        if isinstance(module, Foldable):
            module.after_fold()
    return model


def _followers(parent: nn.Module) -> Iterator[tuple[str, str, str | None]]:
    """Names of a convolution, the normalisation behind it, and the activation behind that."""
    if isinstance(parent, IGCV3Block):
        chains = [["expand", "expand_norm"], ["depthwise", "depthwise_norm", "activation"]]
        chains += [["project", "project_norm"]]
    elif type(parent) is nn.Sequential:
        chains = [list(parent._modules)]
    else:
        return
    for chain in chains:
        modules: list[Any] = [parent._modules[name] for name in chain]
        for at, (conv, norm) in enumerate(pairwise(modules)):
            if isinstance(conv, _CONVOLUTIONS) and isinstance(norm, _BatchNorm):
                behind = modules[at + 2] if at + 2 < len(modules) else None
                name = chain[at + 2] if type(behind) in _FUSED else None
                if getattr(conv, "activation", None) is None:
                    yield chain[at], chain[at + 1], name


def _fold(parent: nn.Module, conv_name: str, norm_name: str, activation: str | None) -> None:
    conv: Any = parent._modules[conv_name]
    norm: Any = parent._modules[norm_name]
    with torch.no_grad():
        scale = torch.rsqrt(norm.running_var + norm.eps)
        scale = scale if norm.weight is None else scale * norm.weight
        shift = -norm.running_mean * scale
        shift = shift if norm.bias is None else shift + norm.bias
        _scale_outputs(conv, scale.to(_weight(conv).dtype))
        bias = shift if conv.bias is None else shift + conv.bias * scale
        conv.bias = nn.Parameter(bias.to(_weight(conv).dtype))
    _leave_out(parent, norm_name)
    if activation is not None and isinstance(conv, PartitionedConv1d | PartitionedConv2d):
        conv.activation = _FUSED[type(parent.get_submodule(activation))]
        _leave_out(parent, activation)


def _leave_out(parent: nn.Module, name: str) -> None:
    if isinstance(parent, nn.Sequential):
        del parent._modules[name]
    else:
        setattr(parent, name, nn.Identity())


def _weight(conv: Any) -> torch.Tensor:
    weight = next(conv.parameters())
    assert isinstance(weight, torch.Tensor)
    return weight


def _scale_outputs(conv: Any, scale: torch.Tensor) -> None:
    """Multiply every weight that writes output n by ``scale[n]``."""
    match conv:
        case PartitionedConv1d() | PartitionedConv2d():
            writes = conv.partition.pack(scale[:, None].expand(-1, conv.in_channels))
            conv.weight.mul_(writes.view(-1, *(1,) * (conv.weight.dim() - 1)))
        case TwoLevelConv2d():
            conv.weight.mul_(scale[:, None, None, None])
            conv.coarse.mul_(scale[:, None])
        case InterleavedConv2d():
            conv.secondary.mul_(_rows(conv.partitions["secondary"], scale))
        case IGCV2Conv2d():
            last = list(conv.partitions.values())[-1]
            conv.stages[-1].mul_(_rows(last, scale))
        case DepthwiseSeparableConv2d():
            conv.pointwise.mul_(_rows(conv.partitions["pointwise"], scale))
        case _:
            conv.weight.mul_(scale.view(-1, *(1,) * (conv.weight.dim() - 1)))


def _rows(partition: Partition, scale: torch.Tensor) -> torch.Tensor:
    """The scale of every row of a weight whose rows stand group after group."""
    outputs = [channel for group in partition.outputs for channel in group]
    return scale[torch.tensor(outputs, device=scale.device)][:, None, None, None]
