"""Weights in the order of the kernels that multiply by them, kept from call to call.

A kernel that wants a weight in another order brings it there in every call, in one pass. Where a
network only runs, that can be done once: :func:`keep_weights` says in how much memory. Nothing is
kept before it is called.
"""

from __future__ import annotations

import math
from functools import cache
from typing import NamedTuple

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

from . import _ops

__all__ = ["KeptWeights", "keep_weights", "kept_weights"]


class KeptWeights(NamedTuple):
    """What is kept, and how much it was used.

    Attributes:
        bytes: The memory that it takes.
        hits: How often a kernel found its weight there since :func:`keep_weights`.
        misses: How often it looked and did not.
    """

    bytes: int
    hits: int
    misses: int


def keep_weights(megabytes: float) -> None:
    """Keep weights as the CPU's kernels want them, in up to ``megabytes`` of memory; 0 drops all.

    For the forward pass of layers whose weights rest: results are the same bits, and calls on small
    maps take a little less time. What is kept serves the same part of the same storage as long as
    torch counts no change of it. Seen are ``copy_``, ``load_state_dict``, assignments of ``.data``
    and every operation in place; and since torch's fused optimizers count nothing, a step of any
    ``torch.optim.Optimizer`` drops all. **Not seen** is what else torch does not count: writes
    through ``weight.data``, NumPy, or another process; and whoever hands ``weight.data`` to a
    convolution hands over a count that begins anew. After those, call this function with 0, then
    as before.

    What is kept holds the weight's own storage as well, until the weight has changed when it is
    used next, others need the room and it was not used for longest, or all is dropped. Small parts
    of a large storage are not kept; nor are weights made in inference mode, which torch does not
    count at all. Weights made anew for every call, as under autocast, and networks that do not fit
    lose a little.

    Args:
        megabytes: For all threads of the process together, in units of 2²⁰ bytes.

    Raises:
        RuntimeError: The native library, which keeps them, is not there.
    """
    if isinstance(megabytes, bool) or not isinstance(megabytes, (int, float)):
        raise TypeError(f"megabytes must be a number, got {megabytes!r}")
    if not (math.isfinite(megabytes) and 0 <= megabytes < 2**40):
        raise ValueError(f"megabytes is {megabytes}; expected 0 to 2⁴⁰")
    _require_library()
    _drop_after_optimizers()
    torch.ops.groupconv.keep_weights.default(int(megabytes * 2**20))


def kept_weights() -> KeptWeights:
    """What :func:`keep_weights` has kept so far.

    Raises:
        RuntimeError: The native library is not there.
    """
    _require_library()
    return KeptWeights(*torch.ops.groupconv.kept_weights.default())


@cache
def _drop_after_optimizers() -> None:
    """From now on; the fused ones do not count their steps as changes."""
    register_optimizer_step_post_hook(lambda *_: torch.ops.groupconv.drop_kept_weights.default())


def _require_library() -> None:
    if _ops.unavailable is not None:
        raise RuntimeError(_ops.unavailable)
