"""Pointwise convolutions one after another, in one pass over the pixels.

    y = activation( W_S … W_2 W_1 x + bias )

Each W_s is a 1×1 convolution in the groups of a partition of its own, the product form of IGCV2
(igcv2_igcv3, eq. 4-5). The native operation takes a tile of pixels through all stages while it
lies in cache: memory sees x and y. So does the Triton kernel, through a strip of memory that stays
in the L2 cache. Nothing between them is kept for the backward pass either; it is computed again,
natively tile by tile, by Triton stage by stage.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch.autograd import forward_ad
from torch.utils._pytree import register_constant

from . import _ops
from ._layout import is_channels_last
from .autograd import (
    ACTIVATIONS,
    FUSED_IN_TRAINING,
    apply,
    before_activation,
    convolve,
    input_grad,
    wants_grad,
    weight_grad,
)
from .backends import Backend, Call, choose
from .backends import triton as by_triton
from .backends.triton import TRITON, TRITON_OPERATIONS
from .functional import conv2d
from .operations import NATIVE_OPERATIONS, Operations
from .partition import Partition
from .reference import activations
from .window import POINTWISE

__all__ = ["chain"]

_MOST_STAGES_ON_CUDA = 8
_MOST_CHANNELS_ON_CUDA = 5120
"""Of what the backward pass keeps of a pixel: its block has memory for one in float64."""


def chain(
    x: torch.Tensor,
    weights: Sequence[torch.Tensor],
    bias: torch.Tensor | None = None,
    *,
    partitions: Sequence[Partition],
    activation: str | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """Convolve ``x`` by every 1×1 weight in turn, each in the groups of its partition.

    Args:
        x: ``[B, C, H, W]`` or ``[C, H, W]``; the output keeps its memory format.
        weights: For every stage, first to last, a packed weight ``[entries, 1, 1]``; for even
            groups also ``[N, C / groups, 1, 1]``.
        bias: ``[N]`` of the last stage.
        partitions: The partition of every stage; each reads what the one before it writes.
        activation: ``"relu"``, ``"relu6"``, ``"silu"``, ``"hardswish"`` or ``None``; applied last.
        backend: As in :func:`~groupconv_ext.conv2d`. The native kernels run all stages in one
            pass (on CUDA up to eight, of some thousand channels together), and so do the Triton
            kernels; every other backend runs them one after another.

    Raises:
        TypeError: An argument or a dtype of the wrong kind.
        ValueError: Stages that do not fit each other, or a weight that does not fit its stage.
        groupconv_ext.backends.BackendError: A backend asked for by name that cannot run.
    """
    weights, partitions = list(weights), list(partitions)
    _check_stages(x, weights, partitions)
    if x.dim() == 3:
        single = chain(
            x.unsqueeze(0),
            weights,
            bias,
            partitions=partitions,
            activation=activation,
            backend=backend,
        )
        return single.squeeze(0)
    if activation not in (None, *ACTIVATIONS):
        raise ValueError(f"activation is {activation!r}; expected None or one of {ACTIVATIONS}")
    needs_grad = wants_grad(x, bias, *weights)
    dtype = torch.get_autocast_dtype(x.device.type) if _is_autocast(x) else x.dtype
    call = Call(x.device.type, dtype, needs_grad, forward_ad._current_level >= 0)
    operations = _in_one_pass(choose(backend, call), x, partitions)
    if operations is None:
        *first, last = zip(weights, partitions, strict=True)
        for weight, partition in first:
            x = conv2d(x, weight, partition=partition, backend=backend)
        weight, partition = last
        return conv2d(x, weight, bias, partition=partition, activation=activation, backend=backend)
    name = activation or "none"
    if _is_autocast(x):  # which converts all operands alike
        x, bias = x.to(dtype), None if bias is None else bias.to(dtype)
        weights = [weight.to(dtype) for weight in weights]
    packed = [
        _packed(weight, partition, s)
        for s, (weight, partition) in enumerate(zip(weights, partitions, strict=True))
    ]
    _check_operands(x, packed, bias, partitions)
    if not needs_grad:
        return operations.run(x, packed, bias, partitions, name)
    fused = name if name in FUSED_IN_TRAINING else "none"
    y: torch.Tensor = apply(_Chain, x, bias, tuple(partitions), fused, operations, *packed)
    return y if fused == name else activations[name](y)


class _ChainOperations(Protocol):
    """What a backend must offer that runs all stages at once."""

    def run(
        self,
        x: torch.Tensor,
        weights: Sequence[torch.Tensor],
        bias: torch.Tensor | None,
        partitions: Sequence[Partition],
        activation: str,
    ) -> torch.Tensor:
        """The chain; weights packed."""

    def gradients(
        self,
        grad: torch.Tensor,
        x: torch.Tensor,
        weights: Sequence[torch.Tensor],
        partitions: Sequence[Partition],
        need_x: bool,
        need_weights: bool,
    ) -> tuple[torch.Tensor | None, Sequence[torch.Tensor | None]]:
        """∂L/∂x and every ∂L/∂weight, those that are needed."""

    @property
    def stages(self) -> Operations:
        """The same backend's operations on one stage."""


