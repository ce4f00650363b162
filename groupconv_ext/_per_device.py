"""Index tensors that are made once and kept on every device that asks for them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.dlpack import from_dlpack


class PerDevice:
    """An array, made when it is first needed, as a tensor on any device.

    It may be asked for anywhere and outlives the place: under a tracer, inside a function
    transform such as ``torch.func.grad``, in inference mode. So nothing of these may stick to it.
    """

    def __init__(self, make: Callable[[], npt.NDArray[np.generic]]) -> None:
        self._make = make
        self._tensors: dict[torch.device, torch.Tensor] = {}

    def on(self, device: torch.device) -> torch.Tensor:
        """The tensor on ``device``."""
        tensor = self._tensors.get(device)
        if tensor is None:
            # A tensor born in inference mode could never be saved for a backward pass.
            with torch.inference_mode(False):
                # from_dlpack, unlike from_numpy, is invisible to tracers and transforms.
                tensor = from_dlpack(self._make())
                if device.type != "cpu":
                    tensor = tensor.to(device)
            # The key is where it is: "cuda" without an index may be another device tomorrow.
            if _is_real(tensor):
                self._tensors[tensor.device] = tensor
        return tensor


def _is_real(tensor: torch.Tensor) -> bool:
    """Whether this is the data itself and not a tracer's or a transform's stand-in for it."""
    try:
        return type(tensor) is torch.Tensor and tensor.data_ptr() != 0
    except RuntimeError:
        return False
