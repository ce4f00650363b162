"""Ways to compute a partitioned convolution, and the choice among them.

=============  ======================================================================
``native``     this library's kernels, in C++ and CUDA
``triton``     its Triton kernels
``aten``       ``index_select`` → ``F.conv2d(groups=G)`` → ``index_select``
``dense``      the weight expanded with zeros, through ``F.conv2d``
``reference``  a loop over the groups in plain PyTorch
=============  ======================================================================

On the CPU ``auto`` takes the first of ``native``, ``aten`` and ``reference`` that can serve the
call. On a GPU, and with ``GROUPCONV_MEASURE=all`` on the CPU too, it takes what :mod:`.choice`
says: the answer of a measurement that is made once and kept on disk. Elsewhere it takes ``aten``.
A backend asked for by name runs or raises with its reason; nothing is replaced silently.
:func:`explain` tells what each would say, :func:`choose` which one runs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.compiler import is_compiling

from . import choice
from .aten import ATEN
from .dense import DENSE
from .devices import device_name
from .measure import Operands
from .native import NATIVE
from .oracle import REFERENCE
from .registry import Backend, Call, Question
from .triton import TRITON

__all__ = [
    "NATIVE",
    "Backend",
    "BackendError",
    "Call",
    "best",
    "choose",
    "device_name",
    "explain",
    "names",
]

_BACKENDS = {backend.name: backend for backend in (NATIVE, TRITON, ATEN, DENSE, REFERENCE)}
_AUTO_ON_CPU = (NATIVE, ATEN)
_AUTO_ELSEWHERE = (ATEN,)
_MEASURED = {"cpu": (NATIVE, ATEN, DENSE), "cuda": (NATIVE, TRITON, ATEN, DENSE)}


class BackendError(RuntimeError):
    """A backend was asked for by name and cannot serve the call."""


def names() -> tuple[str, ...]:
    """What the ``backend`` argument accepts besides ``"auto"``."""
    return tuple(_BACKENDS)


def choose(backend: str, call: Call) -> Backend:
    """The backend that serves the call, or an error with the reason why none does.

    For ``auto`` on a device where shapes decide, :func:`best` is to be asked.
    """
    if backend == "auto":
        order = _AUTO_ON_CPU if call.device_type in ("cpu", "meta") else _AUTO_ELSEWHERE
        for candidate in order:
            if candidate.why_not(call) is None:
                return candidate
        return REFERENCE
    chosen = _BACKENDS.get(backend)
    if chosen is None:
        raise ValueError(f"backend is {backend!r}; expected 'auto' or one of {list(_BACKENDS)}")
    reason = chosen.why_not(call)
    if reason is not None:
        raise BackendError(f"backend {backend!r} cannot run here: it {reason}")
    return chosen


def best(call: Call, operands: Operands) -> Backend:
    """The backend that ``auto`` takes for these operands on a device where it measures."""
    x, weight, _, _, partition, window, _, prologue = operands
    if is_compiling():
        return _BACKENDS[_traced(*call)]
    capable = _capable(call)
    if len(capable) == 1:
        return capable[0]
    question = Question.of(x, weight, partition, window, call.needs_grad, prologue is not None)
    return choice.best(question, operands, capable, device_name(x.device))


def _capable(call: Call) -> list[Backend]:
    return [backend for backend in _MEASURED[call.device_type] if backend.why_not(call) is None]


def _traced(*call: Any) -> str:
    """What ``auto`` takes in a graph, whose sizes may be symbols."""
    asked = Call(*call)
    return choice.unmeasured([backend.name for backend in _capable(asked)], asked.device_type)


# What torch.compiler.assume_constant_result does: called while a caller is traced, and not traced.
_traced._dynamo_marked_constant = True  # type: ignore[attr-defined]


def explain(
    device_type: str, dtype: torch.dtype, *, needs_grad: bool = False, prologue: bool = False
) -> dict[str, str | None]:
    """For every backend the reason why it cannot serve such a call, or ``None`` where it can."""
    call = Call(device_type, dtype, needs_grad, prologue=prologue)
    return {name: backend.why_not(call) for name, backend in _BACKENDS.items()}
