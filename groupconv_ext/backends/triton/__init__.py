"""Triton kernels: the same convolutions for GPUs, in a language that ``torch.compile`` can read.

- ``availability``: whether they can run here, and why not
- ``planner``: the work list of a partition, in plain numpy
- ``tuning``: what a kernel may be launched with
- ``convolve_kernels``, ``gradient_kernels``, ``single_kernels`` (one column a row, depthwise),
  ``mask_kernels`` (learned masks): the kernels; ``tiles``: what those of convolutions share
- ``registration``, ``ops``, ``mask_ops``: the kernels as operations of PyTorch
- ``chain_kernels``, ``chain_ops``, ``chain_operations``: the same of a chain of pointwise stages
- ``operations``, ``labelled``: those as autograd and the layers call them

Triton is an extra. Without it, without a GPU of compute capability 8.0 or later, or with a dtype
that the matrix units do not take, the backend refuses with that reason. With ``TRITON_INTERPRET=1``
in the environment the kernels run on the CPU, in Triton's interpreter: slow, and for tests.
"""

from __future__ import annotations

import torch

from ...autograd import FUSED_IN_TRAINING, convolve, wants_grad
from ...partition import Partition
from ...prologue import Prologue, convolve_after
from ...reference import activations
from ...window import Window
from ..registry import Backend
from .availability import why_not
from .chain_operations import chain, chain_input_grad, has_input_grad
from .labelled import TRITON_LABELLED
from .operations import TRITON_OPERATIONS, TUNED, load

__all__ = [
    "TRITON",
    "TRITON_LABELLED",
    "TRITON_OPERATIONS",
    "TUNED",
    "chain",
    "chain_input_grad",
    "has_input_grad",
    "load",
]


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
    load()
    operands = (x, weight, bias, residual, partition, window)
    parameters = () if prologue is None else (prologue.scale, prologue.shift)
    fused = activation in FUSED_IN_TRAINING or not wants_grad(*operands[:4], *parameters)
    inside = activation if fused else "none"
    if prologue is None:
        y = convolve(*operands, inside, TRITON_OPERATIONS)
    else:
        y = convolve_after(prologue, *operands, inside, TRITON_OPERATIONS)
    return y if fused else activations[activation](y)


TRITON = Backend("triton", why_not, _convolve)
