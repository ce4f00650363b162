"""The Triton kernels as a set of :class:`~groupconv_ext.operations.Operations`.

Here a partition and a window become the plain integers and tables that an operation takes, and here
the launch is chosen; what is differentiated how stands in :mod:`groupconv_ext.autograd`.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch.compiler import is_compiling
from torch.utils._pytree import register_constant

from ..._layout import compute_dtype, is_channels_last
from ..._ops import tf32_allowed
from ...operations import ACTIVATIONS, Before, Grads
from ...partition import Partition
from ...reference import prologue
from ...window import Window
from ..remembered import remembered, versions
from . import planner
from .tuning import Launch, Shape, Tuned

__all__ = [
    "TRITON_OPERATIONS",
    "TUNED",
    "TritonOperations",
    "choose_launch",
    "count_pixels",
    "load",
    "splits",
]

_PROGRAMS_WANTED = 1024  # a few on each multiprocessor of a large GPU
_LARGEST_PARTIALS = 64 << 20  # bytes of partial sums of a weight gradient


def load() -> bool:
    """Register the operations; not before they are used, for it brings PyTorch's compiler along."""
    names = (".ops", ".mask_ops", ".chain_ops")
    return len([import_module(name, __package__) for name in names]) == len(names)


# Loaded while a caller is traced, and not traced: what torch.compiler.assume_constant_result does.
load._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _measured_on() -> str:
    """What a measured launch holds for; nothing where there is no GPU to measure on."""
    if not torch.cuda.is_available():
        return ""
    return f"launch on {torch.cuda.get_device_name()}; {versions()}"


TUNED = Tuned(remembered, _measured_on)


def _chosen(*shape: Any) -> tuple[int, ...]:
    """The launch for a shape, in plain integers: what torch.compile can take as a constant."""
    return tuple(TUNED.launch(Shape(*shape)))


_chosen._dynamo_marked_constant = True  # type: ignore[attr-defined]


_NOMINAL_PIXELS = 1 << 14


def count_pixels(batch: int, height: int, width: int) -> int:
    """Pixels of all images; any number in a graph, where sizes may be symbols."""
    return _NOMINAL_PIXELS if is_compiling() else batch * height * width


def choose_launch(shape: Shape) -> Launch:
    """How the kernel for a shape is launched."""
    return Launch(*_chosen(*shape))


def _forward_shape(x: torch.Tensor, partition: Partition, pixels: int, taps: int) -> Shape:
    outs, ins = partition.widest
    sizes = (outs, ins, pixels, partition.out_channels, x.element_size())
    return Shape(*sizes, ins <= 1, taps, is_channels_last(x))


def convolve(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    partition: Partition,
    window: Window,
    activation: str,
    before: Before | None = None,
    coarse: torch.Tensor | None = None,
    level: torch.Tensor | None = None,
) -> torch.Tensor:
    """The convolution; ``coarse`` and ``level`` add a two-level convolution's second level."""
    height, width = window.output_size(x.shape[2], x.shape[3], *_kernel(weight))
    taps = weight.shape[-2] * weight.shape[-1]
    pixels = count_pixels(x.shape[0], height, width)
    shape = _forward_shape(x, partition, pixels, taps)
    if level is not None:
        shape = shape._replace(single=False)
    launch = choose_launch(shape)
    device = x.device
    result: torch.Tensor = torch.ops.groupconv_triton.convolve(
        x,
        weight,
        bias,
        residual,
        *(before or (None, None, False)),
        coarse,
        level,
        partition.derived(planner.tile_rows, launch.rows, 0, device=device),
        partition.derived(planner.row_weights, 0, device=device),
        partition.derived(planner.write_channels, device=device),
        partition.derived(planner.read_channels, device=device),
        partition.out_channels,
        height,
        width,
        list(window),
        False,
        is_channels_last(x),
        False,
        shape.single,
        planner.shares_tiles(partition, launch.rows, 0),
        True,
        False,
        ACTIVATIONS.index(activation),
        tf32_allowed(),
        list(launch),
    )
    return result


def _kernel(weight: torch.Tensor) -> tuple[int, int]:
    return weight.shape[-2], weight.shape[-1]


