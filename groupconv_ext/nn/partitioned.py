"""Convolution layers over a given Partition: ``nn.Conv2d`` and ``nn.Conv1d`` with any groups.

    y[outputs_g] = W_g * x[inputs_g] + bias[outputs_g]        for every group g

``weight`` is packed, ``[entries, *kernel]``, so a layer has the parameters and the multiply-adds
of its connections and no others.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Self, TypeVar

import torch
from torch import nn
from torch.nn import functional

from ..autograd import ACTIVATIONS
from ..backends import names
from ..functional import conv1d, conv2d
from ..partition import Partition
from ..prologue import Prologue
from ..window import IntOrPair, Padding, Window, make_window

__all__ = ["PartitionedConv1d", "PartitionedConv2d"]

_PADDING_MODES = ("zeros", "reflect", "replicate", "circular")


class ConvArguments:
    """``nn.Conv``'s arguments about the window, kept by a layer of one or two dimensions."""

    dimensions: int
    kernel_size: tuple[int, ...]
    stride: IntOrPair
    padding: Padding
    dilation: IntOrPair
    padding_mode: str
    bias: nn.Parameter | None

    def _keep_arguments(
        self,
        kernel_size: IntOrPair,
        stride: IntOrPair,
        padding: Padding,
        dilation: IntOrPair,
        padding_mode: str,
    ) -> None:
        if padding_mode not in _PADDING_MODES:
            raise ValueError(f"padding_mode is {padding_mode!r}; expected one of {_PADDING_MODES}")
        self.kernel_size = self._tuple(kernel_size)
        self.stride = stride
        self.padding = padding
        self.dilation = dilation
        self.padding_mode = padding_mode
        self._window()  # refuses a bad stride, padding or dilation now and not at the first call

    def _tuple(self, size: IntOrPair) -> tuple[int, ...]:
        sizes = tuple(size) if isinstance(size, Sequence) else (size,) * self.dimensions
        if len(sizes) != self.dimensions or not all(isinstance(s, int) for s in sizes):
            raise ValueError(f"kernel_size is {size}; expected an int or {self.dimensions} of them")
        return sizes

    def _window(self) -> Window:
        for name in ("stride", "padding", "dilation"):
            value = getattr(self, name)
            if isinstance(value, (tuple, list)) and len(value) not in (1, self.dimensions):
                raise TypeError(
                    f"{name} is {value}; expected an int or a sequence of {self.dimensions}"
                )
        *above, across = self.kernel_size
        return make_window(
            above[0] if above else 1, across, self.stride, self.padding, self.dilation
        )

    def _padded(self, x: torch.Tensor) -> tuple[torch.Tensor, Padding]:
        """The input, and the padding that is left for the convolution to do."""
        if self.padding_mode == "zeros":
            return x, self.padding
        top, bottom, left, right = self._window().padding
        pads = (left, right, top, bottom)[: 2 * self.dimensions]
        return functional.pad(x, pads, mode=self.padding_mode), 0

    def _said_arguments(self) -> list[str]:
        """Those that are not the usual ones, as ``extra_repr`` says them."""
        parts = [f"kernel_size={self.kernel_size}"]
        for name, default in (("stride", 1), ("padding", 0), ("dilation", 1)):
            if getattr(self, name) not in (default, (default,) * self.dimensions):
                parts.append(f"{name}={getattr(self, name)}")
        if self.bias is None:
            parts.append("bias=False")
        if self.padding_mode != "zeros":
            parts.append(f"padding_mode={self.padding_mode!r}")
        return parts


