"""What comes before a convolution: normalisation and ReLU, computed while the input is read.

    x' = activation(x · scale[c] + shift[c])        y = conv(x')

for every input channel c, as pre-activation networks have it (DenseNet, CondenseNet, WideResNet).
x' is never stored. Zero padding comes after the prologue: a padded pixel is 0, not relu(shift).

The gradients, with G = ∂L/∂x' the input gradient of the convolution and g = G · activation'(x'):

    ∂L/∂x = g · scale[c]        ∂L/∂scale[c] = Σ g · x        ∂L/∂shift[c] = Σ g

The backward pass keeps x and computes x' once more.
"""

from __future__ import annotations

from typing import Any, NamedTuple, TypeAlias

import torch
from torch.nn.modules.batchnorm import _BatchNorm

from . import reference
from ._layout import compute_dtype, is_channels_last
from .autograd import apply, before_activation, input_grad, wants_grad, weight_grad
from .operations import NATIVE_OPERATIONS, Before, Operations
from .partition import Partition
from .window import Window

__all__ = ["PROLOGUE_ACTIVATIONS", "Prologue", "convolve_after"]

PROLOGUE_ACTIVATIONS: tuple[str | None, ...] = (None, "relu")


class Prologue(NamedTuple):
    """``activation(x * scale + shift)`` in front of a convolution, one number per input channel.

    Attributes:
        scale: ``[C]``, in the dtype of x, or float32 where that is narrower. ``None``: 1.
        shift: The same; ``None``: 0.
        activation: ``"relu"`` or ``None``.
    """

    scale: torch.Tensor | None = None
    shift: torch.Tensor | None = None
    activation: str | None = None

    @classmethod
    def from_batch_norm(cls, norm: torch.nn.Module, activation: str | None = "relu") -> Prologue:
        """What a batch normalisation with running statistics does, then ``activation``.

        Differentiable in the weight and bias of ``norm``.

        Args:
            norm: ``nn.BatchNorm1d``, ``2d``, … in evaluation mode.
            activation: As above.

        Raises:
            TypeError: Not a batch normalisation.
            ValueError: It would use the statistics of the batch.
        """
        if not isinstance(norm, _BatchNorm):
            raise TypeError(f"norm is {norm!r}; expected a batch normalisation")
        mean, variance = norm.running_mean, norm.running_var
        if norm.training or mean is None or variance is None:
            raise ValueError(
                f"{norm} normalises by the statistics of each batch, which are not known before it "
                "has been read; call it by itself, or put it into eval() mode with running "
                "statistics"
            )
        scale = torch.rsqrt(variance + norm.eps)
        if norm.weight is not None:
            scale = scale * norm.weight
        if norm.bias is None:
            shift = -mean * scale
        else:
            shift = torch.addcmul(norm.bias, mean, scale, value=-1)
        return cls(scale, shift, activation)

    def apply(self, x: torch.Tensor) -> torch.Tensor:
        """x' by itself, in plain PyTorch."""
        return reference.prologue(x, *self)


def convolve_after(
    prologue: Prologue,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    partition: Partition,
    window: Window,
    activation: str,
    operations: Operations = NATIVE_OPERATIONS,
) -> torch.Tensor:
    """:func:`~groupconv_ext.autograd.convolve` of x'."""
    scale, shift, before = prologue
    relu = before == "relu"
    if not wants_grad(x, weight, bias, residual, scale, shift):
        operands = (x, weight, bias, residual, partition, window, activation)
        return operations.conv2d(*operands, (scale, shift, relu))
    y: torch.Tensor = apply(
        _PrologueConvolution,
        *(x, weight, bias, residual, scale, shift, relu, partition, window, activation, operations),
    )
    return y


Grad: TypeAlias = torch.Tensor | None


class _PrologueConvolution(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        residual: torch.Tensor | None,
        scale: torch.Tensor | None,
        shift: torch.Tensor | None,
        relu: bool,
        partition: Partition,
        window: Window,
        activation: str,
        operations: Operations,
    ) -> torch.Tensor:
        operands = (x, weight, bias, residual, partition, window, activation)
        return operations.conv2d(*operands, (scale, shift, relu))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        x, weight, _, _, scale, shift, *settings = inputs
        ctx.relu, ctx.partition, ctx.window, ctx.activation, ctx.operations = settings
        kept = None if ctx.activation == "none" else output
        ctx.save_for_backward(x, weight, scale, shift, kept)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Grad, ...]:
        x, weight, scale, shift, output = ctx.saved_tensors
        grad = before_activation(ctx.activation, grad, output)
        need_x, need_weight, need_bias, need_residual, need_scale, need_shift, *_ = (
            ctx.needs_input_grad
        )
        need_input = need_x or need_scale or need_shift
        before = (scale, shift, ctx.relu)
        call = (grad, weight, x, before, ctx.partition, ctx.window, ctx.operations)
        if wants_grad(grad, weight, x, scale, shift):
            found = _differentiable_grads(*call, need_input, need_weight)
        else:
            found = _grads(*call, need_input, need_weight)
        grad_x, grad_scale, grad_shift, grad_weight = found
        return (
            grad_x if need_x else None,
            grad_weight,
            grad.sum((0, 2, 3)) if need_bias else None,
            grad if need_residual else None,
            grad_scale.to(scale.dtype) if need_scale and grad_scale is not None else None,
            grad_shift.to(shift.dtype) if need_shift and grad_shift is not None else None,
            *(None,) * 5,
        )


def _grads(
    grad: torch.Tensor,
    weight: torch.Tensor,
    x: torch.Tensor,
    before: Before,
    partition: Partition,
    window: Window,
    operations: Operations,
    need_input: bool,
    need_weight: bool,
) -> tuple[Grad, Grad, Grad, Grad]:
    by_input: tuple[Grad, Grad, Grad] = None, None, None
    by_weight = None
    if need_input:
        by_input = operations.prologue_input_grad(grad, weight, x, before, partition, window)
    if need_weight:
        kernel = (weight.shape[1], weight.shape[2])
        by_weight = operations.weight_grad(grad, x, partition, window, kernel, before)
    return *by_input, by_weight


def _differentiable_grads(
    grad: torch.Tensor,
    weight: torch.Tensor,
    x: torch.Tensor,
    before: Before,
    partition: Partition,
    window: Window,
    operations: Operations,
    need_input: bool,
    need_weight: bool,
) -> tuple[Grad, Grad, Grad, Grad]:
    """The same gradients made of operations that can be differentiated again: x' is stored."""
    scale, shift, relu = before
    wide = x.to(compute_dtype(x))
    prepared = reference.prologue(x, scale, shift, "relu" if relu else None)
    by_x = by_scale = by_shift = by_weight = None
    if need_input:
        size = (x.shape[2], x.shape[3])
        channels_last = is_channels_last(x)
        g = input_grad(grad, weight, partition, window, size, channels_last, operations)
        g = g.to(wide.dtype)
        if relu:
            g = torch.ops.aten.threshold_backward(g, prepared.to(wide.dtype), 0)
        by_x = (g if scale is None else g * scale[:, None, None]).to(x.dtype)
        by_scale, by_shift = (g * wide).sum((0, 2, 3)), g.sum((0, 2, 3))
    if need_weight:
        kernel = (weight.shape[1], weight.shape[2])
        by_weight = weight_grad(grad, prepared, partition, window, kernel, operations)
    return by_x, by_scale, by_shift, by_weight
