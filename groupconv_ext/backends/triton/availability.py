"""Whether the Triton kernels can serve a call, and why not. Nothing here loads Triton."""

from __future__ import annotations

import os
from importlib.util import find_spec

import torch

from ..registry import Call

__all__ = ["INTERPRETED", "why_not"]

INTERPRETED = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")
"""Whether kernels are to run in Triton's interpreter; Triton itself looks when it is loaded."""

_HAVE_TRITON = find_spec("triton") is not None
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_LEAST_CAPABILITY = (8, 0)


def why_not(call: Call) -> str | None:
    """The reason why a call cannot be served, or ``None``."""
    if not _HAVE_TRITON:
        return "needs Triton, which is not installed: pip install 'groupconv-ext[triton]'"
    if call.forward_mode:
        return "has no derivatives in forward mode"
    if INTERPRETED and call.device_type not in ("cpu", "meta"):
        return (
            f"runs in Triton's interpreter, on the CPU, and not on {call.device_type}: "
            "TRITON_INTERPRET is set"
        )
    if not INTERPRETED and call.device_type != "cuda":
        return f"has no kernels for {call.device_type} devices"
    if call.dtype not in _DTYPES:
        return f"has no {call.dtype} kernels, only float32, float16 and bfloat16"
    return None if INTERPRETED else _why_no_gpu()


def _why_no_gpu() -> str | None:
    if torch.version.cuda is None:
        return "needs a PyTorch that was built with CUDA"
    if not torch.cuda.is_available():
        return "needs a GPU, and none is visible"
    found = torch.cuda.get_device_capability()
    if found < _LEAST_CAPABILITY:
        major, minor = found
        return f"needs a GPU of compute capability 8.0 or later; this one has {major}.{minor}"
    return None
