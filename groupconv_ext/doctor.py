"""What is installed here, what was built into it, what this machine can run, and why.

The first thing to send with a bug report: ``groupconv doctor``, or ``print(gc.doctor())``.
"""

from __future__ import annotations

import os
import platform
from contextlib import suppress
from importlib import import_module, metadata
from pathlib import Path
from types import ModuleType

import numpy as np
import torch

from . import _ops, backends

__all__ = ["doctor", "native_library"]

Section = dict[str, str]

_introspect: ModuleType | None = None
with suppress(ImportError):  # an installation without the native part
    _introspect = import_module("groupconv_ext._introspect")


def doctor() -> str:
    """A report on versions, the native build, the processor, CUDA and the backends."""
    introspect, why_not = _introspection()
    sections = {
        "versions": _versions(),
        "native library": _native_library(introspect, why_not),
        "CPU": _cpu(introspect),
        "CUDA": _cuda(introspect),
        "backends, for float32": _backends(),
    }
    width = max(len(label) for section in sections.values() for label in section)
    lines = []
    for title, section in sections.items():
        lines += [title, *(f"  {label:{width}}  {text}" for label, text in section.items())]
    return "\n".join(lines)


def native_library() -> Path:
    """The shared library of the operations and kernels, which needs PyTorch's and no Python.

    A process that loads it (``torch.ops.load_library``; ``dlopen`` in C++) can run exported and
    packaged networks; importing this package does that.

    Raises:
        RuntimeError: It was not built into this installation, or cannot be loaded.
    """
    if _ops.unavailable is not None:
        raise RuntimeError(_ops.unavailable)
    return _ops.LIBRARY


def _introspection() -> tuple[ModuleType | None, str]:
    """The introspection module, connected to the loaded op library, or the reason why not."""
    if _ops.unavailable is not None:
        return None, _ops.unavailable
    if _introspect is None:
        return None, "the introspection module was not built into this installation"
    _introspect.attach(str(_ops.LIBRARY))
    return _introspect, ""


def _versions() -> Section:
    return {
        "groupconv-ext": f"{metadata.version('groupconv-ext')} in {Path(__file__).parent}",
        "torch": torch.__version__,
        "numpy": np.__version__,
        "Triton": _triton(),
        "python": f"{platform.python_version()} ({platform.python_implementation()})",
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
    }


def _triton() -> str:
    try:
        return metadata.version("triton")
    except metadata.PackageNotFoundError:
        return "not installed: pip install 'groupconv-ext[triton]'"


def _native_library(introspect: ModuleType | None, why_not: str) -> Section:
    if introspect is None:
        return {"loaded": f"no: {why_not}"}
    build = introspect.build_info()
    section = {
        "loaded": f"yes, {_ops.LIBRARY}",
        "compiler": f"{build['compiler']}, {build['flags']}",
        "torch headers": f"{build['torch']} (the library runs in torch 2.11 and later)",
        "kernels": f"{len(introspect.kernel_list())} in {build['instruction_sets']}",
    }
    if build["sanitizers"]:
        section["sanitizers"] = build["sanitizers"]
    return section


def _cpu(introspect: ModuleType | None) -> Section:
    section = {}
    if introspect is not None:
        name = introspect.isa_name() or "none"
        section["instruction set"] = f"{name}: {introspect.isa_reason()}"
        features = introspect.cpu_features()
        section["present"] = " ".join(name for name, here in features.items() if here) or "none"
        section["missing"] = " ".join(name for name, here in features.items() if not here) or "none"
    section["GROUPCONV_ISA"] = os.environ.get("GROUPCONV_ISA", "not set")
    section["threads"] = f"{torch.get_num_threads()} of {os.cpu_count()} processors"
    return section


def _cuda(introspect: ModuleType | None) -> Section:
    """Each link of the chain that must hold before a CUDA kernel can run."""
    built = introspect is not None and introspect.build_info()["cuda"]
    if introspect is not None and built:
        architectures = introspect.build_info()["cuda_architectures"]
        kernels = f"built by nvcc {built} for {architectures}"
    else:
        kernels = "not built: there was no nvcc, or GROUPCONV_CUDA=OFF"
    section = {"kernels": kernels}
    if torch.version.cuda is None:
        section["torch"] = "built without CUDA"
        return section
    section["torch"] = f"built with CUDA {torch.version.cuda}"
    count = torch.cuda.device_count()
    if count == 0:
        section["device"] = "none visible"
    for index in range(count):
        properties = torch.cuda.get_device_properties(index)
        capability = f"sm_{properties.major}{properties.minor}"
        memory = f"{properties.total_memory / 2**30:.0f} GiB"
        section[f"device {index}"] = f"{properties.name}, {capability}, {memory}"
    return section


def _backends() -> Section:
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    section = {}
    for device in devices:
        for name, reason in backends.explain(device, torch.float32).items():
            label = name if len(devices) == 1 else f"{name} ({device})"
            section[label] = "yes" if reason is None else f"no: it {reason}"
    return section
