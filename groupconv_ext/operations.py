"""The operations that a convolution and all its derivatives are made of.

:mod:`.autograd` and :mod:`.prologue` say how they are composed, a set of operations how they are
computed. The native library's are :data:`NATIVE_OPERATIONS`; a backend with kernels of its own
brings its own set and gets every derivative with it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

import torch
from torch.utils._pytree import register_constant

from . import _ops
from .partition import Partition
from .reference import activations
from .window import POINTWISE, Window

__all__ = [
    "ACTIVATIONS",
    "NATIVE_LABELLED",
    "NATIVE_OPERATIONS",
    "Before",
    "Grads",
    "LabelledOperations",
    "NativeLabelledOperations",
    "NativeOperations",
    "Operations",
    "settled",
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

    def two_level(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        restriction: torch.Tensor,
        coarse: torch.Tensor,
        bias: torch.Tensor | None,
        within: Partition,
        restrict: Partition,
        window: Window,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """``A x + S z + bias`` and ``z = R x``; A and R packed, S ``[N, G]``."""


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
        if not x.is_cpu:
            _ops.follow_tf32(x)
        table = partition.cpu_table if x.is_cpu else partition.table(x.device)
        code = ACTIVATIONS.index(activation)
        if before is None and window == POINTWISE:
            # Every number that is handed over costs 0.15 µs, a tenth of a small call all of them.
            few = (x, weight, bias, residual, table, partition.out_channels)
            return _ops.conv2d(*few, activation=code) if code else _ops.conv2d(*few)
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
        table = partition.cpu_table if x.is_cpu else partition.table(x.device)
        code = ACTIVATIONS.index(activation)
        dx, dw, db = _ops.conv2d_backward(grad, output, x, weight, table, *window, code, *wanted)
        need_x, need_weight, need_bias = wanted
        return dx if need_x else None, dw if need_weight else None, db if need_bias else None

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

    def two_level(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        restriction: torch.Tensor,
        coarse: torch.Tensor,
        bias: torch.Tensor | None,
        within: Partition,
        restrict: Partition,
        window: Window,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See :class:`Operations`."""
        if not x.is_cpu:
            _ops.follow_tf32(x)
        table = within.table(x.device)
        return _ops.two_level(x, weight, restriction, coarse, bias, table, *window)


def settled(partition: Partition, window: Window, activation: str) -> tuple[Any, ...]:
    """What ``conv2d`` on the CPU takes behind its operands, without what it would assume anyway.

    Every number that is handed over costs 0.15 µs, a tenth of a small call all of them.
    """
    numbers = [*window, ACTIVATIONS.index(activation)]
    assumed = [*POINTWISE, 0]
    while numbers and numbers[-1] == assumed[len(numbers) - 1]:
        numbers.pop()
    return partition.cpu_table, partition.out_channels, *numbers


# To torch.compile a set of operations is a constant, like a Partition.
register_constant(NativeOperations)

NATIVE_OPERATIONS: Operations = NativeOperations()


# ---- on groups that are labels ------------------------------------------------------------------


class LabelledOperations(Protocol):
    """What :mod:`.masked` is made of; arguments as in ``csrc/torch/library.cpp``."""

    def row_labels(self, logits: torch.Tensor, owner: str) -> torch.Tensor:
        """The largest entry of every row, the first among equals."""

    def kronecker_labels(
        self, gates: torch.Tensor, in_channels: int, out_channels: int, owner: str
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Every channel's digits at the zero gates, read as a number."""

    def labelled_conv2d(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        in_labels: torch.Tensor,
        out_labels: torch.Tensor,
        groups: int,
        *window: int,
    ) -> torch.Tensor:
        """The convolution with a dense weight, of which the selected blocks are read."""

    def labelled_conv2d_input_grad(
        self,
        grad: torch.Tensor,
        weight: torch.Tensor,
        in_labels: torch.Tensor,
        out_labels: torch.Tensor,
        groups: int,
        height: int,
        width: int,
        *window_and_layout: int,
    ) -> torch.Tensor:
        """∂L/∂x."""

    def labelled_conv2d_weight_grad(
        self,
        grad: torch.Tensor,
        x: torch.Tensor,
        in_labels: torch.Tensor,
        out_labels: torch.Tensor,
        groups: int,
        kernel_h: int,
        kernel_w: int,
        *window: int,
    ) -> torch.Tensor:
        """∂L/∂weight, dense, zero where labels differ."""

    def dense_conv2d_weight_grad(
        self, grad: torch.Tensor, x: torch.Tensor, kernel_h: int, kernel_w: int, *window: int
    ) -> torch.Tensor:
        """∂L/∂weight of one group of all channels."""

    def mask_weight(
        self, weight: torch.Tensor, in_labels: torch.Tensor, out_labels: torch.Tensor
    ) -> torch.Tensor:
        """The weight where labels agree, zero elsewhere."""

    def label_grad(
        self,
        grad: torch.Tensor,
        weight: torch.Tensor,
        input_logits: torch.Tensor,
        output_logits: torch.Tensor,
        in_labels: torch.Tensor,
        out_labels: torch.Tensor,
        winner: bool,
        masked: bool,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The weight's gradient where it is masked (else empty), and the logits'."""

    def kronecker_grad(
        self, grad: torch.Tensor, weight: torch.Tensor, gates: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The weight's gradient and the gates', from that of the masked weight."""

    def kronecker_conv2d_grad(
        self,
        grad: torch.Tensor,
        x: torch.Tensor,
        weight: torch.Tensor,
        gates: torch.Tensor,
        *window: int,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The same from the convolution's operands."""


@dataclass(frozen=True)
class NativeLabelledOperations:
    """The native library's operations, as they are."""

    row_labels = staticmethod(_ops.row_labels)
    kronecker_labels = staticmethod(_ops.kronecker_labels)
    labelled_conv2d = staticmethod(_ops.labelled_conv2d)
    labelled_conv2d_input_grad = staticmethod(_ops.labelled_conv2d_input_grad)
    labelled_conv2d_weight_grad = staticmethod(_ops.labelled_conv2d_weight_grad)
    dense_conv2d_weight_grad = staticmethod(_ops.dense_conv2d_weight_grad)
    mask_weight = staticmethod(_ops.mask_weight)
    label_grad = staticmethod(_ops.label_grad)
    kronecker_grad = staticmethod(_ops.kronecker_grad)
    kronecker_conv2d_grad = staticmethod(_ops.kronecker_conv2d_grad)


register_constant(NativeLabelledOperations)

NATIVE_LABELLED: LabelledOperations = NativeLabelledOperations()
