"""What ``auto`` takes on a GPU: the table's answer, what was measured once, or a measurement.

1. A device that :mod:`.floors` has rates for is answered by them.
2. Anything else is answered by what was measured before, on this machine (:mod:`.remembered`).
3. What was never measured is measured now, all capable backends in turn (:mod:`.measure`), and
   remembered. Never while a CUDA graph is captured, inside function transforms, on stand-ins for
   tensors, or with ``GROUPCONV_MEASURE=off``: then the first of ``aten``, ``dense``, ``triton``,
   ``native`` that can serve the call does, and nothing is kept.

Under ``torch.compile``, where sizes may be symbols, the answer is that of the floors, whose order
does not depend on batch and image, and on devices without rates the first as above.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch

from ..partition import Partition
from ..window import Window
from .floors import order, rates_of
from .measure import Operands, measure
from .registry import Backend, Call, Question
from .remembered import Entry, Remembered, remembered, versions

__all__ = ["best", "may_measure", "without_sizes"]

_UNMEASURED = ("aten", "dense", "triton", "native")

_known: dict[tuple[str, Question], Backend] = {}


def best(
    question: Question,
    operands: Operands,
    capable: Sequence[Backend],
    device_name: str,
    store: Remembered | None = None,
) -> Backend:
    """The backend for a call, one of those that can serve it."""
    known = _known.get((device_name, question))
    if known is not None and known in capable:
        return known
    by_name = {backend.name: backend for backend in capable}
    rates = rates_of(device_name)
    if rates is not None:
        chosen = order(question, rates, _tf32(), tuple(by_name))[0]
    else:
        store = store or remembered()
        asked = f"{device_name}; {versions()}; {question.text}"
        entry = store.get(asked)
        if entry is None or entry.chosen not in by_name:
            times = {}
            if may_measure(operands[0]):
                times = measure(capable, operands, question.needs_grad)
            if not times:
                return by_name[_unmeasured(tuple(by_name))]
            entry = Entry(min(times, key=times.__getitem__), times)
            store.add(asked, entry)
        chosen = entry.chosen
    _known[device_name, question] = by_name[chosen]
    return by_name[chosen]


_NOMINAL = 56  # any size: all floors grow with the pixels alike


def without_sizes(
    device_name: str,
    capable: Sequence[str],
    call: Call,
    partition: Partition,
    kernel: tuple[int, int],
    window: Window,
) -> str:
    """The backend for a call of any batch and image."""
    rates = rates_of(device_name)
    if rates is None:
        return _unmeasured(capable)
    weight = torch.empty(partition.entries, *kernel, device="meta")
    x = torch.empty(1, partition.in_channels, _NOMINAL, _NOMINAL, dtype=call.dtype, device="meta")
    question = Question.of(x, weight, partition, window, call.needs_grad, call.prologue)
    return order(question, rates, _tf32(), tuple(capable))[0]


def _unmeasured(capable: Sequence[str]) -> str:
    return next(name for name in _UNMEASURED if name in capable)


def _tf32() -> bool:
    allowed: bool = torch.backends.cudnn.conv.fp32_precision == "tf32"  # type: ignore[attr-defined]
    return allowed


def may_measure(x: torch.Tensor) -> bool:
    """Whether running other backends now would do no harm."""
    if os.environ.get("GROUPCONV_MEASURE", "on").lower() in ("off", "0", "no", "false"):
        return False
    if type(x) is not torch.Tensor:
        return False
    if torch._C._functorch.maybe_current_level() is not None:
        return False
    return not (x.is_cuda and torch.cuda.is_current_stream_capturing())
