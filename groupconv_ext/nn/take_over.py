"""PyTorch's own convolutions and linear layers, on this library's kernels.

What is left of them in a network of groups is the first convolution, some dense 1×1 and the
classifier. As layers of this library they take a normalisation, an activation and a shortcut
inside (:func:`fold`), and their images stay in the network's layout.
"""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import nn

from ..functional import conv2d
from ..partition import Partition
from .partitioned import PartitionedConv1d, PartitionedConv2d
from .replace import substitute

__all__ = ["Linear", "take_over"]


class Linear(nn.Linear):
    """``nn.Linear`` as a pointwise convolution, whose pixels are the rows of ``x``."""

    def __init__(self, in_features: int, out_features: int, *args: Any, **kwargs: Any) -> None:
        """Take what ``nn.Linear`` takes."""
        super().__init__(in_features, out_features, *args, **kwargs)
        self._partition = Partition.contiguous(in_features, out_features, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Apply the layer to ``[..., in_features]``."""
        rows = x.reshape(-1, self.in_features)
        if rows.shape[0] == 0:
            return super().forward(x)
        # In channels_last an image lies as its pixels, one after another.
        image = rows.t()[None, :, None, :]
        weight = self.weight[:, :, None, None]
        y = conv2d(image, weight, self.bias, partition=self._partition)
        return y[0, :, 0].t().reshape(*x.shape[:-1], self.out_features)

    @classmethod
    def from_linear(cls, linear: nn.Linear) -> Self:
        """The same layer, with the same parameters."""
        layer = cls(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
        layer.weight, layer.bias = linear.weight, linear.bias
        return layer.train(linear.training)


def take_over(model: nn.Module) -> nn.Module:
    """Put this library's layers in the place of PyTorch's convolutions and linear ones, in place.

    For deployment on a CPU, before :func:`fold`. Convolutions of one and two dimensions, grouped
    or not, become partitioned ones; subclasses of PyTorch's layers stay as they are.

    Returns:
        ``model``, or, where that is such a layer itself, what stands for it.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is {model!r}; expected an nn.Module")
    found: dict[nn.Module, nn.Module] = {}
    for layer in model.modules():
        if type(layer) is nn.Conv2d:
            found[layer] = PartitionedConv2d.from_conv2d(layer)
        elif type(layer) is nn.Conv1d:
            found[layer] = PartitionedConv1d.from_conv1d(layer)
        elif type(layer) is nn.Linear:
            found[layer] = Linear.from_linear(layer)
    return substitute(model, found)
