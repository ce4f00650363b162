"""What FLGC's and DGConv's layers share: a dense weight of which a mask selects blocks."""

from __future__ import annotations

import math
from typing import Any, Self

import torch
from torch import nn

from .._checks import count
from ..functional import conv2d
from ..learned import BACKENDS, check_option, check_tensor, packed_weight
from ..partition import Partition
from ..window import IntOrPair, Padding
from ._learned import GroupedLayer
from .partitioned import (
    ConvArguments,
    PartitionedConv1d,
    PartitionedConv2d,
    dense_layer,
    packed_layer,
)

__all__ = ["DenselyTrained"]


class DenselyTrained(ConvArguments, GroupedLayer):
    """A convolution with a dense weight ``[N, C, *kernel]`` under a mask of groups.

    While it learns, subclasses convolve (`_convolve`) and choose the groups (`_chosen`); once it
    is frozen the groups are a constant and the gradient of the weight is that of the selected
    blocks, zero elsewhere.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None
    _kept: Partition | None

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: IntOrPair,
        stride: IntOrPair,
        padding: Padding,
        dilation: IntOrPair,
        bias: bool,
        padding_mode: str,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
        backend: str,
    ) -> None:
        super().__init__()
        self.in_channels = count("in_channels", in_channels)
        self.out_channels = count("out_channels", out_channels)
        self._keep_arguments(kernel_size, stride, padding, dilation, padding_mode)
        check_option("backend", backend, BACKENDS)
        self.backend = backend
        self._kept = None
        self.weight = nn.Parameter(
            torch.empty(out_channels, in_channels, *self.kernel_size, device=device, dtype=dtype)
        )
        self.register_parameter(
            "bias",
            nn.Parameter(torch.empty(out_channels, device=device, dtype=dtype)) if bias else None,
        )

    def _start(self, fan_in: float) -> None:
        """Weight and bias as ``nn.Conv`` starts a layer whose outputs read ``fan_in`` channels."""
        bound = 1 / math.sqrt(max(fan_in, 1.0) * math.prod(self.kernel_size))
        with torch.no_grad():
            self.weight.uniform_(-bound, bound)
            if self.bias is not None:
                self.bias.uniform_(-bound, bound)

    @classmethod
    def _from_conv(cls, conv: Any, **options: Any) -> Self:
        layer: Self = dense_layer(cls, conv, **options)
        return layer

    # ---- what a method has to say ---------------------------------------------------------------

    def _chosen(self) -> Partition:
        raise NotImplementedError

    def _convolve(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        stride: IntOrPair,
        padding: Padding,
        dilation: IntOrPair,
    ) -> torch.Tensor:
        raise NotImplementedError

    def _description(self) -> str:
        return f"{type(self).__name__}({self.in_channels}, {self.out_channels})"

    # ---- the layer ------------------------------------------------------------------------------

    def partition(self) -> Partition:
        """The groups that a forward pass would use now."""
        return self._chosen() if self._kept is None else self._kept

    def freeze_structure(self) -> None:
        """Keep the groups of now; the structure's parameters stop learning. For good."""
        self._kept = self.partition()
        super().freeze_structure()

    def _resume(self, frozen: bool) -> None:
        super()._resume(frozen)
        # The parameters have been loaded already.
        self._kept = self._chosen() if self._frozen and not self.weight.is_meta else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Convolve ``x`` in the groups of now."""
        check_tensor(x)
        x, padding = self._padded(x)
        weight: torch.Tensor = self.weight
        stride, dilation = self.stride, self.dilation
        if self.dimensions == 1:
            if x.dim() not in (2, 3):
                raise ValueError(f"x has shape {list(x.shape)}; expected [B, C, L] or [C, L]")
            x, weight = x.unsqueeze(-2), weight.unsqueeze(-2)
            stride, dilation = (1, _across(stride)), (1, _across(dilation))
            padding = padding if isinstance(padding, str) else (0, _across(padding))
        if self._frozen:
            y = self._convolve_frozen(x, weight, stride, padding, dilation)
        else:
            y = self._convolve(x, weight, stride, padding, dilation)
        return y.squeeze(-2) if self.dimensions == 1 else y

    def _convolve_frozen(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        stride: IntOrPair,
        padding: Padding,
        dilation: IntOrPair,
    ) -> torch.Tensor:
        partition = self.partition()
        packed = packed_weight(weight, partition, x, self.backend)
        return conv2d(
            x,
            packed,
            self.bias,
            partition=partition,
            stride=stride,
            padding=padding,
            dilation=dilation,
            backend=self.backend,
        )

    def deployed(self) -> PartitionedConv1d | PartitionedConv2d:
        """The same function with given groups and a packed weight."""
        if self.dimensions == 1:
            return packed_layer(PartitionedConv1d, self, self.partition(), self.weight)
        return packed_layer(PartitionedConv2d, self, self.partition(), self.weight)

    def to_empty(self, *, device: torch.device | str | int | None, recurse: bool = True) -> Self:
        """As ``nn.Module``; groups that were kept for other values are forgotten."""
        self._kept = None
        return super().to_empty(device=device, recurse=recurse)

    def extra_repr(self) -> str:
        """The arguments, and whether the groups still change."""
        parts = [str(self.in_channels), str(self.out_channels), *self._said_arguments()]
        if self._frozen:
            parts.append("frozen")
        return ", ".join(parts)


def _across(value: IntOrPair) -> int:
    """The one number that a layer of one dimension has."""
    return value if isinstance(value, int) else value[0]
