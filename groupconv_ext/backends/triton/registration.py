"""How a kernel becomes an operation that PyTorch knows, ``torch.ops.groupconv_triton``.

On a GPU it is a *triton op*: ``torch.compile`` looks inside and sees allocations and kernels. In
Triton's interpreter (``TRITON_INTERPRET=1``), where a kernel is a Python function that no compiler
can follow, it is an opaque operation with a fake kernel. Both run the same function.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.library import custom_op, triton_op, wrap_triton

from ..._ops import one_by_one
from .availability import INTERPRETED

__all__ = ["launch_kernel", "register"]


def register(name: str, function: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    """Register ``function``; ``fake`` gives its results without computing them."""
    qualified = f"groupconv_triton::{name}"
    op: Any
    if INTERPRETED:
        op = custom_op(qualified, function, mutates_args=())
        op.register_fake(fake)
    else:
        op = triton_op(qualified, function, mutates_args=())

    def batch(info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
        return one_by_one(op, info.batch_size, in_dims, args)

    op.register_vmap(batch)
    return op


def launch_kernel(
    kernel: Any, grid: tuple[int, ...], x: torch.Tensor, settings: dict[str, Any]
) -> None:
    """Run ``kernel`` on the device of ``x``, which need not be the current one."""
    launched = kernel if INTERPRETED else wrap_triton(kernel)  # torch 2.11 wraps compiled ones only
    if x.is_cuda and type(x) is torch.Tensor and x.device.index != torch.cuda.current_device():
        with torch.cuda.device(x.device):
            launched[grid](**settings)
    else:
        launched[grid](**settings)
