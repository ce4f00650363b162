"""A partitioned convolution in whole numbers, and a network that has them.

    x_q = clamp( round(x / scale_x) + zero_point_x, 0, 255 )
    y   = activation( scale_x · scale_w[n] · ( bias_q[n] + Σ w_q · (x_q − zero_point_x) ) )

:func:`quantize` looks at what a trained network's layers read and puts
:class:`QuantizedPartitionedConv2d` in their place. Where one such layer follows another in an
``nn.Sequential``, uint8 goes from one to the next; elsewhere a layer takes and returns float32, so
the network around it stays as it is.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from ..partition import Partition
from ..quantization import (
    QUANTIZED_ACTIVATIONS,
    Quantization,
    QuantizedWeight,
    prepare_weight,
    quantize_weight,
    quantized_conv2d,
)
from .partitioned import ConvArguments, PartitionedConv2d
from .replace import substitute

__all__ = ["QuantizedPartitionedConv2d", "quantize"]


class QuantizedPartitionedConv2d(ConvArguments, nn.Module):
    """A :class:`PartitionedConv2d` with int8 weights; for inference, on the CPU.

    Takes float32, or uint8 stored as ``read_as`` says; returns float32, or uint8 where
    ``write_as`` says how. A checkpoint holds the weight in the order of the partition, not of the
    kernels, with the partition and both quantisations beside it; loading one adopts them.
    """

    dimensions = 2
    partition: Partition
    read_as: Quantization
    write_as: Quantization | None
    weight: torch.Tensor
    scale: torch.Tensor
    bias: torch.Tensor | None  # type: ignore[assignment]
    packed: torch.Tensor
    start: torch.Tensor
    step: torch.Tensor

    def __init__(
        self,
        conv: PartitionedConv2d,
        read_as: Quantization,
        write_as: Quantization | None = None,
    ) -> None:
        """Quantise a layer.

        Args:
            conv: Deployed, in float; it is not changed.
            read_as: How the input is stored.
            write_as: How the output is stored as uint8; ``None``: it is float32.

        Raises:
            ValueError: The layer does what whole numbers cannot; the message says what.
        """
        super().__init__()
        reason = why_not(conv)
        if reason is not None:
            raise ValueError(f"{conv} cannot be quantised: it {reason}")
        check_stored(conv)
        self.in_channels = conv.in_channels
        self.out_channels = conv.out_channels
        self.partition = conv.partition
        self._keep_arguments(conv.kernel_size, conv.stride, conv.padding, conv.dilation, "zeros")
        self.activation = conv.activation
        self.read_as = read_as.checked("read_as")
        self.write_as = None if write_as is None else write_as.checked("write_as")
        with torch.no_grad():
            bias = None if conv.bias is None else conv.bias.detach().float().clone()
            weight, scale = quantize_weight(conv.weight, bias, conv.partition, read_as)
            prepared = prepare_weight(
                weight, scale, bias, partition=conv.partition, read_as=read_as
            )
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale)
        self.register_buffer("bias", bias)
        for name in ("packed", "start", "step"):  # made from the others
            self.register_buffer(name, None, persistent=False)
        self._adopt(prepared)

    def _adopt(self, prepared: QuantizedWeight) -> None:
        self.packed, self.start, self.step = prepared.packed, prepared.start, prepared.scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Convolve ``x``, float32 or uint8, ``[B, C, H, W]`` or ``[C, H, W]``."""
        if x.dim() == 3:
            y: torch.Tensor = self(x.unsqueeze(0))
            return y.squeeze(0)
        if x.dtype != torch.uint8:
            x = self.read_as.quantize(x)
        kernel_h, kernel_w = self.kernel_size
        return quantized_conv2d(
            x,
            QuantizedWeight(self.packed, self.start, self.step, (kernel_h, kernel_w), self.read_as),
            partition=self.partition,
            write_as=self.write_as,
            stride=self.stride,
            padding=self.padding,
            dilation=self.dilation,
            activation=self.activation,
        )

    # ---- state --------------------------------------------------------------------------------

    def get_extra_state(self) -> dict[str, Any]:
        """The partition's table and the quantisations: safe to load with ``weights_only``."""
        return {
            "table": self.partition.cpu_table.clone(),
            "read_as": tuple(self.read_as),
            "write_as": None if self.write_as is None else tuple(self.write_as),
        }

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Adopt those of a checkpoint, whose weight was copied before, and prepare the weight."""
        partition, read_as, write_as = self._checked(state)
        prepared = prepare_weight(
            self.weight, self.scale, self.bias, partition=partition, read_as=read_as
        )
        self.partition, self.read_as, self.write_as = partition, read_as, write_as
        self._adopt(prepared)

    def _checked(
        self, state: dict[str, Any]
    ) -> tuple[Partition, Quantization, Quantization | None]:
        partition = Partition.from_table(state["table"])
        if partition.sizes != self.partition.sizes or partition.in_channels != self.in_channels:
            raise ValueError(
                f"the checkpoint has {partition}, this layer {self.partition}; quantise a network "
                "with partitions of the same sizes"
            )
        write_as = state["write_as"]
        return (
            partition,
            Quantization(*state["read_as"]).checked("the checkpoint's read_as"),
            None
            if write_as is None
            else Quantization(*write_as).checked("the checkpoint's write_as"),
        )

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        # Before anything is copied: a weight means nothing without its partition.
        if prefix + "_extra_state" in state_dict:
            self._checked(state_dict[prefix + "_extra_state"])
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def extra_repr(self) -> str:
        """The arguments, the partition in words, and how both sides are stored."""
        parts = [f"{self.partition}", *self._said_arguments()]
        if self.activation is not None:
            parts.append(f"activation={self.activation!r}")
        parts.append(f"read_as={_said(self.read_as)}")
        if self.write_as is not None:
            parts.append(f"write_as={_said(self.write_as)}")
        return ", ".join(parts)


def _said(quantization: Quantization) -> str:
    return f"{quantization.scale:.4g} · (q − {quantization.zero_point})"


def why_not(layer: nn.Module) -> str | None:
    """What a layer does that whole numbers cannot, or ``None``."""
    if type(layer) is not PartitionedConv2d:
        return "is no PartitionedConv2d; convert() and from_conv2d() make those"
    if layer.padding_mode != "zeros":
        return (
            f"pads with padding_mode={layer.padding_mode!r}; only zeros can be stored as one number"
        )
    if layer.activation not in QUANTIZED_ACTIVATIONS:
        return f"ends with {layer.activation!r}; expected one of {QUANTIZED_ACTIVATIONS}"
    return None


def check_stored(layer: PartitionedConv2d) -> None:
    """Refuse a layer that could be quantised if it were float32 on the CPU."""
    weight = layer.weight
    if not weight.is_cpu:
        raise ValueError(f"its weight is on {weight.device}; move the model to the CPU")
    if weight.dtype != torch.float32:
        raise ValueError(f"its weight is {weight.dtype}; call model.float() before")


def gains(layer: PartitionedConv2d) -> bool:
    """Products are made four inputs of a group at a time; of one input three are for nothing."""
    _, most_inputs = layer.partition.widest
    return most_inputs > 1


class _Range:
    """The least and the largest number that a layer has read."""

    def __init__(self) -> None:
        self.low, self.high = torch.tensor(math.inf), torch.tensor(-math.inf)
        self.has_more = False  # a residual or a prologue

    def observe(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A hook before the layer's ``forward``."""
        x, *more = (*args, *kwargs.values())
        self.has_more = self.has_more or any(extra is not None for extra in more)
        if x.numel():
            low, high = x.detach().aminmax()
            # NaN goes through all of these, as it would not through min() and max().
            self.low, self.high = torch.minimum(self.low, low), torch.maximum(self.high, high)


