"""Dense weights under a mask that is learned: products, packing, and exact sparse training.

FLGC (eq. 14) and DGConv (eq. 3, 4) multiply a dense weight by a 0/1 mask; both masks connect two
channels exactly when their labels agree::

    FLGC     M = T Sᵀ          label: the largest logit of the channel's row
    DGConv   U = U₁ ⊗ … ⊗ U_K  label: the channel's digits at the zero gates

so the convolution is a partitioned one. What the selected blocks decide, the output and the
gradient of the input, is computed from them alone. With D = ∂L/∂(W ⊙ M) the structure learns from

    ∂L/∂S[c, g] = Σ (D·W)[n, c] over the filters n of group g
    ∂L/∂T[n, g] = Σ (D·W)[n, c] over the inputs c of group g
    ∂L/∂g_k     = Σ (D·W)[n, c] over pairs that differ in digit k and agree at the other zero gates

so FLGC needs all of D, DGConv (1 + Σ (p_k − 1)) / Π p_k of it over the zero gates. Neither ever
builds its mask. A derivative of these gradients is not defined: they are not those of the value.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from . import _ops
from ._layout import is_channels_last
from .autograd import Grad, apply
from .operations import NATIVE_LABELLED, LabelledOperations
from .partition import Partition
from .window import Window

__all__ = ["dgconv_convolve", "flgc_convolve", "labelled_weight", "mask_kronecker", "pack"]


def pack(
    dense: torch.Tensor, partition: Partition, dtype: torch.dtype | None = None
) -> torch.Tensor:
    """:meth:`Partition.pack` in one native pass; ``dtype`` may be bfloat16 for a float32 weight."""
    narrow = dtype is not None and dtype != dense.dtype
    packed: torch.Tensor = apply(_Pack, dense, partition, narrow)
    return packed


class _Pack(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(dense: torch.Tensor, partition: Partition, narrow: bool) -> torch.Tensor:
        return _ops.pack(dense, partition.table(dense.device), partition.entries, narrow)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        _, ctx.partition, ctx.narrow = inputs

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Grad, ...]:
        unpacked: torch.Tensor = apply(_Unpack, grad, ctx.partition, ctx.narrow)
        return unpacked, None, None


class _Unpack(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(packed: torch.Tensor, partition: Partition, widen: bool) -> torch.Tensor:
        channels = partition.out_channels, partition.in_channels
        return _ops.unpack(packed, partition.table(packed.device), *channels, widen)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        _, ctx.partition, ctx.widen = inputs

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Grad, ...]:
        packed: torch.Tensor = apply(_Pack, grad, ctx.partition, ctx.widen)
        return packed, None, None


# ---- FLGC ---------------------------------------------------------------------------------------


def labelled_weight(
    weight: torch.Tensor,
    input_logits: torch.Tensor,
    output_logits: torch.Tensor,
    in_labels: torch.Tensor,
    out_labels: torch.Tensor,
    winner: bool,
    masked: bool,
    operations: LabelledOperations = NATIVE_LABELLED,
) -> torch.Tensor:
    """``W ⊙ (T Sᵀ)`` from labels, dense."""
    tensors = (weight, input_logits, output_logits, in_labels, out_labels)
    product: torch.Tensor = apply(_LabelledWeight, *tensors, winner, masked, operations)
    return product


class _LabelledWeight(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(
        weight: torch.Tensor,
        input_logits: torch.Tensor,
        output_logits: torch.Tensor,
        in_labels: torch.Tensor,
        out_labels: torch.Tensor,
        winner: bool,
        masked: bool,
        operations: LabelledOperations,
    ) -> torch.Tensor:
        return operations.mask_weight(weight, in_labels, out_labels)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        *tensors, ctx.winner, ctx.masked, ctx.operations = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Grad, ...]:
        weight, input_logits, output_logits, in_labels, out_labels = ctx.saved_tensors
        grads = _flgc_grads(
            grad,
            weight,
            input_logits,
            output_logits,
            in_labels,
            out_labels,
            ctx.winner,
            ctx.masked,
            ctx.operations,
        )
        return *grads, *(None,) * 5


def _flgc_grads(
    product_grad: torch.Tensor,
    weight: torch.Tensor,
    input_logits: torch.Tensor,
    output_logits: torch.Tensor,
    in_labels: torch.Tensor,
    out_labels: torch.Tensor,
    winner: bool,
    masked: bool,
    operations: LabelledOperations,
) -> tuple[Grad, Grad, Grad]:
    """∂W, ∂S̄, ∂T̄ from D, in one pass over D and W (eq. 16 to 18)."""
    dtype = weight.dtype
    weight_grad, input_grad, output_grad = operations.label_grad(
        product_grad,
        weight,
        input_logits.to(dtype),
        output_logits.to(dtype),
        in_labels,
        out_labels,
        winner,
        masked,
    )
    return (
        weight_grad if masked else product_grad,
        input_grad.to(input_logits.dtype),
        output_grad.to(output_logits.dtype),
    )


def flgc_convolve(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    input_logits: torch.Tensor,
    output_logits: torch.Tensor,
    in_labels: torch.Tensor,
    out_labels: torch.Tensor,
    window: Window,
    winner: bool,
    masked: bool,
    learn: bool,
    operations: LabelledOperations = NATIVE_LABELLED,
) -> torch.Tensor:
    """Convolve in the groups of the labels; ``weight`` is dense, and may be wider than ``x``.

    Without ``learn`` the logits get no gradient and the weight one for its selected blocks only.
    """
    _ops.follow_tf32(x)
    y: torch.Tensor = apply(
        _FlgcConvolution,
        x,
        weight,
        bias,
        input_logits,
        output_logits,
        in_labels,
        out_labels,
        window,
        winner,
        masked,
        learn,
        operations,
    )
    return y


class _FlgcConvolution(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        input_logits: torch.Tensor,
        output_logits: torch.Tensor,
        in_labels: torch.Tensor,
        out_labels: torch.Tensor,
        window: Window,
        winner: bool,
        masked: bool,
        learn: bool,
        operations: LabelledOperations,
    ) -> torch.Tensor:
        labels = in_labels, out_labels, input_logits.shape[1]
        return operations.labelled_conv2d(x, weight, bias, *labels, *window)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        x, weight, _, *structure = inputs[:7]
        ctx.window, ctx.winner, ctx.masked, ctx.learn, ctx.operations = inputs[7:]
        ctx.save_for_backward(x, weight, *structure)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Grad, ...]:
        x, weight, input_logits, output_logits, in_labels, out_labels = ctx.saved_tensors
        labels = in_labels, out_labels, input_logits.shape[1]
        operations = ctx.operations
        need_x, need_weight, need_bias, need_input, need_output, *_ = ctx.needs_input_grad
        grad_x = grad_weight = grad_bias = grad_input = grad_output = None
        if need_x:
            grad_x = _labelled_input_grad(grad, x, weight, labels, ctx.window, operations)
        need_structure = ctx.learn and (need_input or need_output)
        if need_structure or (need_weight and ctx.learn and not ctx.masked):
            kernel = weight.shape[2], weight.shape[3]
            product_grad = operations.dense_conv2d_weight_grad(grad, x, *kernel, *ctx.window)
            product_grad = product_grad.to(weight.dtype)
            grad_weight = product_grad
            if need_structure:
                grad_weight, grad_input, grad_output = _flgc_grads(
                    product_grad,
                    weight,
                    input_logits,
                    output_logits,
                    in_labels,
                    out_labels,
                    ctx.winner,
                    ctx.masked,
                    operations,
                )
        elif need_weight:
            kernel = weight.shape[2], weight.shape[3]
            sizes = (*labels, *kernel, *ctx.window)
            grad_weight = operations.labelled_conv2d_weight_grad(grad, x, *sizes)
            grad_weight = grad_weight.to(weight.dtype)
        if need_bias:
            grad_bias = grad.sum((0, 2, 3))
        return grad_x, grad_weight, grad_bias, grad_input, grad_output, *(None,) * 7


def _labelled_input_grad(
    grad: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    labels: tuple[torch.Tensor, torch.Tensor, int],
    window: Window,
    operations: LabelledOperations,
) -> torch.Tensor:
    size = x.shape[2], x.shape[3]
    return operations.labelled_conv2d_input_grad(
        grad, weight, *labels, *size, *window, is_channels_last(x)
    )


# ---- DGConv -------------------------------------------------------------------------------------


def mask_kronecker(
    weight: torch.Tensor,
    gates: torch.Tensor,
    in_labels: torch.Tensor,
    out_labels: torch.Tensor,
    operations: LabelledOperations = NATIVE_LABELLED,
) -> torch.Tensor:
    """``W ⊙ U`` from the labels of the gates, dense."""
    product: torch.Tensor = apply(
        _KroneckerWeight, weight, gates, in_labels, out_labels, operations
    )
    return product


class _KroneckerWeight(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(
        weight: torch.Tensor,
        gates: torch.Tensor,
        in_labels: torch.Tensor,
        out_labels: torch.Tensor,
        operations: LabelledOperations,
    ) -> torch.Tensor:
        return operations.mask_weight(weight, in_labels, out_labels)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        weight, gates, *_, ctx.operations = inputs
        ctx.save_for_backward(weight, gates)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Grad, ...]:
        weight, gates = ctx.saved_tensors
        weight_grad, gate_grad = ctx.operations.kronecker_grad(grad, weight, gates)
        return weight_grad, gate_grad.to(gates.dtype), None, None, None


def dgconv_convolve(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    gates: torch.Tensor,
    in_labels: torch.Tensor,
    out_labels: torch.Tensor,
    groups: int,
    window: Window,
    operations: LabelledOperations = NATIVE_LABELLED,
) -> torch.Tensor:
    """Convolve in the groups of the gates; ``weight`` is dense, and may be wider than ``x``."""
    _ops.follow_tf32(x)
    y: torch.Tensor = apply(
        _DgconvConvolution,
        x,
        weight,
        bias,
        gates,
        in_labels,
        out_labels,
        groups,
        window,
        operations,
    )
    return y


class _DgconvConvolution(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        gates: torch.Tensor,
        in_labels: torch.Tensor,
        out_labels: torch.Tensor,
        groups: int,
        window: Window,
        operations: LabelledOperations,
    ) -> torch.Tensor:
        labels = in_labels, out_labels, groups
        return operations.labelled_conv2d(x, weight, bias, *labels, *window)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        x, weight, _, *structure, ctx.groups, ctx.window, ctx.operations = inputs
        ctx.save_for_backward(x, weight, *structure)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Grad, ...]:
        x, weight, gates, in_labels, out_labels = ctx.saved_tensors
        labels = in_labels, out_labels, ctx.groups
        operations = ctx.operations
        need_x, need_weight, need_bias, need_gates, *_ = ctx.needs_input_grad
        grad_x = grad_weight = grad_bias = grad_gates = None
        if need_x:
            grad_x = _labelled_input_grad(grad, x, weight, labels, ctx.window, operations)
        if need_gates:
            grad_weight, grad_gates = operations.kronecker_conv2d_grad(
                grad, x, weight, gates, *ctx.window
            )
            grad_gates = grad_gates.to(gates.dtype)
        elif need_weight:
            kernel = weight.shape[2], weight.shape[3]
            sizes = (*labels, *kernel, *ctx.window)
            grad_weight = operations.labelled_conv2d_weight_grad(grad, x, *sizes)
            grad_weight = grad_weight.to(weight.dtype)
        if need_bias:
            grad_bias = grad.sum((0, 2, 3))
        return grad_x, grad_weight, grad_bias, grad_gates, *(None,) * 5
