"""The operations that a convolution and all its derivatives are made of.

:mod:`.autograd` and :mod:`.prologue` say how they are composed, a set of operations how they are
computed. The native library's are :data:`NATIVE_OPERATIONS`; a backend with kernels of its own
brings its own set and gets every derivative with it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, TypeAlias

import torch
from torch.utils._pytree import register_constant

from . import _ops
from .partition import Partition
from .reference import activations
from .window import Window

__all__ = [
    "ACTIVATIONS",
    "NATIVE_OPERATIONS",
    "Before",
    "Grads",
    "NativeOperations",
    "Operations",
]

ACTIVATIONS: tuple[str, ...] = tuple(activations)
"""The position is the code that operations take."""

Before: TypeAlias = tuple[torch.Tensor | None, torch.Tensor | None, bool]
"""A prologue as operations take it: scale, shift, and whether a ReLU follows."""

Grads: TypeAlias = tuple[torch.Tensor | None, ...]


class Operations(Protocol):
    """What a set of operations must offer; weights are packed, ``[entries, kh, kw]``."""

    def conv2d(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        residual: torch.Tensor | None,
        partition: Partition,
        window: Window,
        activation: str,
        before: Before | None = None,
    ) -> torch.Tensor:
        """``activation(conv(x') + bias + residual)``; x' is x, or what a prologue makes of it."""

    def input_grad(
        self,
        grad: torch.Tensor,
        weight: torch.Tensor,
        partition: Partition,
        window: Window,
        size: tuple[int, int],
        channels_last: bool,
    ) -> torch.Tensor:
        """∂L/∂x from ∂L/∂y of the bare convolution."""

    def weight_grad(
        self,
        grad: torch.Tensor,
        x: torch.Tensor,
        partition: Partition,
        window: Window,
        kernel: tuple[int, int],
        before: Before | None = None,
    ) -> torch.Tensor:
        """∂L/∂weight from ∂L/∂y of the bare convolution of x'."""

    def backward(
        self,
        grad: torch.Tensor,
        output: torch.Tensor | None,
        x: torch.Tensor,
        weight: torch.Tensor,
        partition: Partition,
        window: Window,
        activation: str,
        wanted: tuple[bool, bool, bool],
    ) -> Grads | None:
        """The wanted ones of ∂L/∂x, ∂L/∂weight, ∂L/∂bias at once, or None: one by one then."""

    def prologue_input_grad(
        self,
        grad: torch.Tensor,
        weight: torch.Tensor,
        x: torch.Tensor,
        before: Before,
        partition: Partition,
        window: Window,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """∂L/∂x, ∂L/∂scale and ∂L/∂shift."""


@dataclass(frozen=True)
class NativeOperations:
    """The native library's operations."""

    def conv2d(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        residual: torch.Tensor | None,
        partition: Partition,
        window: Window,
        activation: str,
        before: Before | None = None,
    ) -> torch.Tensor:
        """See :class:`Operations`, and so for the rest."""
        table = partition.cpu_table if x.is_cpu else partition.table(x.device)
        code = ACTIVATIONS.index(activation)
        shared = (table, partition.out_channels, *window, code)
        if before is None:
            return _ops.conv2d(x, weight, bias, residual, *shared)
        return _ops.prologue_conv2d(x, weight, bias, residual, *before, *shared)

    def input_grad(
        self,
        grad: torch.Tensor,
        weight: torch.Tensor,
        partition: Partition,
        window: Window,
        size: tuple[int, int],
        channels_last: bool,
    ) -> torch.Tensor:
        """See :class:`Operations`."""
        table = partition.table(grad.device)
        return _ops.conv2d_input_grad(
            grad, weight, table, partition.in_channels, *size, *window, channels_last
        )

    def weight_grad(
        self,
        grad: torch.Tensor,
        x: torch.Tensor,
        partition: Partition,
        window: Window,
        kernel: tuple[int, int],
        before: Before | None = None,
    ) -> torch.Tensor:
        """See :class:`Operations`."""
        shared = (partition.table(x.device), partition.entries, *kernel, *window)
        if before is None:
            return _ops.conv2d_weight_grad(grad, x, *shared)
        return _ops.prologue_conv2d_weight_grad(grad, x, *before, *shared)

    def backward(
        self,
        grad: torch.Tensor,
        output: torch.Tensor | None,
        x: torch.Tensor,
        weight: torch.Tensor,
        partition: Partition,
        window: Window,
        activation: str,
        wanted: tuple[bool, bool, bool],
    ) -> Grads | None:
        """See :class:`Operations`."""
        table = partition.table(x.device)
        code = ACTIVATIONS.index(activation)
        made = _ops.conv2d_backward(grad, output, x, weight, table, *window, code, *wanted)
        return tuple(g if want else None for g, want in zip(made, wanted, strict=True))

    def prologue_input_grad(
        self,
        grad: torch.Tensor,
        weight: torch.Tensor,
        x: torch.Tensor,
        before: Before,
        partition: Partition,
        window: Window,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """See :class:`Operations`."""
        table = partition.table(x.device)
        return _ops.prologue_conv2d_input_grad(grad, weight, x, *before, table, *window)


# To torch.compile a set of operations is a constant, like a Partition.
register_constant(NativeOperations)

NATIVE_OPERATIONS: Operations = NativeOperations()
