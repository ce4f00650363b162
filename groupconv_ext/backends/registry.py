"""A backend is data: a name, a function, and a predicate that answers with a reason."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch

from .._layout import is_channels_last
from ..partition import Partition
from ..prologue import Prologue
from ..window import Window

__all__ = ["Backend", "Call", "Question"]


class Call(NamedTuple):
    """What a predicate may look at."""

    device_type: str
    dtype: torch.dtype
    needs_grad: bool
    forward_mode: bool = False  # inside torch.func.jvp, jacfwd, hessian
    prologue: bool = False


class Question(NamedTuple):
    """What the time of a call depends on: shapes, layout, and how the groups lie."""

    dtype: torch.dtype
    needs_grad: bool
    prologue: bool
    channels_last: bool
    batch: int
    in_channels: int
    height: int
    width: int
    out_channels: int
    groups: int
    entries: int
    widest: tuple[int, int]
    is_even: bool
    is_contiguous: bool
    has_overlap: bool
    kernel: tuple[int, int]
    window: Window

    @classmethod
    def of(
        cls,
        x: torch.Tensor,
        weight: torch.Tensor,
        partition: Partition,
        window: Window,
        needs_grad: bool,
        prologue: bool,
    ) -> Question:
        """The question that a call asks."""
        batch, channels, height, width = x.shape
        return cls(
            x.dtype,
            needs_grad,
            prologue,
            is_channels_last(x),
            batch,
            channels,
            height,
            width,
            partition.out_channels,
            partition.groups,
            partition.entries,
            partition.widest,
            partition.is_even,
            partition.is_contiguous,
            partition.has_overlap,
            (weight.shape[1], weight.shape[2]),
            window,
        )

    @property
    def out_size(self) -> tuple[int, int]:
        """Height and width of the output."""
        return self.window.output_size(self.height, self.width, *self.kernel)

    @property
    def text(self) -> str:
        """The question in words that a person can read, and no two questions share."""
        fields = self._replace(window=tuple(self.window))._asdict().items()  # type: ignore[arg-type]
        return ", ".join(f"{name} {value}" for name, value in fields)


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
