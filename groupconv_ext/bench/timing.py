"""Interleaved timing: every contender in every round, so that a slow moment falls on all of them.

One sample is enough calls in a row to last well over the clock's resolution. A round takes one
sample of each contender, and each round starts with another one. Times are medians over rounds;
ratios are taken within a round first, and their median is reported.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median, quantiles
from time import perf_counter


@dataclass(frozen=True)
class Timing:
    """Seconds a call took, one sample a round, and how many calls made up a sample."""

    samples: tuple[float, ...]
    calls: int

    @property
    def median(self) -> float:
        """The middle sample."""
        return median(self.samples)

    @property
    def quartiles(self) -> tuple[float, float]:
        """The lower and the upper quartile: half of the samples lie between them."""
        if len(self.samples) < 2:
            return self.samples[0], self.samples[0]
        lower, _, upper = quantiles(self.samples, n=4, method="inclusive")
        return lower, upper

    def times_slower_than(self, other: Timing) -> float:
        """The median over rounds of this time over the other's in the same round."""
        pairs = zip(self.samples, other.samples, strict=True)
        return median(mine / theirs for mine, theirs in pairs)


@dataclass(frozen=True)
class Plan:
    """How long to measure: a budget for one problem, held between two numbers of rounds."""

    seconds: float = 0.75
    least_rounds: int = 5
    most_rounds: int = 31
    sample_seconds: float = 3e-4

    def rounds(self, round_seconds: float) -> int:
        """As many rounds as the budget buys, odd so that the median is a sample."""
        affordable = int(self.seconds / round_seconds)
        return max(self.least_rounds, min(self.most_rounds, affordable)) | 1


# A call shorter than this is repeated once untimed before each sample, because the contender
# before it has left its own data in the caches; for a longer one that no longer shows.
_WARM_BELOW_SECONDS = 5e-3


def interleave(
    calls: Mapping[str, Callable[[], object]],
    plan: Plan,
    *,
    after_round: Callable[[], object] = lambda: None,
    clock: Callable[[], float] = perf_counter,
) -> dict[str, Timing]:
    """Time all ``calls`` round-robin: name → Timing, all with the same number of rounds."""
    lengths = {name: _calibrate(call, plan.sample_seconds, clock) for name, call in calls.items()}
    round_seconds = sum(count * seconds for count, seconds in lengths.values())
    samples: dict[str, list[float]] = {name: [] for name in calls}
    names = list(calls)
    with _no_garbage_collection():
        for round_index in range(plan.rounds(round_seconds)):
            start = round_index % len(names)
            for name in names[start:] + names[:start]:
                count, seconds = lengths[name]
                if seconds < _WARM_BELOW_SECONDS:
                    calls[name]()
                samples[name].append(_sample(calls[name], count, clock))
            after_round()
    return {name: Timing(tuple(samples[name]), lengths[name][0]) for name in names}


def _calibrate(
    call: Callable[[], object], sample_seconds: float, clock: Callable[[], float]
) -> tuple[int, float]:
    """Warm a contender up, and return how many calls fill a sample and the seconds of one.

    The count doubles until a sample is long enough, so that what the first calls set up (memory,
    caches of prepared weights, threads) is over before anything counts.
    """
    call()
    count = 1
    while (seconds := _sample(call, count, clock)) * count < sample_seconds:
        count *= 2
    return max(1, math.ceil(sample_seconds / seconds)), seconds


def _sample(call: Callable[[], object], count: int, clock: Callable[[], float]) -> float:
    """Seconds a call, over ``count`` calls in a row."""
    start = clock()
    for _ in range(count):
        call()
    return (clock() - start) / count


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """No collector pauses inside samples; whatever waits is collected before and after."""
    gc.collect()
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
