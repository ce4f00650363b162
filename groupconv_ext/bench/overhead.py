"""What a call costs before any work is done: a layer of one pixel, beside ``F.conv2d`` itself.

Once with one group, where ``F.conv2d`` is at its leanest, and once with four, which it computes by
four convolutions and a concatenation.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn.functional import conv2d

from groupconv_ext import functional
from groupconv_ext.partition import Partition

from .timing import Plan, interleave

_CHANNELS = 32
GROUPS = (1, 4)


@dataclass(frozen=True)
class Overhead:
    """Microseconds of a call in one mode. A ratio above 1 means that ours takes longer."""

    mode: str
    groups: int
    ours_us: float
    theirs_us: float
    ratio: float


@dataclass(frozen=True)
class Pair:
    """Our call and PyTorch's on the same one-pixel layer, to be timed under ``inference``."""

    mode: str
    groups: int
    inference: bool
    ours: Callable[[], object]
    theirs: Callable[[], object]


def pairs(groups: int) -> tuple[Pair, ...]:
    """Every mode in which a layer is called."""
    partition = Partition.contiguous(_CHANNELS, _CHANNELS, groups)
    x = torch.ones(1, _CHANNELS, 1, 1)
    weight = torch.ones(_CHANNELS, _CHANNELS // groups, 1, 1)
    leaves = x.clone().requires_grad_(), weight.clone().requires_grad_()

    def ours(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return functional.conv2d(x, weight, partition=partition, backend="native")

    def theirs(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return conv2d(x, weight, groups=groups)

    def step(function: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> None:
        y = function(*leaves)
        torch.autograd.grad(y, leaves, y.detach())

    forward, both = "training, forward", "training, forward and backward"
    return (
        Pair("inference", groups, True, lambda: ours(x, weight), lambda: theirs(x, weight)),
        Pair(forward, groups, False, lambda: ours(*leaves), lambda: theirs(*leaves)),
        Pair(both, groups, False, lambda: step(ours), lambda: step(theirs)),
    )


def measure(plan: Plan) -> tuple[Overhead, ...]:
    """Time every pair, interleaved."""
    measured = []
    for pair in (pair for groups in GROUPS for pair in pairs(groups)):
        with torch.inference_mode(pair.inference):
            timings = interleave({"ours": pair.ours, "theirs": pair.theirs}, plan)
        ours, theirs = timings["ours"], timings["theirs"]
        measured.append(
            Overhead(
                mode=pair.mode,
                groups=pair.groups,
                ours_us=ours.median * 1e6,
                theirs_us=theirs.median * 1e6,
                ratio=ours.times_slower_than(theirs),
            )
        )
    return tuple(measured)
