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

    Tensors are kept as attributes, one for each device, and not in a dictionary: a tracer reads an
    attribute when it gets there and a dictionary only once.
    """

    def __init__(self, make: Callable[[], npt.NDArray[np.generic]]) -> None:
        self._make = make

    def kept(self, device: torch.device) -> torch.Tensor | None:
        """The tensor on ``device``, if there is one already."""
        tensor: torch.Tensor | None = getattr(self, _attribute(device), None)
        return tensor

    def on(self, device: torch.device) -> torch.Tensor:
        """The tensor on ``device``."""
        tensor = self.kept(device)
        if tensor is None:
            # A tensor born in inference mode could never be saved for a backward pass.
            with torch.inference_mode(False):
                # from_dlpack, unlike from_numpy, is invisible to tracers and transforms.
                tensor = from_dlpack(self._make())
                if device.type != "cpu":
                    tensor = tensor.to(device)
            # The name says where it is: "cuda" without an index may be another device tomorrow.
            if _is_real(tensor):
                setattr(self, _attribute(tensor.device), tensor)
        return tensor


def _attribute(device: torch.device) -> str:
    return f"on_{device}"


def _is_real(tensor: torch.Tensor) -> bool:
    """Whether this is the data itself and not a tracer's or a transform's stand-in for it."""
    try:
        if type(tensor) is not torch.Tensor:
            return False
        return tensor.data_ptr() != 0 or tensor.numel() == 0 or tensor.is_meta
    except RuntimeError:
        return False
