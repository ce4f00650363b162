"""What several of the networks are made of.

A network is some features, the mean over the image and a linear classifier (:class:`Network`).
Features are convolutions with a normalisation after (:func:`conv_norm`) or before
(:class:`NormConv`) them, alone or beside a shortcut (:class:`Residual`).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from ..nn import CondenseConv2d, PartitionedConv2d
from ..prologue import Prologue
from .convolutions import Convolution

__all__ = [
    "Flat",
    "Network",
    "NormConv",
    "Residual",
    "conv_norm",
    "first_strides",
    "last_convolution",
    "shortcut",
]

Activation = Callable[[], nn.Module]


class Network(nn.Module):
    """Features, the mean over the image, and a classifier.

    Attributes:
        features: From the image to the last channels.
        classifier: From their means to the classes.
        smallest_input: The side of the smallest image it takes: all its strides together.
    """

    def __init__(self, features: nn.Module, classifier: nn.Module, smallest_input: int) -> None:
        super().__init__()
        self.features = features
        self.classifier = classifier
        self.smallest_input = smallest_input

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Classify a batch of images ``[B, C, H, W]``."""
        if x.dim() != 4:
            raise ValueError(f"x has shape {list(x.shape)}; expected images [B, C, H, W]")
        height, width = x.shape[2:]
        if height < self.smallest_input or width < self.smallest_input:
            raise ValueError(
                f"x has images of {height} × {width}; expected at least {self.smallest_input} × "
                f"{self.smallest_input}, since the strides of this network multiply to that"
            )
        y: torch.Tensor = self.classifier(self.features(x).mean((2, 3)))
        return y


class Flat(nn.Module):
    """A pointwise convolution in the place of a classifier: over images of one pixel."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """From ``[B, C]`` to ``[B, classes]``."""
        y: torch.Tensor = self.layers(x[:, :, None, None])
        return y.flatten(1)


def conv_norm(conv: nn.Module, activation: Activation | None = nn.ReLU) -> nn.Sequential:
    """A convolution, batch normalisation and an activation."""
    layers: OrderedDict[str, nn.Module] = OrderedDict(conv=conv, norm=_norm(conv.out_channels))
    if activation is not None:
        layers["activation"] = activation()
    return nn.Sequential(layers)


def _norm(channels: Any) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels)


class NormConv(nn.Module):
    """Batch normalisation, ReLU and a convolution, as pre-activation networks have them.

    In evaluation the first two are computed while the convolution reads its input, where it is one
    that can (:class:`~groupconv_ext.Prologue`).
    """

    def __init__(self, conv: nn.Module) -> None:
        super().__init__()
        self.norm = _norm(conv.in_channels)
        self.conv = conv

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Apply all three."""
        if not self.norm.training and isinstance(self.conv, PartitionedConv2d | CondenseConv2d):
            y: torch.Tensor = self.conv(x, prologue=Prologue.from_batch_norm(self.norm))
        else:
            y = self.conv(self.activate(x))
        return y

    def activate(self, x: torch.Tensor) -> torch.Tensor:
        """Only normalisation and ReLU."""
        return functional.relu(self.norm(x), inplace=True)


class Residual(nn.Module):
    """``activation(body(x) + shortcut(x))``."""

    def __init__(
        self,
        body: nn.Module,
        shortcut: nn.Module | None = None,
        activation: Activation | None = nn.ReLU,
    ) -> None:
        super().__init__()
        self.body = body
        self.shortcut = nn.Identity() if shortcut is None else shortcut
        self.activation = nn.Identity() if activation is None else activation()
        self.last: nn.Module | None = None  # of the body, where it adds the shortcut by itself

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Apply the block."""
        y: torch.Tensor
        if self.last is not None:
            y = self.last(self.body(x), residual=self.shortcut(x))
            return y
        y = self.activation(self.body(x) + self.shortcut(x))
        return y

    def after_fold(self) -> None:
        """Let the body's last convolution add the shortcut and apply the activation."""
        fused = {nn.Identity: None, nn.ReLU: "relu"}
        if self.last is not None or type(self.activation) not in fused:
            return
        parent, last = last_convolution(self.body)
        if last is not None and last.activation is None:
            parent._modules.popitem()
            last.activation = fused[type(self.activation)]
            self.last, self.activation = last, nn.Identity()


def last_convolution(body: nn.Module) -> tuple[nn.Module, PartitionedConv2d | None]:
    """The convolution of this library that a body ends with, if it does, and what it stands in."""
    parent = body
    while isinstance(parent, nn.Sequential) and isinstance(parent[-1], nn.Sequential):
        parent = parent[-1]
    last = parent[-1] if isinstance(parent, nn.Sequential) else None
    return parent, last if isinstance(last, PartitionedConv2d) else None


def shortcut(
    convolution: Convolution, in_channels: int, out_channels: int, stride: int
) -> nn.Module | None:
    """A projection where the shapes differ: a pointwise convolution and a normalisation."""
    if stride == 1 and in_channels == out_channels:
        return None
    return conv_norm(convolution(in_channels, out_channels, 1, stride), None)


def first_strides(stride: int, repeats: int) -> Iterable[int]:
    """The strides of a stage: the first block's, then ones."""
    return (stride, *(1,) * (repeats - 1))
