"""Parameters and multiply-adds of a network, layer by layer.

The network runs once on tensors without data, and every layer that is called is written down:
standard convolutions and linear layers, and all layers of this library. One that learns its groups
counts twice, **deployed**, by the partition it has now, and **dense**, as it is while it trains. A
convolution that a model calls as a function, outside of any such layer, is counted where it
happens. Normalisation, activations and pooling are no multiply-adds, their parameters are counted.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.utils._python_dispatch import TorchDispatchMode

from .nn import (
    GroupedLayer,
    IGCV2Conv2d,
    InterleavedConv2d,
    PartitionedConv1d,
    PartitionedConv2d,
    TwoLevelConv2d,
    XceptionConv2d,
)
from .nn.separable import DepthwiseSeparableConv2d

__all__ = ["Count", "InputSize", "LayerCount", "count", "image_size"]

InputSize = int | Sequence[int]
Entries = dict[GroupedLayer, int | None]  # connections now, None where nothing says which

# Of these every weight is used once for every pixel of the output.
_AT_OUTPUT = (
    _ConvNd,
    PartitionedConv1d,
    PartitionedConv2d,
    TwoLevelConv2d,
    InterleavedConv2d,
    IGCV2Conv2d,
    DepthwiseSeparableConv2d,
)
_NORMS = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


@dataclass(frozen=True)
class LayerCount:
    """One layer, or one call of a convolution as a function.

    Attributes:
        name: Where it stands in the model.
        layer: Its class, or the operation.
        kind: ``"convolution"``, ``"linear"``, ``"norm"`` or ``"other"``.
        parameters: Of the deployed layer.
        dense_parameters: Of the layer while it trains, without the ones that choose its groups.
        multiply_adds: Of the deployed layer, for one image.
        dense_multiply_adds: With every weight, for one image.
        input: The shape of what it reads, without the batch; of its last call.
        output: The shape of what it returns.
        known: Whether the deployed numbers are; on the meta device no groups have been learned.
    """

    name: str
    layer: str
    kind: str
    parameters: int
    dense_parameters: int
    multiply_adds: int = 0
    dense_multiply_adds: int = 0
    input: tuple[int, ...] = ()
    output: tuple[int, ...] = ()
    known: bool = True


@dataclass(frozen=True)
class Count:
    """What :func:`count` found: its layers, in the order of the model, and their sums."""

    layers: tuple[LayerCount, ...]

    @property
    def parameters(self) -> int:
        """Of the deployed model."""
        return sum(layer.parameters for layer in self._known())

    @property
    def multiply_adds(self) -> int:
        """Of the deployed model, for one image."""
        return sum(layer.multiply_adds for layer in self._known())

    @property
    def dense_parameters(self) -> int:
        """Of the model while it trains, without logits and gates."""
        return sum(layer.dense_parameters for layer in self.layers)

    @property
    def dense_multiply_adds(self) -> int:
        """With all weights that a mask would hide, for one image."""
        return sum(layer.dense_multiply_adds for layer in self.layers)

    def _known(self) -> Iterator[LayerCount]:
        for layer in self.layers:
            if not layer.known:
                raise ValueError(
                    f"layer {layer.name!r}, a {layer.layer}, learns its groups, and on the meta "
                    "device it has none; build the model on the CPU, or ask for the dense numbers"
                )
            yield layer

    def where(self, condition: Callable[[LayerCount], bool]) -> Count:
        """The layers for which ``condition`` holds."""
        return Count(tuple(layer for layer in self.layers if condition(layer)))

    def of(self, *kinds: str) -> Count:
        """The layers of these kinds, see :class:`LayerCount`."""
        return self.where(lambda layer: layer.kind in kinds)


def count(model: nn.Module, input_size: InputSize = 224) -> Count:
    """Count what ``model`` has and does for one image.

    >>> gc.count(gc.models.create("resnet50"), 224).of("convolution").multiply_adds

    Args:
        model: Any module that takes a batch of images; it is left as it is.
        input_size: ``(channels, height, width)``; ``(height, width)`` and one number for both mean
            three channels.

    Raises:
        ValueError: The model cannot be run without data.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is {model!r}; expected an nn.Module")
    size = image_size(input_size)
    # Before the walk, in which no logit has a value.
    entries = {m: _entries(m) for m in model.modules() if isinstance(m, GroupedLayer)}
    found = {module: _held(name, module, entries) for name, module in model.named_modules()}
    calls: dict[str, LayerCount] = {}
    _walk(model, size, entries, found, calls)
    layers = [
        layer for layer in found.values() if layer.dense_parameters or layer.dense_multiply_adds
    ]
    return Count((*layers, *calls.values()))


