"""What ``auto`` takes on a GPU, or wherever it may: what was measured once, or a measurement.

1. A kind of call that was measured before, on this machine, is answered by that
   (:mod:`.remembered`).
2. What was never measured is measured now, all capable backends in turn (:mod:`.measure`), and
   remembered; of a layer of several convolutions, the ways to compute it at once and one by one.
   Never while a CUDA graph is captured, inside function transforms, on stand-ins for
   tensors, or with ``GROUPCONV_MEASURE=off``: then the first of ``aten``, ``dense``, ``triton``,
   ``native`` that can serve the call does (on a CPU ``native`` is the first), and nothing is kept.

With ``GROUPCONV_MEASURE=all``, read when this package is imported, so on a CPU.

Under ``torch.compile``, where sizes may be symbols, it is the first of these as well. No table is
shipped: no kernel of this library was timed on any GPU, and a model of what it might reach is no
reason to take it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Sequence

import torch

from .measure import Operands, measure
from .registry import Backend, Question
from .remembered import Entry, Remembered, remembered, versions

__all__ = ["best", "best_way", "may_measure", "measured_devices", "unmeasured"]

_UNMEASURED = {"cpu": ("native", "aten", "dense"), "cuda": ("aten", "dense", "triton", "native")}

measured_devices = ("cpu", "cuda") if os.environ.get("GROUPCONV_MEASURE") == "all" else ("cuda",)
"""Where ``auto`` asks :func:`best`."""

_known: dict[tuple[str, Question], Backend] = {}
_known_ways: dict[tuple[str, str, Question], str] = {}


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
    fastest = _fastest(
        f"{device_name}; {versions()}; {question.text}",
        by_name,
        operands[0],
        lambda: measure(capable, operands, question.needs_grad),
        store,
    )
    if fastest is None:
        return by_name[unmeasured(tuple(by_name), operands[0].device.type)]
    _known[device_name, question] = by_name[fastest]
    return by_name[fastest]


def best_way(
    layer: str,
    question: Question,
    ways: Collection[str],
    x: torch.Tensor,
    times: Callable[[], dict[str, float]],
    device_name: str,
    store: Remembered | None = None,
) -> str | None:
    """The fastest of the ways to compute a layer, or ``None`` where nobody knows.

    ``question`` is that of one of its convolutions, which with the name of the layer says it all;
    ``times`` measures all the ways.
    """
    known = _known_ways.get((device_name, layer, question))
    if known is not None and known in ways:
        return known
    asked = f"{device_name}; {versions()}; {layer}: {question.text}"
    fastest = _fastest(asked, ways, x, times, store)
    if fastest is not None:
        _known_ways[device_name, layer, question] = fastest
    return fastest


def _fastest(
    asked: str,
    names: Collection[str],
    x: torch.Tensor,
    times: Callable[[], dict[str, float]],
    store: Remembered | None,
) -> str | None:
    """The remembered answer, or one measured now; none where nothing may be measured."""
    store = store or remembered()
    entry = store.get(asked)
    if entry is None or entry.chosen not in names:
        found = times() if may_measure(x) else {}
        if not found:
            return None
        entry = Entry(min(found, key=found.__getitem__), found)
        store.add(asked, entry)
    return entry.chosen


def unmeasured(capable: Sequence[str], device_type: str) -> str:
    """The backend where nothing was measured and nothing may be."""
    return next(name for name in _UNMEASURED[device_type] if name in capable)


def may_measure(x: torch.Tensor) -> bool:
    """Whether running other backends now would do no harm."""
    if os.environ.get("GROUPCONV_MEASURE", "on").lower() in ("off", "0", "no", "false"):
        return False
    if type(x) is not torch.Tensor:
        return False
    if torch._C._functorch.maybe_current_level() is not None:
        return False
    return not (x.is_cuda and torch.cuda.is_current_stream_capturing())