@dataclass(frozen=True)
class TritonOperations:
    """The Triton kernels, for autograd."""

    def conv2d(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        residual: torch.Tensor | None,
        partition: Partition,
        window: Window,
        activation: str,
        before: Before | None = None,
    ) -> torch.Tensor:
        """See :class:`~groupconv_ext.operations.Operations`, and so for the rest."""
        return convolve(x, weight, bias, residual, partition, window, activation, before)

    def input_grad(
        self,
        grad: torch.Tensor,
        weight: torch.Tensor,
        partition: Partition,
        window: Window,
        size: tuple[int, int],
        channels_last: bool,
    ) -> torch.Tensor:
        """See :class:`~groupconv_ext.operations.Operations`."""
        device, overlap = grad.device, partition.has_overlap
        outs, ins = partition.widest
        pixels = count_pixels(grad.shape[0], *size)
        reads = sum(ins for _, ins in partition.sizes)
        taps = weight.shape[-2] * weight.shape[-1]
        sizes = (ins, outs, pixels, reads, grad.element_size(), outs <= 1)
        shape = Shape(*sizes, taps, channels_last, transposed=True)
        launch = choose_launch(shape)
        channels = planner.places if overlap else planner.read_channels
        result: torch.Tensor = torch.ops.groupconv_triton.convolve(
            grad,
            weight,
            *(None,) * 4,
            False,
            None,
            None,
            partition.derived(planner.tile_rows, launch.rows, 1, device=device),
            partition.derived(planner.row_weights, 1, device=device),
            partition.derived(channels, device=device),
            partition.derived(planner.write_channels, device=device),
            reads if overlap else partition.in_channels,
            *size,
            list(window),
            True,
            channels_last,
            False,
            shape.single,
            planner.shares_tiles(partition, launch.rows, 1),
            overlap or partition.reads_all,
            overlap,
            0,
            tf32_allowed(),
            list(launch),
        )
        if not overlap:
            return result
        readers = partition.derived(planner.readers, device=device)
        collected: torch.Tensor = torch.ops.groupconv_triton.collect_readers(
            result, readers, channels_last, grad.dtype
        )
        return collected

    def weight_grad(
        self,
        grad: torch.Tensor,
        x: torch.Tensor,
        partition: Partition,
        window: Window,
        kernel: tuple[int, int],
        before: Before | None = None,
    ) -> torch.Tensor:
        """See :class:`~groupconv_ext.operations.Operations`."""
        device = x.device
        taps = kernel[0] * kernel[1]
        pixels = count_pixels(grad.shape[0], grad.shape[2], grad.shape[3])
        shape = _forward_shape(x, partition, pixels, taps)._replace(gradient=True)
        launch = choose_launch(shape)
        tiles = partition.derived(planner.tile_rows, launch.rows, 0, device=device)
        # The columns of the widest tile: of one group, or of as many as share it.
        widest = partition.widest[1] * max(1, launch.rows)
        widest = min(widest, sum(ins for _, ins in partition.sizes))
        programs = tiles.shape[0] * taps * -(-widest // launch.pixels)
        result: torch.Tensor = torch.ops.groupconv_triton.weight_gradient(
            grad,
            x,
            *(before or (None, None, False)),
            tiles,
            partition.derived(planner.row_weights, 0, device=device),
            partition.derived(planner.write_channels, device=device),
            partition.derived(planner.read_channels, device=device),
            [partition.entries, *kernel],
            list(window),
            is_channels_last(x),
            False,
            shape.single,
            planner.shares_tiles(partition, launch.rows, 0),
            max(widest, 1),
            splits(programs, partition.entries * taps, shape, launch),
            tf32_allowed(),
            x.dtype,
            list(launch),
        )
        return result

    def backward(
        self,
        grad: torch.Tensor,
        output: torch.Tensor | None,
        x: torch.Tensor,
        weight: torch.Tensor,
        partition: Partition,
        window: Window,
        activation: str,
        wanted: tuple[bool, bool, bool],
    ) -> Grads | None:
        """One by one: there is no kernel that makes several gradients."""
        return None

    def prologue_input_grad(
        self,
        grad: torch.Tensor,
        weight: torch.Tensor,
        x: torch.Tensor,
        before: Before,
        partition: Partition,
        window: Window,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The input gradient, then what the prologue makes of it in plain PyTorch."""
        scale, shift, relu = before
        wide = x.to(compute_dtype(x))
        size = (x.shape[2], x.shape[3])
        by_x = self.input_grad(grad, weight, partition, window, size, is_channels_last(x))
        g = by_x.to(wide.dtype)
        if relu:
            prepared = prologue(wide, scale, shift, None)
            g = torch.where(prepared <= 0, 0, g)
        by_x = g if scale is None else g * scale.to(g.dtype)[:, None, None]
        return by_x.to(x.dtype), (g * wide).sum((0, 2, 3)), g.sum((0, 2, 3))

    def two_level(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        restriction: torch.Tensor,
        coarse: torch.Tensor,
        bias: torch.Tensor | None,
        within: Partition,
        restrict: Partition,
        window: Window,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """z, then both sums of a tile in one program."""
        z = convolve(x, restriction, None, None, restrict, window, "none")
        y = convolve(x, weight, bias, None, within, window, "none", coarse=coarse, level=z)
        return y, z


def splits(programs: int, weights: int, shape: Shape, launch: Launch) -> int:
    """Into how many parts the pixels of a weight gradient are cut: enough programs, few partials.

    It depends on sizes alone, so that the order of the sums, and with it every bit, is the same on
    every device.
    """
    unit = launch.pixels if shape.single else launch.depth
    wanted = -(-_PROGRAMS_WANTED // max(programs, 1))
    worthwhile = max(1, shape.pixels // (8 * unit))
    affordable = max(1, _LARGEST_PARTIALS // max(4 * weights, 1))
    return max(1, min(wanted, worthwhile, affordable))


# To torch.compile a set of operations is a constant, like a Partition.
register_constant(TritonOperations)

TRITON_OPERATIONS = TritonOperations()
