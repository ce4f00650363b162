"""The machine under this very run: how fast it multiplies, and how fast it copies.

Absolute times mean little on a processor that shares its clock and caches with strangers, so each
run measures its own two limits, and reports times as shares of them. The FMA peak comes from a
native loop of independent multiply-adds in registers, in the instruction set that the kernels use.
"""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from time import perf_counter

import torch

from groupconv_ext import _ops
from groupconv_ext.backends.devices import cpu_model

try:
    from groupconv_ext import _introspect
except ImportError:
    HAVE_INTROSPECT = False
else:
    HAVE_INTROSPECT = _ops.unavailable is None

_CPU = Path("/sys/devices/system/cpu/cpu0/cache")
_TYPICAL_CACHES = {"L2": 1 << 20, "L3": 32 << 20}


@dataclass(frozen=True)
class Level:
    """A level of memory: how much it holds (None for main memory), and its copy bandwidth."""

    name: str
    capacity: int | None
    bytes_per_second: float


@dataclass(frozen=True)
class Machine:
    """What a problem's floor is computed from."""

    cpu: str
    threads: int
    flops_per_second: float
    levels: tuple[Level, ...]  # from the smallest; the last is main memory

    @classmethod
    def measure(cls, threads: int) -> Machine:
        """A second or so of measuring, with ``threads`` threads."""
        return cls(
            cpu=cpu_model(),
            threads=threads,
            flops_per_second=max(fma_peak(0.02, threads) for _ in range(5)),
            levels=tuple(_levels()),
        )

    def level_for(self, size: int) -> Level:
        """The smallest level that holds ``size`` bytes, where repeated calls find their data."""
        fitting = (level for level in self.levels if level.capacity and size <= level.capacity)
        return next(fitting, self.levels[-1])


def fma_peak(seconds: float, threads: int = 1, dtype: torch.dtype = torch.float32) -> float:
    """Floating-point operations a second at the FMA peak, summed over ``threads`` at once.

    Of bfloat16 that of the instructions that multiply it here: its own, or those of float32.
    """

    def one_thread(_: int) -> float:
        return 1e9 * float(torch.ops.groupconv.fma_peak(seconds, dtype == torch.bfloat16))

    if threads == 1:
        return one_thread(0)
    with ThreadPoolExecutor(threads) as pool:
        return sum(pool.map(one_thread, range(threads)))


def conditions(threads: int) -> dict[str, str]:
    """Everything a reader needs to know about a run that the rows do not say."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "cpu": cpu_model(),
        "cores": str(os.cpu_count()),
        "threads": str(threads),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "vendor library": _vendor_library(),
        **_native_build(),
    }


def _native_build() -> dict[str, str]:
    """Our version, and the instruction set: by choice, or because GROUPCONV_ISA said so."""
    if not HAVE_INTROSPECT:
        return {"groupconv-ext": "without its native modules", "instruction set": "unknown"}
    _introspect.attach(str(_ops.LIBRARY))
    isa = f"{_introspect.isa_name()}: {_introspect.isa_reason()}"
    return {"groupconv-ext": _introspect.build_info()["version"], "instruction set": isa}


def _vendor_library() -> str:
    found = re.search(r"MKL-DNN v([\d.]+)", torch.__config__.show())
    return f"oneDNN {found[1]}" if found else "none"


def cache_sizes() -> dict[str, int]:
    """Bytes of the caches beyond the first level; typical ones where the system does not say."""
    sizes = {}
    for index in sorted(_CPU.glob("index*")):
        level = int((index / "level").read_text())
        found = re.match(r"(\d+)K", (index / "size").read_text())
        if level > 1 and found:
            sizes[f"L{level}"] = int(found[1]) << 10
    return sizes or _TYPICAL_CACHES


def _levels() -> Iterable[Level]:
    caches = cache_sizes()
    for name, capacity in caches.items():
        yield Level(name, capacity, copy_bandwidth(capacity // 2))
    beyond = min(4 * max(caches.values()), 1 << 30)
    yield Level("DRAM", None, copy_bandwidth(beyond))


def copy_bandwidth(footprint: int) -> float:
    """Bytes read plus bytes written a second, copying one half of ``footprint`` to the other.

    The time to copy one element is taken off, because a call costs as much as moving tens of
    kilobytes within a cache.
    """
    elements = footprint // 2 // torch.float32.itemsize
    source, target = torch.ones(elements), torch.empty(elements)
    one, other = torch.ones(1), torch.ones(1)
    overhead = _least_seconds(lambda: one.copy_(other), 2000)
    seconds = _least_seconds(lambda: target.copy_(source), max(1, (64 << 20) // footprint))
    return footprint / max(seconds - overhead, seconds / 2)


def _least_seconds(call: Callable[[], object], count: int) -> float:
    """Seconds a call in the best of several samples: a limit is what nothing disturbed."""
    times = []
    for _ in range(8):
        start = perf_counter()
        for _ in range(count):
            call()
        times.append((perf_counter() - start) / count)
    return min(times)
