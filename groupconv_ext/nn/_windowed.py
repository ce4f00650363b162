"""What the layers with parts of a fixed structure share: a window, parameters, a backend's name."""

from __future__ import annotations

import torch
from torch import nn

from ..backends import names
from .partitioned import ConvArguments

__all__ = ["ParameterFactory", "Windowed", "check_backend"]


def check_backend(backend: str) -> None:
    """Refuse a name that no backend has."""
    if backend not in ("auto", *names()):
        raise ValueError(f"backend is {backend!r}; expected 'auto' or one of {names()}")


class ParameterFactory:
    """Makes the parameters of a layer, all on its device and of its dtype."""

    def __init__(self, device: torch.device | str | None, dtype: torch.dtype | None) -> None:
        self._device = device
        self._dtype = dtype

    def __call__(self, *sizes: int) -> nn.Parameter:
        """An empty parameter."""
        return nn.Parameter(torch.empty(sizes, device=self._device, dtype=self._dtype))


class Windowed(ConvArguments, nn.Module):
    """A layer over images with a sliding window and an optional bias."""

    dimensions = 2
    bias: nn.Parameter | None

    def _describe(self, *parts: str) -> str:
        """``extra_repr``: its own parts, then what of the window is not the default."""
        return ", ".join([*parts, *self._said_arguments()])
