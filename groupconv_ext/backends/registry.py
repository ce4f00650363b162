"""A backend is data: a name, a function, and a predicate that answers with a reason."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch

from ..partition import Partition
from ..prologue import Prologue
from ..window import Window

__all__ = ["Backend", "Call"]


class Call(NamedTuple):
    """What a predicate may look at."""

    device_type: str
    dtype: torch.dtype
    needs_grad: bool
    forward_mode: bool = False  # inside torch.func.jvp, jacfwd, hessian
    prologue: bool = False


class Convolve(Protocol):
    """``activation(conv(prologue(x)) + bias + residual)``, weight packed, ``[entries, kh, kw]``."""

    def __call__(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        residual: torch.Tensor | None,
        partition: Partition,
        window: Window,
        activation: str,
        prologue: Prologue | None = None,
    ) -> torch.Tensor: ...


@dataclass(frozen=True)
class Backend:
    """One way to compute a partitioned convolution.

    Attributes:
        name: What users ask for.
        why_not: The reason why it cannot serve a call, or ``None`` where it can.
        convolve: The computation, differentiable.
        checks_operands: It refuses operands that do not fit together with a ``RuntimeError``,
            before anything is written.
    """

    name: str
    why_not: Callable[[Call], str | None]
    convolve: Convolve
    checks_operands: bool = False
