"""The kernels of learned masks as operations, ``torch.ops.groupconv_triton``."""

from __future__ import annotations

import torch
import triton

from . import mask_kernels as kernels
from .registration import launch_kernel, register

__all__ = ["gate_gradient", "gate_labels", "label_gradient", "mask_by_labels"]

_BLOCK = 1024
_ROWS = 16
_COLUMNS = 32
_LARGEST = 2**31 - 1 - (1 << 16)


def _taps(weight: torch.Tensor) -> int:
    taps = 1
    for size in weight.shape[2:]:
        taps *= size
    return taps


def _check_mask(
    weight: torch.Tensor, in_labels: torch.Tensor, out_labels: torch.Tensor
) -> torch.Tensor:
    """The weight, contiguous, or an error where the labels do not fit it."""
    sizes = (out_labels.numel(), in_labels.numel())
    if weight.dim() < 2 or weight.shape[:2] != sizes:
        raise RuntimeError(f"weight has shape {list(weight.shape)}; expected [{sizes}, *kernel]")
    for name, labels in (("in_labels", in_labels), ("out_labels", out_labels)):
        if labels.dtype != torch.int32 or not labels.is_contiguous():
            raise RuntimeError(f"{name} is {labels.dtype}; expected contiguous int32")
        if labels.device != weight.device:
            raise RuntimeError(f"{name} is on {labels.device}; expected {weight.device}")
    return weight.contiguous()


def _mask_by_labels(
    weight: torch.Tensor, in_labels: torch.Tensor, out_labels: torch.Tensor
) -> torch.Tensor:
    weight = _check_mask(weight, in_labels, out_labels)
    out = torch.empty_like(weight)
    count = weight.numel()
    if count == 0:
        return out
    settings = {
        "weight": weight,
        "in_labels": in_labels,
        "out_labels": out_labels,
        "out": out,
        "in_channels": weight.shape[1],
        "taps": _taps(weight),
        "count": count,
        "LARGE": count > _LARGEST,
        "BLOCK": _BLOCK,
    }
    launch_kernel(kernels.mask_by_labels, (triton.cdiv(count, _BLOCK),), weight, settings)
    return out


def _fake_mask_by_labels(
    weight: torch.Tensor, in_labels: torch.Tensor, out_labels: torch.Tensor
) -> torch.Tensor:
    return weight.new_empty(weight.shape)


mask_by_labels = register("mask_by_labels", _mask_by_labels, _fake_mask_by_labels)


def _label_gradient(
    grad: torch.Tensor,
    weight: torch.Tensor,
    logits: torch.Tensor,
    in_labels: torch.Tensor,
    out_labels: torch.Tensor,
    of_outputs: bool,
    winner: bool,
) -> torch.Tensor:
    """∂L/∂logits of the outputs' side, or of the inputs'."""
    weight = _check_mask(weight, in_labels, out_labels)
    grad, logits = grad.contiguous(), logits.contiguous()
    sides = (out_labels, in_labels) if of_outputs else (in_labels, out_labels)
    row_labels, column_labels = sides
    if grad.shape != weight.shape or logits.shape[0] != row_labels.numel():
        raise RuntimeError(
            f"grad has shape {list(grad.shape)} and logits {list(logits.shape)}; expected "
            f"{list(weight.shape)} and [{row_labels.numel()}, groups]"
        )
    out = torch.empty_like(logits)
    if out.numel() == 0:
        return out
    taps = _taps(weight)
    strides = (weight.shape[1] * taps, taps)
    row_stride, column_stride = strides if of_outputs else strides[::-1]
    settings = {
        "grad": grad,
        "weight": weight,
        "logits": logits,
        "row_labels": row_labels,
        "column_labels": column_labels,
        "out": out,
        "row_count": row_labels.numel(),
        "column_count": column_labels.numel(),
        "groups": logits.shape[1],
        "row_stride": row_stride,
        "column_stride": column_stride,
        "TAPS": taps,
        "WINNER": winner,
        "LARGE": weight.numel() > _LARGEST,
        "ROWS": _ROWS,
        "COLUMNS": _COLUMNS,
        "GROUPS": max(16, triton.next_power_of_2(logits.shape[1])),
    }
    grid = (triton.cdiv(row_labels.numel(), _ROWS),)
    launch_kernel(kernels.label_gradient, grid, weight, settings)
    return out


def _fake_label_gradient(
    grad: torch.Tensor,
    weight: torch.Tensor,
    logits: torch.Tensor,
    in_labels: torch.Tensor,
    out_labels: torch.Tensor,
    of_outputs: bool,
    winner: bool,
) -> torch.Tensor:
    return logits.new_empty(logits.shape)


label_gradient = register("label_gradient", _label_gradient, _fake_label_gradient)


def _check_gates(gates: torch.Tensor, digits: torch.Tensor) -> torch.Tensor:
    if digits.dtype != torch.int32 or digits.shape != (gates.numel(), 3):
        raise RuntimeError(
            f"digits is {digits.dtype} {list(digits.shape)}; expected int32 [{gates.numel()}, 3]"
        )
    return gates.contiguous()


def _gate_labels(
    gates: torch.Tensor, digits: torch.Tensor, channels: int, of_outputs: bool
) -> torch.Tensor:
    gates = _check_gates(gates, digits)
    out = _fake_gate_labels(gates, digits, channels, of_outputs)
    settings = {
        "gates": gates,
        "digits": digits,
        "out": out,
        "count": channels,
        "SIDE": int(of_outputs),
        "GATES": gates.numel(),
        "BLOCK": _BLOCK,
    }
    launch_kernel(kernels.gate_labels, (triton.cdiv(channels, _BLOCK),), out, settings)
    return out


def _fake_gate_labels(
    gates: torch.Tensor, digits: torch.Tensor, channels: int, of_outputs: bool
) -> torch.Tensor:
    return gates.new_empty(channels, dtype=torch.int32)


gate_labels = register("gate_labels", _gate_labels, _fake_gate_labels)


def _gate_gradient(
    grad: torch.Tensor, weight: torch.Tensor, gates: torch.Tensor, digits: torch.Tensor
) -> torch.Tensor:
    gates = _check_gates(gates, digits)
    if grad.shape != weight.shape or weight.dim() < 2:
        raise RuntimeError(f"grad has shape {list(grad.shape)}; expected {list(weight.shape)}")
    grad, weight = grad.contiguous(), weight.contiguous()
    outs, ins = weight.shape[:2]
    column_blocks = triton.cdiv(ins, _COLUMNS)
    programs = triton.cdiv(outs, _ROWS) * column_blocks
    partial = weight.new_empty((programs, gates.numel()), dtype=torch.float32)
    if partial.numel() == 0:
        return weight.new_zeros(gates.shape, dtype=torch.float32)
    settings = {
        "grad": grad,
        "weight": weight,
        "gates": gates,
        "digits": digits,
        "partial": partial,
        "out_channels": outs,
        "in_channels": ins,
        "column_blocks": column_blocks,
        "TAPS": _taps(weight),
        "GATES": gates.numel(),
        "LARGE": weight.numel() > _LARGEST,
        "ROWS": _ROWS,
        "COLUMNS": _COLUMNS,
    }
    launch_kernel(kernels.gate_gradient, (programs,), weight, settings)
    return partial.sum(0)


def _fake_gate_gradient(
    grad: torch.Tensor, weight: torch.Tensor, gates: torch.Tensor, digits: torch.Tensor
) -> torch.Tensor:
    return weight.new_empty(gates.shape, dtype=torch.float32)


gate_gradient = register("gate_gradient", _gate_gradient, _fake_gate_gradient)
