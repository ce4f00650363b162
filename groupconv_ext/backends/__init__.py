"""Ways to compute a partitioned convolution, and the choice among them.

=============  ======================================================================
``native``     this library's kernels, in C++ and CUDA
``triton``     its Triton kernels
``aten``       ``index_select`` → ``F.conv2d(groups=G)`` → ``index_select``
``dense``      the weight expanded with zeros, through ``F.conv2d``
``reference``  a loop over the groups in plain PyTorch
=============  ======================================================================

``auto`` takes the first that can serve the call: on the CPU in the order above; on other devices
``aten`` first. A backend asked for by name runs or raises with its reason; nothing is replaced
silently. :func:`explain` tells what each would say, :func:`choose` which one runs.
"""

from __future__ import annotations

import torch

from .aten import ATEN
from .dense import DENSE
from .native import NATIVE
from .oracle import REFERENCE
from .registry import Backend, Call
from .triton import TRITON

__all__ = ["Backend", "BackendError", "Call", "choose", "explain", "names"]

_BACKENDS = {backend.name: backend for backend in (NATIVE, TRITON, ATEN, DENSE, REFERENCE)}
_AUTO_ON_CPU = (NATIVE, ATEN)
_AUTO_ELSEWHERE = (ATEN,)


class BackendError(RuntimeError):
    """A backend was asked for by name and cannot serve the call."""


def names() -> tuple[str, ...]:
    """What the ``backend`` argument accepts besides ``"auto"``."""
    return tuple(_BACKENDS)


def choose(backend: str, call: Call) -> Backend:
    """The backend that serves the call, or an error with the reason why none does."""
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


def explain(
    device_type: str, dtype: torch.dtype, *, needs_grad: bool = False, prologue: bool = False
) -> dict[str, str | None]:
    """For every backend the reason why it cannot serve such a call, or ``None`` where it can."""
    call = Call(device_type, dtype, needs_grad, prologue=prologue)
    return {name: backend.why_not(call) for name, backend in _BACKENDS.items()}