def image_size(input_size: InputSize) -> tuple[int, ...]:
    """Channels and sides, as :func:`count` understands them."""
    size = (input_size, input_size) if isinstance(input_size, int) else tuple(input_size)
    if len(size) == 2:
        size = (3, *size)
    if not size or not all(isinstance(side, int) and side > 0 for side in size):
        raise ValueError(
            f"input_size is {input_size!r}; expected a side, (height, width) or "
            "(channels, height, width)"
        )
    return size


# ---- what a layer holds --------------------------------------------------------------------------


def _held(name: str, module: nn.Module, entries: Entries) -> LayerCount:
    """A layer before it has been called: its own parameters, not its children's."""
    own = sum(parameter.numel() for parameter in module.parameters(recurse=False))
    blank = LayerCount(name, type(module).__name__, _kind(module), own, own)
    if isinstance(module, IGCV2Conv2d):  # its weights are a list, which is a module of its own
        own += sum(weight.numel() for weight in module.stages)
    elif isinstance(module, nn.ParameterList | nn.ParameterDict):
        own = 0
    if not isinstance(module, GroupedLayer):
        return replace(blank, parameters=own, dense_parameters=own)
    dense = own - sum(parameter.numel() for parameter in module.structure_parameters())
    connections = entries[module]
    if connections is None:
        return replace(blank, parameters=0, dense_parameters=dense, known=False)
    saved = _weight(module).numel() - connections * _taps(module)
    return replace(blank, parameters=dense - saved, dense_parameters=dense)


def _kind(module: nn.Module) -> str:
    if isinstance(module, (*_AT_OUTPUT, XceptionConv2d, GroupedLayer)):
        return "convolution"
    if isinstance(module, nn.Linear):
        return "linear"
    return "norm" if isinstance(module, _NORMS) else "other"


def _weight(layer: nn.Module) -> torch.Tensor:
    weight = layer.weight
    assert isinstance(weight, torch.Tensor)
    return weight


def _taps(layer: nn.Module) -> int:
    return math.prod(_weight(layer).shape[2:])


def _entries(layer: GroupedLayer) -> int | None:
    """The connections it has now, unless its logits or gates hold nothing."""
    try:
        return layer.partition().entries
    except NotImplementedError:  # torch's word for reading a tensor on the meta device
        return None


# ---- what a layer does --------------------------------------------------------------------------


def _work(layer: Any, x: torch.Tensor, y: torch.Tensor, entries: Entries) -> tuple[int, int]:
    """Multiply-adds of one call for one image, deployed and dense."""
    if isinstance(layer, nn.Linear):
        work = layer.in_features * y.numel()
        return work, work
    inputs, outputs = (math.prod(t.shape[-_dimensions(layer) :]) for t in (x, y))
    if isinstance(layer, GroupedLayer):
        connections = entries[layer] or 0
        return connections * _taps(layer) * outputs, _weight(layer).numel() * outputs
    if isinstance(layer, XceptionConv2d):
        work = layer.pointwise.numel() * inputs + layer.depthwise.numel() * outputs
    else:
        bias = 0 if layer.bias is None else layer.bias.numel()
        weights = sum(parameter.numel() for parameter in layer.parameters()) - bias
        work = weights * (inputs if isinstance(layer, _ConvTransposeNd) else outputs)
    return work, work


