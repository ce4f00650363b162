"""What devices are called, where times that were measured on them are kept."""

from __future__ import annotations

import os
import platform
import re
from functools import cache
from pathlib import Path

import torch

__all__ = ["cpu_model", "device_name"]


def device_name(device: torch.device) -> str:
    """A device, with what its times depend on: of a processor the threads and instruction set."""
    if device.type == "cuda":
        return _gpu_name(device)
    isa = os.environ.get("GROUPCONV_ISA", "auto")
    return f"{cpu_model()}, {torch.get_num_threads()} threads, instruction set {isa}"


@cache
def _gpu_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device)


@cache
def cpu_model() -> str:
    """The processor's name as the system gives it."""
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.*)", info.read_text()) if info.exists() else None
    return found[1].strip() if found else platform.processor() or platform.machine()
