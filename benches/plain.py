"""The same network in plain PyTorch: what people write where no library knows its convolutions.

`plain(network)` has for every layer of this library the obvious one: an `index_select` on each side
of a grouped convolution, and, while groups are being learned, a dense convolution of the weight
times its mask. `permuted=False` leaves the `index_select`s away: the same work without
permutations, another function.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import nn
from torch.nn import functional
from torch.nn.utils.fusion import fuse_conv_bn_eval

from groupconv_ext import Partition
from groupconv_ext.nn import (
    CondenseConv2d,
    DepthwiseSeparableConv2d,
    DGConv2d,
    FLGConv2d,
    IGCV2Conv2d,
    InterleavedConv2d,
    PartitionedConv2d,
    TwoLevelConv2d,
)
from groupconv_ext.nn.replace import substitute


def plain(network: nn.Module, permuted: bool = True) -> nn.Module:
    """A copy of `network` in plain PyTorch, with the same weights."""
    network = copy.deepcopy(network)
    found = {
        module: _layer(module, permuted).train(module.training)
        for module in network.modules()
        if type(module).__module__.startswith("groupconv_ext.nn") and hasattr(module, "kernel_size")
    }
    return substitute(network, found)


def fold_plain(network: nn.Module) -> nn.Module:
    """Fold normalisations into the convolutions before them, in place, also across a gather."""
    for parent in network.modules():
        names = list(parent._modules)
        for first, second in pairwise(names):
            conv, norm = parent._modules[first], parent._modules[second]
            if not isinstance(norm, nn.BatchNorm2d):
                continue
            if isinstance(conv, Permuted):
                conv.fold(norm)
            elif isinstance(conv, nn.Conv2d):
                parent._modules[first] = fuse_conv_bn_eval(conv, norm)
            else:
                continue
            parent._modules[second] = nn.Identity()
    return network


def _layer(layer: nn.Module, permuted: bool) -> nn.Module:
    match layer:
        case PartitionedConv2d():
            return _grouped(layer, layer.partition, layer.weight, permuted)
        case FLGConv2d():
            return MaskedFLGC(layer)
        case DGConv2d():
            return MaskedDGConv(layer)
        case CondenseConv2d():
            return MaskedCondense(layer)
        case TwoLevelConv2d():
            return TwoLevel(layer)
        case InterleavedConv2d():
            return _stages(layer, [layer.primary, layer.secondary], permuted)
        case IGCV2Conv2d():
            return _stages(layer, [layer.depthwise, *layer.stages], permuted)
        case DepthwiseSeparableConv2d():
            return _stages(layer, [layer.depthwise, layer.pointwise], permuted)
    raise TypeError(f"no plain form of a {type(layer).__name__}")


def _conv(source: nn.Module, weight: torch.Tensor, groups: int, window: bool = True) -> nn.Conv2d:
    """`nn.Conv2d` with a weight, and the window of a layer or none."""
    outs, ins, *kernel = weight.shape
    conv = nn.Conv2d(
        ins * groups,
        outs,
        kernel,
        source.stride if window else 1,
        source.padding if window else 0,
        groups=groups,
        bias=False,
    )
    with torch.no_grad():
        conv.weight.copy_(weight)
    return conv.to(weight.device)


class Permuted(nn.Module):
    """`index_select`, a grouped convolution, `index_select`; one that moves nothing is left out."""

    def __init__(self, conv: nn.Conv2d, partition: Partition, permuted: bool) -> None:
        super().__init__()
        self.conv = conv
        self.in_channels, self.out_channels = partition.in_channels, partition.out_channels
        for name, order in (
            ("before", partition.read_order("cpu")),
            ("after", partition.write_order("cpu")),
        ):
            moves = permuted and not torch.equal(order, torch.arange(len(order)))
            self.register_buffer(name, order.to(conv.weight.device) if moves else None)

    def fold(self, norm: nn.BatchNorm2d) -> None:
        """Fold the normalisation behind it into the convolution, whose outputs are in order."""
        ordered = copy.deepcopy(norm)
        if self.after is not None:
            inverse = self.after.argsort()
            for name, value in ordered.state_dict().items():
                if value.dim() > 0:
                    value.copy_(getattr(norm, name)[inverse])
        self.conv = fuse_conv_bn_eval(self.conv, ordered)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.before is not None:
            x = x.index_select(1, self.before)
        elif self.in_channels != self.conv.in_channels:
            x = x[:, : self.conv.in_channels]  # inputs that no group reads
        y = self.conv(x)
        return y if self.after is None else y.index_select(1, self.after)


def _grouped(
    layer: nn.Module,
    partition: Partition,
    weight: torch.Tensor,
    permuted: bool,
    window: bool = True,
) -> nn.Module:
    if not partition.is_even:
        raise ValueError(f"{partition} has no grouped convolution of PyTorch; use even groups")
    _, ins = partition.sizes[0]
    packed = weight.reshape(partition.out_channels, ins, *weight.shape[-2:])
    conv = _conv(layer, packed, partition.groups, window)
    if getattr(layer, "bias", None) is not None:
        outputs = [channel for group in partition.outputs for channel in group]
        conv.bias = nn.Parameter(layer.bias.detach()[outputs].clone())
    made = Permuted(conv, partition, permuted)
    activation = {None: None, "relu": nn.ReLU(), "relu6": nn.ReLU6()}[
        getattr(layer, "activation", None)
    ]
    return made if activation is None else nn.Sequential(made, activation)


class Stages(nn.Sequential):
    """Convolutions one after another, as one layer."""

    def __init__(self, layer: nn.Module, stages: Sequence[nn.Module]) -> None:
        super().__init__(*stages)
        self.in_channels, self.out_channels = layer.in_channels, layer.out_channels


def _stages(layer: nn.Module, weights: Sequence[torch.Tensor], permuted: bool) -> nn.Module:
    """The first carries the window."""
    partitions = layer.partitions.values()
    return Stages(
        layer,
        [
            _grouped(layer, partition, weight, permuted, window=stage == 0)
            for stage, (partition, weight) in enumerate(zip(partitions, weights, strict=True))
        ],
    )


class TwoLevel(nn.Module):
    """A grouped convolution, and what its groups tell each other (two_level, eq. 3.3 and 3.4)."""

    def __init__(self, layer: TwoLevelConv2d) -> None:
        super().__init__()
        self.in_channels, self.out_channels = layer.in_channels, layer.out_channels
        self.within = _conv(layer, layer.weight, layer.groups)
        self.restrict = _conv(layer, layer.restriction, layer.groups)
        self.coarse = _conv(layer, layer.coarse[:, :, None, None], 1, window=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.within(x) + self.coarse(self.restrict(x))


class _Masked(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.in_channels, self.out_channels = layer.in_channels, layer.out_channels
        self.stride, self.padding = layer.stride, layer.padding
        self.weight = nn.Parameter(layer.weight.detach().clone())
        bias = layer.bias
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone())

    def mask(self) -> torch.Tensor:
        raise NotImplementedError

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = self.weight * self.mask()[:, :, None, None]
        return functional.conv2d(x, weight, self.bias, self.stride, self.padding)


class MaskedFLGC(_Masked):
    """W ⊙ (T Sᵀ), hard forward and soft backward (flgc, eq. 14 to 18)."""

    def __init__(self, layer: FLGConv2d) -> None:
        super().__init__(layer)
        self.input_logits = nn.Parameter(layer.input_logits.detach().clone())
        self.output_logits = nn.Parameter(layer.output_logits.detach().clone())

    def mask(self) -> torch.Tensor:
        return _chosen(self.output_logits) @ _chosen(self.input_logits).t()


def _chosen(logits: torch.Tensor) -> torch.Tensor:
    soft = logits.softmax(1)
    hard = functional.one_hot(logits.argmax(1), logits.shape[1]).to(soft.dtype)
    return hard + soft - soft.detach()


class MaskedDGConv(_Masked):
    """W ⊙ (U₁ ⊗ … ⊗ U_K) (dgconv_groupnet, eq. 3 to 6)."""

    def __init__(self, layer: DGConv2d) -> None:
        super().__init__(layer)
        self.gates = nn.Parameter(layer.gates.detach().clone())
        self.radices = layer.radices

    def mask(self) -> torch.Tensor:
        bits = (self.gates >= 0).to(self.gates.dtype) + self.gates - self.gates.detach()
        product = torch.ones(1, 1, device=bits.device)
        for radix, bit in zip(self.radices, bits, strict=True):
            ones = torch.ones(radix, radix, device=bits.device)
            eye = torch.eye(radix, device=bits.device)
            product = torch.kron(product, bit * ones + (1 - bit) * eye)
        return product


class MaskedCondense(_Masked):
    """CondenseNet's layer while it trains."""

    def __init__(self, layer: CondenseConv2d) -> None:
        super().__init__(layer)
        mask = layer.kept.float().repeat(layer.out_channels // layer.groups, 1)
        self.register_buffer("kept", mask.to(layer.weight.device))

    def mask(self) -> torch.Tensor:
        return self.kept
