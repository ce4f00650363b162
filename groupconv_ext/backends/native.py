"""The library's own kernels."""

from __future__ import annotations

import torch

from .. import _ops
from ..autograd import FUSED_IN_TRAINING, convolve, wants_grad
from ..partition import Partition
from ..prologue import Prologue, convolve_after
from ..reference import activations
from ..window import Window
from .registry import Backend, Call

__all__ = ["NATIVE"]

_CPU_DTYPES = (torch.float32, torch.bfloat16, torch.float64)
_CUDA_DTYPES = (*_CPU_DTYPES, torch.float16)
_OLDEST_GPU = (8, 0)


def _why_not(call: Call) -> str | None:
    if _ops.unavailable is not None:
        return f"is missing: {_ops.unavailable}"
    device, dtype, _, forward_mode, _ = call
    if forward_mode:
        return "has no derivatives in forward mode"
    if device in ("cpu", "meta"):
        if dtype not in _CPU_DTYPES:
            return f"has no {dtype} kernels for the CPU, only float32, bfloat16 and float64"
        return None
    if device != "cuda":
        return f"has no kernels for {device} devices"
    if not _ops.has_cuda_kernels:
        return "was built without CUDA (nvcc was not found, or GROUPCONV_CUDA=OFF)"
    if dtype not in _CUDA_DTYPES:
        return f"has no {dtype} kernels for CUDA"
    if torch.cuda.is_available() and torch.cuda.get_device_capability() < _OLDEST_GPU:
        major, minor = torch.cuda.get_device_capability()
        return f"needs a GPU of compute capability 8.0 or later, this one has {major}.{minor}"
    return None


def _convolve(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    partition: Partition,
    window: Window,
    activation: str,
    prologue: Prologue | None = None,
) -> torch.Tensor:
    if prologue is not None:
        return _after(prologue, x, weight, bias, residual, partition, window, activation)
    if activation in FUSED_IN_TRAINING or not wants_grad(x, weight, bias, residual):
        return convolve(x, weight, bias, residual, partition, window, activation)
    y = convolve(x, weight, bias, residual, partition, window, "none")
    return activations[activation](y)


def _after(
    prologue: Prologue,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    partition: Partition,
    window: Window,
    activation: str,
) -> torch.Tensor:
    operands = (prologue, x, weight, bias, residual, partition, window)
    parameters = prologue.scale, prologue.shift
    if activation in FUSED_IN_TRAINING or not wants_grad(x, weight, bias, residual, *parameters):
        return convolve_after(*operands, activation)
    return activations[activation](convolve_after(*operands, "none"))


NATIVE = Backend("native", _why_not, _convolve, checks_operands=True)
