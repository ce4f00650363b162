"""Three times of one call: with a cold L2 cache, with a warm one, replayed from a CUDA graph.

- **cold**: before every sample a buffer larger than the cache is overwritten, and the device kept
  busy until the whole call has been launched; what a layer costs in a network whose other layers
  have used the cache and keep the device ahead of Python.
- **warm**: calls in a row on the same tensors. On a small layer this times the cache.
- **graph**: replays of a captured call, without the cost of launching it from Python; warm too.

Cold samples are interleaved: a round takes one of every contender, and each round begins with
another one. Times come from events on the device; on the CPU from the wall clock, and without
graphs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median, quantiles
from time import perf_counter
from typing import Any

import torch

__all__ = ["Clock", "Times"]

Call = Callable[[], object]

_HEAD_START = 2_000_000
"""Cycles, about a millisecond: longer than Python takes to launch a training step of a layer."""


@dataclass(frozen=True)
class Times:
    """Microseconds a call."""

    cold: float
    cold_lower: float
    cold_upper: float
    warm: float
    graph: float | None
    why_no_graph: str  # empty where there is one


@dataclass(frozen=True)
class Clock:
    """How a device is timed."""

    device: torch.device
    rounds: int = 11
    warm_up: int = 3
    warm_calls: int = 20
    flush_bytes: int = 256 << 20  # several times the L2 cache of any GPU so far

    def time(self, calls: Mapping[str, Call]) -> dict[str, Times]:
        """All three times of every call."""
        for call in calls.values():
            for _ in range(self.warm_up):
                call()
        cold = self._cold(calls)
        found = {}
        for name, call in calls.items():
            samples = cold[name]
            lower, _, upper = quantiles(samples, n=4, method="inclusive")
            graph, why_not = self._graph(call)
            found[name] = Times(median(samples), lower, upper, self._warm(call), graph, why_not)
        return found

    def _cold(self, calls: Mapping[str, Call]) -> dict[str, list[float]]:
        waste = torch.empty(self.flush_bytes // 4, device=self.device)
        names = list(calls)
        samples: dict[str, list[float]] = {name: [] for name in names}
        for index in range(self.rounds):
            start = index % len(names)
            for name in names[start:] + names[:start]:
                waste.zero_()
                if self.device.type == "cuda":
                    torch.cuda._sleep(_HEAD_START)  # type: ignore[no-untyped-call]
                samples[name].append(self._once(calls[name], 1))
        return samples

    def _warm(self, call: Call) -> float:
        return median(self._once(call, self.warm_calls) for _ in range(3))

    def _graph(self, call: Call) -> tuple[float | None, str]:
        if self.device.type != "cuda":
            return None, "CUDA graphs need a GPU"
        try:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                call()
            graph.replay()
            time = median(self._once(graph.replay, self.warm_calls) for _ in range(3))
        except RuntimeError as error:  # a contender that cannot be captured loses nothing else
            torch.cuda.synchronize(self.device)
            return None, f"cannot be captured: {str(error).splitlines()[0]}"
        return time, ""

    def _once(self, call: Call, count: int) -> float:
        """Microseconds a call, over ``count`` in a row."""
        if self.device.type != "cuda":
            start = perf_counter()
            for _ in range(count):
                call()
            return (perf_counter() - start) / count * 1e6
        begin: Any = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        end: Any = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        begin.record()
        for _ in range(count):
            call()
        end.record()
        end.synchronize()
        milliseconds: float = begin.elapsed_time(end)
        return milliseconds / count * 1e3