@dataclass(frozen=True)
class _NativeChain:
    stages: Operations = NATIVE_OPERATIONS

    def run(
        self,
        x: torch.Tensor,
        weights: Sequence[torch.Tensor],
        bias: torch.Tensor | None,
        partitions: Sequence[Partition],
        activation: str,
    ) -> torch.Tensor:
        tables = [partition.table(x.device) for partition in partitions]
        code = ACTIVATIONS.index(activation)
        return _ops.chain(x, list(weights), bias, tables, partitions[-1].out_channels, code)

    def gradients(
        self,
        grad: torch.Tensor,
        x: torch.Tensor,
        weights: Sequence[torch.Tensor],
        partitions: Sequence[Partition],
        need_x: bool,
        need_weights: bool,
    ) -> tuple[torch.Tensor | None, Sequence[torch.Tensor | None]]:
        tables = [partition.table(x.device) for partition in partitions]
        entries = [partition.entries for partition in partitions]
        by_x, flat = _ops.chain_grad(
            grad, x, list(weights), tables, sum(entries), need_x, need_weights
        )
        if not need_weights:
            return by_x, [None] * len(entries)
        return by_x, [part.view(-1, 1, 1) for part in torch.split(flat, entries)]


@dataclass(frozen=True)
class _TritonChain:
    stages: Operations = TRITON_OPERATIONS

    def run(
        self,
        x: torch.Tensor,
        weights: Sequence[torch.Tensor],
        bias: torch.Tensor | None,
        partitions: Sequence[Partition],
        activation: str,
    ) -> torch.Tensor:
        return by_triton.chain(x, weights, bias, partitions, activation)

    def gradients(
        self,
        grad: torch.Tensor,
        x: torch.Tensor,
        weights: Sequence[torch.Tensor],
        partitions: Sequence[Partition],
        need_x: bool,
        need_weights: bool,
    ) -> tuple[torch.Tensor | None, Sequence[torch.Tensor | None]]:
        if not need_weights and by_triton.has_input_grad(partitions):
            channels_last = is_channels_last(x)
            by_x = by_triton.chain_input_grad(grad, weights, partitions, channels_last)
            return by_x, [None] * len(weights)
        by_x, *by_weights = _gradients_by_stage(grad, x, weights, partitions, self.stages)
        return by_x, by_weights


# To torch.compile they are constants, like a Partition.
register_constant(_NativeChain)
register_constant(_TritonChain)

_NATIVE_CHAIN: _ChainOperations = _NativeChain()
_TRITON_CHAIN: _ChainOperations = _TritonChain()


def _in_one_pass(
    chosen: Backend, x: torch.Tensor, partitions: Sequence[Partition]
) -> _ChainOperations | None:
    """The operations that run all stages at once, if the backend has such."""
    if chosen is TRITON:
        by_triton.load()
        return _TRITON_CHAIN
    native = chosen.name == "native" and _fits_a_block(x, partitions)
    return _NATIVE_CHAIN if native else None


class _Chain(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: torch.Tensor,
        bias: torch.Tensor | None,
        partitions: tuple[Partition, ...],
        activation: str,
        operations: _ChainOperations,
        *weights: torch.Tensor,
    ) -> torch.Tensor:
        return operations.run(x, weights, bias, partitions, activation)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        x, _, ctx.partitions, ctx.activation, ctx.operations, *weights = inputs
        kept = None if ctx.activation == "none" else output
        ctx.save_for_backward(x, kept, *weights)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, output, *weights = ctx.saved_tensors
        grad = before_activation(ctx.activation, grad, output)
        need_x, need_bias, _, _, _, *need_weights = ctx.needs_input_grad
        grad_bias = grad.sum((0, 2, 3)) if need_bias else None
        by: _ChainOperations = ctx.operations
        grad_x: torch.Tensor | None
        grads: Sequence[torch.Tensor | None]
        if wants_grad(grad, x, *weights):
            grad_x, *grads = _gradients_by_stage(grad, x, weights, ctx.partitions, by.stages)
        else:
            grad_x, grads = by.gradients(
                grad, x, weights, ctx.partitions, need_x, any(need_weights)
            )
        wanted = (g if need else None for g, need in zip(grads, need_weights, strict=True))
        return grad_x if need_x else None, grad_bias, *(None,) * 3, *wanted


