"""Timing backends on the very operands of a call: once, when nobody knows which is the fastest."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from statistics import median
from time import perf_counter
from typing import Any

import torch

from ..partition import Partition
from ..prologue import Prologue
from ..window import Window
from .registry import Backend

__all__ = ["Operands", "measure", "measure_calls", "milliseconds"]

_WARM_UP = 3
_SAMPLES = 7

Operands = tuple[
    torch.Tensor,
    torch.Tensor,
    torch.Tensor | None,
    torch.Tensor | None,
    Partition,
    Window,
    str,
    Prologue | None,
]


def measure(
    candidates: Sequence[Backend], operands: Operands, needs_grad: bool
) -> dict[str, float]:
    """Microseconds of every candidate that could compute the call; a failure is told and left out.

    The operands are copied out of the autograd graph: nothing of the caller's is touched.
    """
    calls = {backend.name: _call(backend, operands, needs_grad) for backend in candidates}
    return measure_calls(calls, operands[0].device)


def measure_calls(
    calls: Mapping[str, Callable[[], object]], device: torch.device
) -> dict[str, float]:
    """Microseconds of every call that does not fail."""
    times = {}
    for name, call in calls.items():
        try:
            times[name] = 1e3 * milliseconds(call, device)
        except torch.OutOfMemoryError:
            continue  # it may be the fastest, but not here
        except RuntimeError as error:
            warnings.warn(
                f"backend {name!r} failed while it was measured and is left out: {error}",
                RuntimeWarning,
                stacklevel=3,
            )
    return times


def _call(backend: Backend, operands: Operands, needs_grad: bool) -> Callable[[], object]:
    x, weight, bias, residual, partition, window, activation, prologue = operands

    def leaf(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.detach().requires_grad_(needs_grad)

    def optional(tensor: torch.Tensor | None) -> torch.Tensor | None:
        return None if tensor is None else leaf(tensor)

    images = (leaf(x), leaf(weight), optional(bias), optional(residual))
    before = None
    if prologue is not None:
        before = Prologue(optional(prologue.scale), optional(prologue.shift), prologue.activation)

    def call() -> None:
        with torch.set_grad_enabled(needs_grad):
            y = backend.convolve(*images, partition, window, activation, before)
            if needs_grad:
                wanted = [t for t in images if t is not None]
                torch.autograd.grad(y, wanted, torch.ones_like(y))

    return call


def milliseconds(call: Callable[[], object], device: torch.device) -> float:
    """The median time of a call, warm."""
    for _ in range(_WARM_UP):
        call()
    if device.type != "cuda":
        samples = []
        for _ in range(_SAMPLES):
            start = perf_counter()
            call()
            samples.append(1e3 * (perf_counter() - start))
        return median(samples)
    pairs: list[list[Any]] = [
        [torch.cuda.Event(enable_timing=True) for _ in range(2)]  # type: ignore[no-untyped-call]
        for _ in range(_SAMPLES)
    ]
    with torch.cuda.device(device):
        for begin, end in pairs:
            begin.record()
            call()
            end.record()
        torch.cuda.synchronize(device)
    times: list[float] = [begin.elapsed_time(end) for begin, end in pairs]
    return median(times)