def quantize(model: nn.Module, batches: Iterable[Any]) -> nn.Module:
    """Put a :class:`QuantizedPartitionedConv2d` in the place of every layer that can be one.

    Deploy the model first (:func:`convert`, :func:`fold`) and put it into evaluation mode. It is
    called with every batch, and what a layer read decides how its input is stored: numbers beyond
    that will be brought to the nearest end. As they are stay layers that pad with anything but
    zeros, end with SiLU or hard-swish, or add a residual or have a prologue, and channelwise ones,
    which gain nothing.

    Args:
        model: Any network on the CPU; changed in place.
        batches: What the model is called with, some hundred images that are like those to come.

    Returns:
        ``model``, or, where that is such a layer itself, what stands for it.

    Raises:
        ValueError: There is no batch, a layer is never called or reads NaN or Inf, or the model is
            in training mode, not float32 or not on the CPU; no layer is replaced.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is {model!r}; expected an nn.Module")
    if model.training:
        raise ValueError("the model is in training mode; call model.eval() before")
    names = {
        layer: name or type(layer).__name__
        for name, layer in model.named_modules()
        if isinstance(layer, PartitionedConv2d) and why_not(layer) is None and gains(layer)
    }
    for layer, name in names.items():
        try:
            check_stored(layer)
        except ValueError as error:
            raise ValueError(f"layer {name!r} cannot be quantised: {error}") from error
    ranges = _observe(model, list(names), batches)
    places = {}
    for layer, seen in ranges.items():
        if seen.has_more:
            continue
        if seen.low > seen.high:
            raise ValueError(
                f"layer {names[layer]!r} read nothing while the model was called with the batches; "
                "expected batches that reach every layer"
            )
        try:
            places[layer] = Quantization.from_range(float(seen.low), float(seen.high))
        except ValueError as error:
            raise ValueError(
                f"layer {names[layer]!r} cannot be quantised: of what it reads {error}"
            ) from error
    followers = _followers(model, places)
    replaced: dict[nn.Module, nn.Module] = {}
    for layer, stored in places.items():
        follower = followers.get(layer)
        write_as = None if follower is None else places[follower]
        try:
            quantized = QuantizedPartitionedConv2d(layer, stored, write_as)
        except ValueError as error:
            raise ValueError(f"layer {names[layer]!r} cannot be quantised: {error}") from error
        replaced[layer] = quantized.train(layer.training)
    return substitute(model, replaced)


def _observe(
    model: nn.Module, layers: list[PartitionedConv2d], batches: Iterable[Any]
) -> dict[PartitionedConv2d, _Range]:
    ranges = {layer: _Range() for layer in layers}
    hooks = [
        layer.register_forward_pre_hook(seen.observe, with_kwargs=True)
        for layer, seen in ranges.items()
    ]
    called = False
    try:
        with torch.inference_mode():
            for batch in batches:
                called = True
                model(batch)
    finally:
        for hook in hooks:
            hook.remove()
    if not called:
        raise ValueError("batches is empty; expected some that are like what the model will see")
    return ranges


def _followers(
    model: nn.Module, places: dict[PartitionedConv2d, Quantization]
) -> dict[nn.Module, PartitionedConv2d]:
    """The layer that alone reads what a layer writes, where an ``nn.Sequential`` says so."""
    stands = Counter(
        child for parent in set(model.modules()) for child in parent._modules.values() if child
    )
    return {
        first: second
        for parent in model.modules()
        if type(parent) is nn.Sequential
        for first, second in pairwise(parent)
        if first in places
        and isinstance(second, PartitionedConv2d)
        and second in places
        and stands[first] == stands[second] == 1
    }
