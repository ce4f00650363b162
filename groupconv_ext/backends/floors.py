"""Which backend comes first by the floors alone: a model, not a measurement.

A convolution takes at least as long as its multiply-adds over the rate of the unit that does them,
and at least as long as its bytes over the bandwidth of memory. What distinguishes the backends is
how often they pass over memory, and how much they multiply::

    native, triton   x once, y once               the connections
    aten             each permuted side again,    the connections
                     read and written
    dense            x once, y once               all of outputs × inputs

The rates below are those of the H200 and the H100, from data sheets and from copies and products
that were timed there; **no kernel of this library was timed on either**. Which kernel comes nearer
to its floor is not known to this table, and so equal floors go to the vendor's library.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from .registry import Question

__all__ = ["RATES", "Rates", "floors", "order", "rates_of"]


class Rates(NamedTuple):
    """Bytes and floating-point operations a second."""

    memory: float
    half: float  # float16 and bfloat16, on matrix units
    single: float  # float32 in IEEE arithmetic
    tf32: float


RATES: dict[str, Rates] = {
    "NVIDIA H200": Rates(4.3e12, 600e12, 67e12, 300e12),
    "NVIDIA H100": Rates(3.0e12, 600e12, 67e12, 300e12),
}
"""By the beginning of the device's name."""

VENDOR_MARGIN = 1.25
"""What has to be gained by the floors before a kernel of ours is preferred to the vendor's."""


def rates_of(device_name: str) -> Rates | None:
    """The rates of a device that the table has."""
    return next((r for name, r in RATES.items() if device_name.startswith(name)), None)


def floors(question: Question, rates: Rates, tf32: bool) -> dict[str, float]:
    """Seconds that each way takes at the very least."""
    size = question.dtype.itemsize
    height, width = question.out_size
    batch, channels = question.batch, question.in_channels
    source = batch * channels * question.height * question.width * size
    result = batch * question.out_channels * height * width * size
    passes = 3 if question.needs_grad else 1
    single = rates.tf32 if tf32 else rates.single
    rate = single if question.dtype == torch.float32 else rates.half
    work = 2 * batch * height * width * question.kernel[0] * question.kernel[1] * passes / rate

    own = max((source + result) * passes / rates.memory, question.entries * work)
    moved = 0 if question.is_contiguous else 2 * (source + result) * passes / rates.memory
    return {
        "native": own,
        "triton": own,
        # Ragged groups are as many calls, which small ones cannot fill a GPU with.
        "aten": (own if question.is_even else question.groups * own) + moved,
        "dense": max(
            (source + result) * passes / rates.memory,
            question.out_channels * channels * work,
        ),
    }


def order(question: Question, rates: Rates, tf32: bool, capable: Sequence[str]) -> tuple[str, ...]:
    """The backends that can serve the call, the best first."""
    found = floors(question, rates, tf32)

    def rank(name: str) -> tuple[float, int]:
        vendor = name in ("aten", "dense")
        return found[name] * (1 if vendor else VENDOR_MARGIN), capable.index(name)

    return tuple(sorted(capable, key=rank))