class _PartitionedConv(ConvArguments, nn.Module):
    """What the layers of every dimension share: parameters, their start, and their state.

    A checkpoint holds the partition beside the weight, whose meaning it is; loading one adopts
    the saved partition. The weight of an ``nn.Conv`` with as many even groups loads as it is.
    """

    partition: Partition
    weight: nn.Parameter
    bias: nn.Parameter | None

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: IntOrPair,
        stride: IntOrPair = 1,
        padding: Padding = 0,
        dilation: IntOrPair = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        partition: Partition | None = None,
        activation: str | None = None,
        backend: str = "auto",
    ) -> None:
        """Take ``nn.Conv``'s arguments in its order, then the library's own.

        Args:
            in_channels: As in ``nn.Conv2d``, like everything up to ``dtype``.
            out_channels: See ``in_channels``.
            kernel_size: See ``in_channels``.
            stride: See ``in_channels``.
            padding: See ``in_channels``.
            dilation: See ``in_channels``.
            groups: Contiguous even groups; left at 1 where ``partition`` is given.
            bias: See ``in_channels``.
            padding_mode: See ``in_channels``.
            device: See ``in_channels``.
            dtype: See ``in_channels``.
            partition: Any groups; default ``Partition.contiguous(…, groups)``.
            activation: Fused into the convolution: ``"relu"``, ``"relu6"``, ``"silu"``,
                ``"hardswish"`` or ``None``.
            backend: ``"auto"`` or a name of :func:`groupconv_ext.backends.names`.
        """
        super().__init__()
        if partition is None:
            partition = Partition.contiguous(in_channels, out_channels, groups)
        elif not isinstance(partition, Partition):
            raise TypeError(f"partition is {partition!r}; expected a groupconv_ext.Partition")
        elif groups not in (1, partition.groups):
            raise ValueError(f"groups = {groups} contradicts {partition}; pass only the partition")
        if (in_channels, out_channels) != (partition.in_channels, partition.out_channels):
            raise ValueError(
                f"in_channels, out_channels = {in_channels}, {out_channels}; "
                f"expected those of {partition}"
            )
        if activation not in (None, *ACTIVATIONS):
            raise ValueError(f"activation is {activation!r}; expected None or one of {ACTIVATIONS}")
        if backend not in ("auto", *names()):
            raise ValueError(f"backend is {backend!r}; expected 'auto' or one of {names()}")
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.partition = partition
        self._keep_arguments(kernel_size, stride, padding, dilation, padding_mode)
        self.activation = activation
        self.backend = backend
        self.weight = nn.Parameter(
            torch.empty(partition.entries, *self.kernel_size, device=device, dtype=dtype)
        )
        self.register_parameter(
            "bias",
            nn.Parameter(torch.empty(out_channels, device=device, dtype=dtype)) if bias else None,
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start every group as ``nn.Conv`` would start a layer of the group's size."""
        area = math.prod(self.kernel_size)
        start = 0
        with torch.no_grad():
            if self.partition.is_even:  # all groups alike, and often there are thousands
                _, ins = self.partition.sizes[0]
                bound = 1 / math.sqrt(ins * area) if ins else 0.0
                self.weight.uniform_(-bound, bound)
                if self.bias is not None:
                    self.bias.uniform_(-bound, bound)
                return
            for outputs, (outs, ins) in zip(
                self.partition.outputs, self.partition.sizes, strict=True
            ):
                bound = 1 / math.sqrt(ins * area) if ins else 0.0
                self.weight[start : start + outs * ins].uniform_(-bound, bound)
                start += outs * ins
                if self.bias is not None and outs:
                    index = torch.tensor(outputs, device=self.bias.device)
                    values = torch.empty_like(self.bias[:outs]).uniform_(-bound, bound)
                    self.bias.index_copy_(0, index, values)

    @classmethod
    def _from_conv(cls, conv: Any, partition: Partition | None, **options: Any) -> Self:
        original = Partition.contiguous(conv.in_channels, conv.out_channels, conv.groups)
        chosen = original if partition is None else partition
        return packed_layer(cls, conv, chosen, original.unpack(conv.weight), **options)

    # ---- state --------------------------------------------------------------------------------

    def get_extra_state(self) -> torch.Tensor:
        """The partition, as the tensor that kernels read: safe to load with ``weights_only``."""
        return self.partition.cpu_table.clone()

    def set_extra_state(self, state: torch.Tensor) -> None:
        """Adopt the partition of a checkpoint."""
        self.partition = self._checked(state)

    def _checked(self, state: torch.Tensor) -> Partition:
        loaded = Partition.from_table(state)
        if loaded.sizes != self.partition.sizes or loaded.in_channels != self.in_channels:
            raise ValueError(
                f"the checkpoint has {loaded}, this layer {self.partition}; build the layer with "
                "a partition of the same sizes"
            )
        return loaded

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        weight = state_dict.get(prefix + "weight")
        if isinstance(weight, torch.Tensor) and weight.dim() == 2 + self.dimensions:
            _, ins = self.partition.sizes[0]
            if self.partition.is_even and weight.shape[:2] == (self.out_channels, ins):
                state_dict[prefix + "weight"] = weight.flatten(0, 1)
        # Before anything is copied: a weight means nothing without its partition.
        self._checked(state_dict.setdefault(prefix + "_extra_state", self.get_extra_state()))
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def extra_repr(self) -> str:
        """The arguments, the partition in words."""
        parts = [f"{self.partition}", *self._said_arguments()]
        if self.activation is not None:
            parts.append(f"activation={self.activation!r}")
        return ", ".join(parts)


Layer = TypeVar("Layer", bound=_PartitionedConv)


def dense_layer(kind: Any, conv: Any, **options: Any) -> Any:
    """A layer with a dense weight, and the arguments, weight, bias and mode of ``conv``.

    Where ``conv`` has groups, the weight is zero outside of them. What does not learn goes on so.
    """
    layer = kind(
        conv.in_channels,
        conv.out_channels,
        conv.kernel_size,
        conv.stride,
        conv.padding,
        conv.dilation,
        bias=conv.bias is not None,
        padding_mode=conv.padding_mode,
        device=conv.weight.device,
        dtype=conv.weight.dtype,
        **options,
    )
    groups = Partition.contiguous(conv.in_channels, conv.out_channels, conv.groups)
    with torch.no_grad():
        layer.weight.copy_(groups.unpack(conv.weight))
        if conv.bias is not None:
            layer.bias.copy_(conv.bias)
    _learn_as(conv, layer)
    return layer


def packed_layer(
    kind: type[Layer], conv: Any, partition: Partition, dense: torch.Tensor, **options: Any
) -> Layer:
    """A layer with the arguments, the bias and the mode of ``conv`` over a dense weight, packed."""
    layer = kind(
        conv.in_channels,
        conv.out_channels,
        conv.kernel_size,
        conv.stride,
        conv.padding,
        conv.dilation,
        bias=conv.bias is not None,
        padding_mode=conv.padding_mode,
        device=conv.weight.device,
        dtype=conv.weight.dtype,
        partition=partition,
        **options,
    )
    with torch.no_grad():
        layer.weight.copy_(partition.pack(dense))
        if layer.bias is not None:
            layer.bias.copy_(conv.bias)
    _learn_as(conv, layer)
    return layer


def _learn_as(conv: Any, layer: Any) -> None:
    """What is not trained there is not trained here."""
    layer.weight.requires_grad_(conv.weight.requires_grad)
    if conv.bias is not None:
        layer.bias.requires_grad_(conv.bias.requires_grad)
    layer.train(conv.training)


class PartitionedConv2d(_PartitionedConv):
    """``nn.Conv2d`` over any Partition, on the fastest kernels that can run."""

    dimensions = 2

    def forward(
        self,
        x: torch.Tensor,
        residual: torch.Tensor | None = None,
        prologue: Prologue | None = None,
    ) -> torch.Tensor:
        """Convolve ``prologue(x)``; ``residual`` is added before the activation."""
        x, padding = self._padded(x)
        return conv2d(
            x,
            self.weight,
            self.bias,
            partition=self.partition,
            stride=self.stride,
            padding=padding,
            dilation=self.dilation,
            activation=self.activation,
            residual=residual,
            prologue=prologue,
            backend=self.backend,
        )

    @classmethod
    def from_conv2d(
        cls, conv: nn.Conv2d, partition: Partition | None = None, **options: Any
    ) -> Self:
        """The same layer, or, with a partition, the connections of it that the partition has."""
        return cls._from_conv(conv, partition, **options)


class PartitionedConv1d(_PartitionedConv):
    """``nn.Conv1d`` over any Partition, on the fastest kernels that can run."""

    dimensions = 1

    def forward(
        self,
        x: torch.Tensor,
        residual: torch.Tensor | None = None,
        prologue: Prologue | None = None,
    ) -> torch.Tensor:
        """Convolve ``prologue(x)``; ``residual`` is added before the activation."""
        x, padding = self._padded(x)
        return conv1d(
            x,
            self.weight,
            self.bias,
            partition=self.partition,
            stride=self.stride,
            padding=padding,
            dilation=self.dilation,
            activation=self.activation,
            residual=residual,
            prologue=prologue,
            backend=self.backend,
        )

    @classmethod
    def from_conv1d(
        cls, conv: nn.Conv1d, partition: Partition | None = None, **options: Any
    ) -> Self:
        """The same layer, or, with a partition, the connections of it that the partition has."""
        return cls._from_conv(conv, partition, **options)
