"""The operations made differentiable, any number of times.

The convolution is linear in its input and in its weight, so its two gradients, the operation
itself and nothing else make a closed system:

====================  =========================  =========================
                      derivative by 1st operand  derivative by 2nd operand
====================  =========================  =========================
y  = conv(x, w)       dx = input_grad(dy, w)     dw = weight_grad(dy, x)
dx = input_grad(g,w)  conv(·, w)                 weight_grad(g, ·)
dw = weight_grad(g,x) conv(x, ·)                 input_grad(g, ·)
====================  =========================  =========================

Each is an ``autograd.Function`` (the cheapest differentiable path into an operation) and a plain
function in front of it that skips the Function where no gradient is asked for.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import torch
from torch._C._functorch import unwrap_if_dead
from torch.compiler import is_compiling

from ._layout import is_channels_last
from .operations import ACTIVATIONS, NATIVE_OPERATIONS, Operations
from .partition import Partition
from .window import Window

__all__ = [
    "ACTIVATIONS",
    "FUSED_IN_TRAINING",
    "apply",
    "before_activation",
    "convolve",
    "input_grad",
    "wants_grad",
    "weight_grad",
]

FUSED_IN_TRAINING = frozenset({"none", "relu", "relu6"})
"""Activations whose derivative can be read off the output; others need what went in."""

Grad: TypeAlias = torch.Tensor | None


def convolve(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    partition: Partition,
    window: Window,
    activation: str,
    operations: Operations = NATIVE_OPERATIONS,
) -> torch.Tensor:
    """``activation(conv(x) + bias + residual)`` with a packed weight ``[entries, kh, kw]``."""
    if not wants_grad(x, weight, bias, residual):
        return operations.conv2d(x, weight, bias, residual, partition, window, activation)
    y: torch.Tensor = apply(
        _Convolution, x, weight, bias, residual, partition, window, activation, operations
    )
    return y


def input_grad(
    grad: torch.Tensor,
    weight: torch.Tensor,
    partition: Partition,
    window: Window,
    size: tuple[int, int],
    channels_last: bool,
    operations: Operations = NATIVE_OPERATIONS,
) -> torch.Tensor:
    """∂L/∂x for x of height and width ``size``, from ∂L/∂y of the bare convolution."""
    if not wants_grad(grad, weight):
        return operations.input_grad(grad, weight, partition, window, size, channels_last)
    y: torch.Tensor = apply(
        _InputGrad, grad, weight, partition, window, size, channels_last, operations
    )
    return y


def weight_grad(
    grad: torch.Tensor,
    x: torch.Tensor,
    partition: Partition,
    window: Window,
    kernel: tuple[int, int],
    operations: Operations = NATIVE_OPERATIONS,
) -> torch.Tensor:
    """∂L/∂weight, packed, from ∂L/∂y of the bare convolution."""
    if not wants_grad(grad, x):
        return operations.weight_grad(grad, x, partition, window, kernel)
    y: torch.Tensor = apply(_WeightGrad, grad, x, partition, window, kernel, operations)
    return y


def before_activation(
    activation: str, grad: torch.Tensor, output: torch.Tensor | None
) -> torch.Tensor:
    """∂L/∂(what went into an activation), from what came out of it."""
    if activation == "relu":
        grad = torch.ops.aten.threshold_backward(grad, output, 0)
    elif activation == "relu6":
        grad = torch.ops.aten.hardtanh_backward(grad, output, 0, 6)
    return grad


def wants_grad(*tensors: torch.Tensor | None) -> bool:
    """Whether autograd has to know of an operation on these."""
    if torch.is_grad_enabled():
        for tensor in tensors:
            if tensor is not None and tensor.requires_grad:
                return True
    return False


def apply(function: type[torch.autograd.Function], *args: Any) -> Any:
    """``function.apply(*args)``, without what that does for arguments that are not given.

    It asks for the signature of ``forward`` and binds to it, which takes longer than all the rest.
    """
    if is_compiling() or torch._C._are_functorch_transforms_active():
        return function.apply(*args)  # type: ignore[no-untyped-call]
    # What outlived a transform is a tensor like any other again.
    given = (unwrap_if_dead(arg) if isinstance(arg, torch.Tensor) else arg for arg in args)
    return super(torch.autograd.Function, function).apply(*given)  # type: ignore[misc]


class _Convolution(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        residual: torch.Tensor | None,
        partition: Partition,
        window: Window,
        activation: str,
        operations: Operations,
    ) -> torch.Tensor:
        return operations.conv2d(x, weight, bias, residual, partition, window, activation)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        x, weight, _, _, ctx.partition, ctx.window, ctx.activation, ctx.operations = inputs
        ctx.save_for_backward(x, weight, None if ctx.activation == "none" else output)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Grad, ...]:
        x, weight, output = ctx.saved_tensors
        need_x, need_weight, need_bias, need_residual, *_ = ctx.needs_input_grad
        wanted = (need_x, need_weight, need_bias)
        call = (ctx.partition, ctx.window)
        if (
            any(wanted)
            and not torch.is_grad_enabled()
            and not (need_residual and output is not None)
        ):
            # Nobody differentiates this again, so one operation may do it all.
            made = ctx.operations.backward(grad, output, x, weight, *call, ctx.activation, wanted)
            if made is not None:
                return *made, grad if need_residual else None, *(None,) * 4
        grad = before_activation(ctx.activation, grad, output)
        grad_x = grad_weight = grad_bias = None
        if need_x:
            size = (x.shape[2], x.shape[3])
            last = is_channels_last(x)
            grad_x = input_grad(grad, weight, *call, size, last, ctx.operations)
        if need_weight:
            kernel = (weight.shape[1], weight.shape[2])
            grad_weight = weight_grad(grad, x, *call, kernel, ctx.operations)
        if need_bias:
            grad_bias = grad.sum((0, 2, 3))
        return grad_x, grad_weight, grad_bias, grad if need_residual else None, *(None,) * 4


class _InputGrad(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(
        grad: torch.Tensor,
        weight: torch.Tensor,
        partition: Partition,
        window: Window,
        size: tuple[int, int],
        channels_last: bool,
        operations: Operations,
    ) -> torch.Tensor:
        return operations.input_grad(grad, weight, partition, window, size, channels_last)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        grad, weight, ctx.partition, ctx.window, _, _, ctx.operations = inputs
        ctx.save_for_backward(grad, weight)

    @staticmethod
    def backward(ctx: Any, gradgrad: torch.Tensor) -> tuple[Grad, ...]:
        grad, weight = ctx.saved_tensors
        need_grad, need_weight, *_ = ctx.needs_input_grad
        call = (ctx.partition, ctx.window)
        by_grad = by_weight = None
        if need_grad:
            operands = (gradgrad, weight, None, None)
            by_grad = convolve(*operands, *call, "none", ctx.operations)
        if need_weight:
            kernel = (weight.shape[1], weight.shape[2])
            by_weight = weight_grad(grad, gradgrad, *call, kernel, ctx.operations)
        return by_grad, by_weight, *(None,) * 5


class _WeightGrad(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(
        grad: torch.Tensor,
        x: torch.Tensor,
        partition: Partition,
        window: Window,
        kernel: tuple[int, int],
        operations: Operations,
    ) -> torch.Tensor:
        return operations.weight_grad(grad, x, partition, window, kernel)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        grad, x, ctx.partition, ctx.window, _, ctx.operations = inputs
        ctx.save_for_backward(grad, x)

    @staticmethod
    def backward(ctx: Any, gradgrad: torch.Tensor) -> tuple[Grad, ...]:
        grad, x = ctx.saved_tensors
        need_grad, need_x, *_ = ctx.needs_input_grad
        call = (ctx.partition, ctx.window)
        by_grad = by_x = None
        if need_grad:
            by_grad = convolve(x, gradgrad, None, None, *call, "none", ctx.operations)
        if need_x:
            size = (x.shape[2], x.shape[3])
            by_x = input_grad(grad, gradgrad, *call, size, is_channels_last(x), ctx.operations)
        return by_grad, by_x, *(None,) * 4
