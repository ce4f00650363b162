"""What a page about a network shows: its layers counted, their groups, and their times.

The network runs as it is and converted, in turns; each layer's time is taken around its call, and
the median over the rounds is kept. On a processor that strangers share single layers move by some
percent; the whole network is timed as well, without a clock in every layer.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median
from time import perf_counter
from typing import Any

import torch
from torch import nn

from ..counting import Count, InputSize, LayerCount, count, image_size
from ..nn import convert
from ..nn.convert import named_partitions
from ..partition import Partition

__all__ = ["Inspection", "Layer", "inspect"]

MILLI = 1e3


@dataclass(frozen=True)
class Layer:
    """A convolution or linear layer: counted, its groups, its milliseconds."""

    counted: LayerCount
    partitions: dict[str, Partition]
    before_ms: float
    after_ms: float


@dataclass(frozen=True)
class Inspection:
    """Everything that the page shows.

    Attributes:
        title: What was inspected.
        input_size: Of one image.
        layers: In the order of the network.
        counted: All of it.
        before_ms: Of the whole network, as it is.
        after_ms: Of the whole network, converted.
        conditions: Under which it was measured.
    """

    title: str
    input_size: tuple[int, ...]
    layers: tuple[Layer, ...]
    counted: Count
    before_ms: float
    after_ms: float
    conditions: dict[str, str]


def inspect(
    model: nn.Module,
    input_size: InputSize = 224,
    *,
    title: str = "",
    rounds: int = 9,
    conditions: dict[str, str] | None = None,
) -> Inspection:
    """Count, convert and time ``model``; it is left as it is.

    Args:
        model: A network that takes a batch of images, on the CPU.
        input_size: As for :func:`groupconv_ext.count`.
        title: For the page.
        rounds: How often both forms are timed.
        conditions: For the page: the machine, versions.

    Raises:
        ValueError: The model cannot be counted or converted.
    """
    if rounds < 1:
        raise ValueError(f"rounds is {rounds}; expected at least 1")
    counted = count(model, input_size)
    before = copy.deepcopy(model).eval()
    after = convert(copy.deepcopy(model).eval())
    size = image_size(input_size)
    x = torch.randn(1, *size, dtype=next((p.dtype for p in model.parameters()), torch.float32))
    partitions = {name: dict(_partitions(layer)) for name, layer in before.named_modules()}
    whole: tuple[list[float], list[float]] = ([], [])
    single: tuple[dict[str, list[float]], dict[str, list[float]]] = ({}, {})
    with torch.inference_mode():
        for form in (before, after):
            form(x)
        for _ in range(rounds):
            for form, times, layers in zip((before, after), whole, single, strict=True):
                times.append(_seconds(form, x))
                with _timed(form, layers):
                    form(x)
    shown = counted.of("convolution", "linear")
    return Inspection(
        title=title or type(model).__name__,
        input_size=size,
        layers=tuple(
            Layer(
                layer,
                partitions.get(layer.name, {}),
                MILLI * median(single[0].get(layer.name, [0.0])),
                MILLI * median(single[1].get(layer.name, [0.0])),
            )
            for layer in shown.layers
        ),
        counted=counted,
        before_ms=MILLI * median(whole[0]),
        after_ms=MILLI * median(whole[1]),
        conditions=conditions or {},
    )


def _partitions(layer: nn.Module) -> Iterator[tuple[str, Partition]]:
    """The groups of a layer; a grouped convolution of torch has some as well."""
    if isinstance(layer, nn.Conv1d | nn.Conv2d):
        yield "", Partition.contiguous(layer.in_channels, layer.out_channels, layer.groups)
    else:
        yield from named_partitions(layer)


def _seconds(model: nn.Module, x: torch.Tensor) -> float:
    start = perf_counter()
    model(x)
    return perf_counter() - start


@contextmanager
def _timed(model: nn.Module, found: dict[str, list[float]]) -> Iterator[None]:
    """Add the seconds of every module's call to ``found``, by its name."""
    starts: dict[str, float] = {}
    handles = []
    for name, module in model.named_modules():

        def enter(_: Any, __: Any, name: str = name) -> None:
            starts[name] = perf_counter()

        def leave(_: Any, __: Any, ___: Any, name: str = name) -> None:
            found.setdefault(name, []).append(perf_counter() - starts[name])

        handles.append(module.register_forward_pre_hook(enter))
        handles.append(module.register_forward_hook(leave))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