def _gradients_by_stage(
    grad: torch.Tensor,
    x: torch.Tensor,
    weights: Sequence[torch.Tensor],
    partitions: Sequence[Partition],
    by: Operations,
) -> list[torch.Tensor]:
    """∂L/∂x and every ∂L/∂weight, through operations that have derivatives."""
    hidden = [x]
    stages = list(zip(weights, partitions, strict=True))
    for weight, partition in stages[:-1]:
        between = convolve(hidden[-1], weight, None, None, partition, POINTWISE, "none", by)
        hidden.append(between)
    size, channels_last = (x.shape[2], x.shape[3]), is_channels_last(x)
    grads = []
    for (weight, partition), read in zip(reversed(stages), reversed(hidden), strict=True):
        grads.append(weight_grad(grad, read, partition, POINTWISE, (1, 1), by))
        grad = input_grad(grad, weight, partition, POINTWISE, size, channels_last, by)
    return [grad, *reversed(grads)]


def _fits_a_block(x: torch.Tensor, partitions: Sequence[Partition]) -> bool:
    """Whether one pass can keep what lies between the stages; on a CPU it always can."""
    if x.device.type in ("cpu", "meta"):
        return True
    widest = max(max(p.in_channels, p.out_channels) for p in partitions)
    kept = sum(p.in_channels for p in partitions) + 2 * widest
    return len(partitions) <= _MOST_STAGES_ON_CUDA and kept <= _MOST_CHANNELS_ON_CUDA


def _is_autocast(x: torch.Tensor) -> bool:
    device = x.device.type
    return device != "meta" and torch.is_autocast_enabled(device) and x.dtype != torch.float64


def _check_stages(x: object, weights: Sequence[object], partitions: Sequence[Partition]) -> None:
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"x is {x!r}; expected a tensor")
    if x.dim() not in (3, 4):
        raise ValueError(f"x has shape {list(x.shape)}; expected [B, C, H, W] or [C, H, W]")
    if not partitions or len(weights) != len(partitions):
        raise ValueError(
            f"there are {len(weights)} weights and {len(partitions)} partitions; expected one of "
            "each for every stage, and at least one stage"
        )
    for s, (weight, partition) in enumerate(zip(weights, partitions, strict=True)):
        if not isinstance(weight, torch.Tensor):
            raise TypeError(f"weights[{s}] is {weight!r}; expected a tensor")
        if not isinstance(partition, Partition):
            raise TypeError(f"partitions[{s}] is {partition!r}; expected a groupconv_ext.Partition")
        before = partitions[s - 1].out_channels if s else x.shape[-3]
        if partition.in_channels != before:
            writer = f"stage {s - 1} writes" if s else "x has"
            raise ValueError(
                f"partitions[{s}] reads {partition.in_channels} channels and {writer} {before}; "
                "expected the same number"
            )


def _packed(weight: torch.Tensor, partition: Partition, stage: int) -> torch.Tensor:
    """The weight as ``[entries, 1, 1]``."""
    _, ins = partition.sizes[0]
    if weight.shape == (partition.entries, 1, 1):
        return weight
    if partition.is_even and weight.shape == (partition.out_channels, ins, 1, 1):
        return weight.flatten(0, 1)
    also = f" or [{partition.out_channels}, {ins}, 1, 1]" if partition.is_even else ""
    raise ValueError(
        f"weights[{stage}] has shape {list(weight.shape)}; expected "
        f"[{partition.entries}, 1, 1]{also} for {partition}"
    )


def _check_operands(
    x: torch.Tensor,
    weights: Sequence[torch.Tensor],
    bias: torch.Tensor | None,
    partitions: Sequence[Partition],
) -> None:
    POINTWISE.output_size(x.shape[2], x.shape[3], 1, 1)  # an error for images without pixels
    if bias is not None and bias.shape != (partitions[-1].out_channels,):
        raise ValueError(
            f"bias has shape {list(bias.shape)}; expected [{partitions[-1].out_channels}]"
        )
    others = {f"weights[{s}]": weight for s, weight in enumerate(weights)}
    if bias is not None:
        others["bias"] = bias
    for name, tensor in others.items():
        if tensor.dtype != x.dtype:
            raise TypeError(
                f"{name} is {tensor.dtype} and x is {x.dtype}; convert one, or use torch.autocast"
            )
        if tensor.device != x.device:
            raise ValueError(f"{name} is on {tensor.device} and x is on {x.device}; move one")