def _dimensions(layer: Any) -> int:
    return len(layer.kernel_size)


class _Functions(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Writes down convolutions and matrix products that no known layer has asked for."""

    def __init__(self, add: Callable[[str, int], None], inside: Callable[[], bool]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._add = add
        self._inside = inside

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        y = func(*args, **(kwargs or {}))
        if self._inside():
            return y
        aten = torch.ops.aten
        packet = func.overloadpacket
        if packet is aten.convolution:
            x, weight, transposed = args[0], args[1], args[6]
            pixels = math.prod((x if transposed else y).shape[2:])
            self._add("convolution", weight.numel() * pixels)
        elif packet in (aten.mm, aten.addmm):
            left, right = args[-2:]
            self._add("linear", right.numel() * left.shape[0])
        elif func.namespace == "groupconv" and packet.__name__ in _PARTITIONED:
            self._add("convolution", args[1].numel() * math.prod(y.shape[2:]))
        elif func.namespace == "groupconv":
            raise ValueError(
                f"it calls the operation {packet.__name__} outside of a layer of this library, "
                "whose groups cannot be seen from there; use the layer"
            )
        return y


_PARTITIONED = ("conv2d", "prologue_conv2d")


def _walk(
    model: nn.Module,
    size: tuple[int, ...],
    entries: Entries,
    found: dict[nn.Module, LayerCount],
    calls: dict[str, LayerCount],
) -> None:
    """Run ``model`` on an image without data and add what its layers do."""
    stack: list[str] = []  # modules that run now
    inside = 0  # how many of them are known layers

    def known(module: nn.Module) -> bool:
        return found[module].kind in ("convolution", "linear")

    def enter(module: nn.Module, _: Any) -> None:
        nonlocal inside
        stack.append(found[module].name)
        inside += known(module)

    def leave(module: nn.Module, arguments: Any, y: Any) -> None:
        nonlocal inside
        stack.pop()
        inside -= known(module)
        if known(module) and not inside:
            deployed, dense = _work(module, arguments[0], y, entries)
            before = found[module]
            found[module] = replace(
                before,
                multiply_adds=before.multiply_adds + deployed,
                dense_multiply_adds=before.dense_multiply_adds + dense,
                input=tuple(arguments[0].shape[1:]),
                output=tuple(y.shape[1:]),
            )

    def add(kind: str, work: int) -> None:
        name = f"{stack[-1] if stack else ''}({kind})"
        before = calls.get(name, LayerCount(name, kind, kind, 0, 0))
        calls[name] = replace(
            before,
            multiply_adds=before.multiply_adds + work,
            dense_multiply_adds=before.dense_multiply_adds + work,
        )

    parameter = next(model.parameters(), None)
    on_meta = parameter is not None and parameter.is_meta
    dtype = torch.float32 if parameter is None else parameter.dtype
    with _hooked(model, enter, leave), _evaluating(model), torch.no_grad():
        try:
            with nullcontext() if on_meta else _without_data(), _Functions(add, lambda: inside > 0):
                device = torch.device("cpu") if parameter is None else parameter.device
                model(torch.empty(1, *size, dtype=dtype, device=device))
        except Exception as error:
            where = f" in {stack[-1]!r}" if stack and stack[-1] else ""
            raise ValueError(
                f"{type(model).__name__} cannot be counted on images of {list(size)}: it was run "
                f"without data and failed{where}: {error}"
            ) from error


def _without_data() -> Any:
    # Imported here by torch itself, and not when the package is: it takes a second.
    from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: PLC0415

    return FakeTensorMode(allow_non_fake_inputs=True)


@contextmanager
def _hooked(model: nn.Module, enter: Any, leave: Any) -> Iterator[None]:
    handles = []
    for module in model.modules():
        handles.append(module.register_forward_pre_hook(enter))
        handles.append(module.register_forward_hook(leave))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode for a while, and then every module's own again."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
