"""What this device can do at most, measured in this very run, and the conditions of the run.

The limits are a large copy, counting bytes read and written, and a large matrix product of random
numbers through the vendor's library (on zeros it may run faster). The device's clocks and power are
read and never set.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from time import perf_counter
from typing import Any

import torch

from groupconv_ext import _ops
from groupconv_ext.backends.devices import cpu_model

from ..problems import DTYPES

__all__ = ["Limits", "conditions", "device_name", "measure_limits"]

_SMI_FIELDS = (
    *("name", "driver_version", "clocks.sm", "clocks.mem", "clocks.max.sm"),
    *("temperature.gpu", "power.draw", "power.limit", "memory.total"),
)


@dataclass(frozen=True)
class Limits:
    """Bytes a second, and floating-point operations a second for each dtype."""

    memory: float
    rates: Mapping[str, float]

    def rate(self, dtype: str) -> float:
        """The rate of matrix products in a dtype."""
        return self.rates[dtype]


def measure_limits(device: torch.device) -> Limits:
    """A large copy, and a large matrix product in every dtype; float32 in IEEE arithmetic."""
    on_gpu = device.type == "cuda"
    count = (2 << 30 if on_gpu else 4 << 20) // 4
    seconds = _copy_seconds(count, device)
    rates: dict[str, float] = {}
    for name, dtype in DTYPES.items():
        size = (8192 if dtype != torch.float32 else 4096) if on_gpu else 128
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        product = torch.empty_like(a)
        rates[name] = 2 * size**3 / _least_seconds(_product(a, b, product), device)
    return Limits(8 * count / seconds, rates)


def _copy_seconds(count: int, device: torch.device) -> float:
    source, target = torch.rand(count, device=device), torch.empty(count, device=device)
    return _least_seconds(lambda: target.copy_(source), device)


def _product(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor) -> Callable[[], object]:
    return lambda: torch.mm(a, b, out=out)


def _least_seconds(call: Callable[[], object], device: torch.device) -> float:
    """The best of a few samples of five calls: a limit is what nothing disturbed."""
    times = []
    for _ in range(6):
        _wait(device)
        start = perf_counter()
        for _ in range(5):
            call()
        _wait(device)
        times.append((perf_counter() - start) / 5)
    return min(times)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def device_name(device: torch.device) -> str:
    """The device's name as its driver gives it."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_model()


def conditions(device: torch.device) -> dict[str, str]:
    """Everything a reader needs to know about a run that the rows do not say."""
    cudnn: Any = torch.backends.cudnn
    found = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": device_name(device),
        "processor": f"{cpu_model()}, {os.cpu_count()} cores",
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "CUDA of torch": str(torch.version.cuda or "none"),
        "cuDNN": str(cudnn.version() or "none"),
        "triton": _version("triton"),
        "native library": _ops.unavailable or "loaded",
        "float32": "IEEE arithmetic for all (TF32 off)",
    }
    if device.type == "cuda":
        properties: Any = torch.cuda.get_device_properties(device)
        found["multiprocessors"] = str(properties.multi_processor_count)
        found["compute capability"] = f"{properties.major}.{properties.minor}"
        found["L2 cache"] = f"{properties.L2_cache_size >> 20} MiB"
        found |= _smi()
    return found


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "none"


def _smi() -> dict[str, str]:
    """Driver, clocks, temperature and power at this moment; asked, never set."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return {"nvidia-smi": "not there"}
    command = [program, f"--query-gpu={','.join(_SMI_FIELDS)}", "--format=csv,noheader", "-i", "0"]
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        return {"nvidia-smi": f"failed: {error}"}
    values = [value.strip() for value in run.stdout.splitlines()[0].split(",")]
    return {f"nvidia-smi {k}": v for k, v in zip(_SMI_FIELDS, values, strict=False)}
