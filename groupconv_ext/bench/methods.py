"""The ways to compute a partitioned convolution: our kernels, and each PyTorch way at its best.

A method takes a case and gives what is to be timed, ``function(x, weight)``, with the weight in a
form of its own, prepared beforehand, and the way back to the packed form, so that its gradient can
be checked. Where it makes a difference a method knows whether the case is a training step.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from math import sqrt
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import conv2d

from groupconv_ext import functional
from groupconv_ext.partition import Partition

from .problems import Layout, Problem


@dataclass(frozen=True)
class Case:
    """A problem with its data: what every contender is given."""

    problem: Problem
    x: Tensor
    weight: Tensor  # packed
    grad_output: Tensor

    @classmethod
    def make(cls, problem: Problem, device: torch.device | str = "cpu") -> Case:
        """Normal values, scaled so that outputs are about 1 whatever the accumulation length."""
        generator = torch.Generator(device).manual_seed(0)
        longest = max(n_in for _, n_in in problem.partition.sizes) * problem.kernel**2

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, device=device)

        def image(channels: int, height: int, width: int) -> Tensor:
            values = normal(problem.batch, channels, height, width).to(problem.torch_dtype)
            return values.contiguous(memory_format=problem.memory_format)

        weight = normal(problem.partition.entries, problem.kernel, problem.kernel) / sqrt(longest)
        return cls(
            problem=problem,
            x=image(problem.in_channels, problem.height, problem.width),
            weight=weight.to(problem.torch_dtype),
            grad_output=image(problem.out_channels, *problem.output_size),
        )

    @property
    def partition(self) -> Partition:
        """The problem's Partition."""
        return self.problem.partition


Function = Callable[[Tensor, Tensor], Tensor]  # (x, weight) -> y


@dataclass(frozen=True)
class Method:
    """How to compute a case: ``function(x, weight)``, with the weight in a form of its own."""

    function: Function
    weight: Tensor
    to_packed: Callable[[Tensor], Tensor] = lambda weight: weight


# ---- ours ----------------------------------------------------------------------------------------


def native(case: Case) -> Method:
    """Our kernels on the packed weight."""
    problem, partition = case.problem, case.partition
    stride, padding = problem.stride, problem.padding

    def function(x: Tensor, weight: Tensor) -> Tensor:
        return functional.conv2d(
            x, weight, partition=partition, stride=stride, padding=padding, backend="native"
        )

    return Method(function, case.weight)


# ---- gather, convolve, scatter -------------------------------------------------------------------


def _take(x: Tensor, index: Tensor | None, layout: Layout) -> Tensor:
    """Channels of ``x`` in the order of ``index``, in the same layout, by PyTorch's fastest gather.

    In NHWC that is ``index_select`` on a matrix of pixels by channels: the obvious
    ``x.index_select(1, index)`` is two to seven times slower there and loses the layout.
    """
    if index is None:
        return x
    if layout == "NCHW":
        return x.index_select(1, index)
    n, channels, height, width = x.shape
    pixels = x.permute(0, 2, 3, 1).reshape(-1, channels)
    taken = pixels.index_select(1, index)
    return taken.view(n, height, width, len(index)).permute(0, 3, 1, 2)


class _Permute(torch.autograd.Function):
    """``_take`` by a permutation: its gradient is a gather too, where autograd scatter-adds."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, index: Tensor | None, inverse: Tensor | None, layout: Layout
    ) -> Tensor:
        ctx.inverse, ctx.layout = inverse, layout
        return _take(x, index, layout)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        return _take(grad, ctx.inverse, ctx.layout), None, None, None


def _permute(x: Tensor, index: Tensor | None, inverse: Tensor | None, layout: Layout) -> Tensor:
    permuted: Tensor = _Permute.apply(x, index, inverse, layout)  # type: ignore[no-untyped-call]
    return permuted


def _flat(lists: tuple[tuple[int, ...], ...], case: Case) -> Tensor:
    channels = [channel for channels in lists for channel in channels]
    return torch.tensor(channels, device=case.x.device)


def _unless_identity(index: Tensor) -> Tensor | None:
    """None for an index that changes nothing, so that a contiguous rival does not pay for it."""
    return None if torch.equal(index, torch.arange(len(index), device=index.device)) else index


def _grouped_call(problem: Problem) -> Function:
    return partial(conv2d, stride=problem.stride, padding=problem.padding, groups=problem.groups)


def _grouped_weight(case: Case) -> Tensor:
    """The packed weight of even groups as ``F.conv2d(groups=G)`` takes it: the same memory."""
    _, n_in = case.partition.sizes[0]
    kernel = case.problem.kernel
    return case.weight.reshape(case.problem.out_channels, n_in, kernel, kernel)


def _ungrouped(weight: Tensor) -> Tensor:
    return weight.flatten(0, 1)


def aten(case: Case) -> Method:
    """``index_select``, ``F.conv2d(groups=G)``, ``index_select``: none where no channel moves."""
    partition, layout = case.partition, case.problem.layout
    convolve = _grouped_call(case.problem)
    gather = _unless_identity(_flat(partition.inputs, case))
    scatter = _unless_identity(_flat(partition.outputs, case).argsort())

    def function(x: Tensor, weight: Tensor) -> Tensor:
        return _take(convolve(_take(x, gather, layout), weight), scatter, layout)

    return Method(function, _grouped_weight(case), _ungrouped)


def aten_inverse(case: Case) -> Method:
    """``aten`` with permutations whose gradients are gathers."""
    partition, layout = case.partition, case.problem.layout
    convolve = _grouped_call(case.problem)
    reads, writes = _flat(partition.inputs, case), _flat(partition.outputs, case)
    gather, gather_back = _unless_identity(reads), _unless_identity(reads.argsort())
    scatter, scatter_back = _unless_identity(writes.argsort()), _unless_identity(writes)

    def function(x: Tensor, weight: Tensor) -> Tensor:
        y = convolve(_permute(x, gather, gather_back, layout), weight)
        return _permute(y, scatter, scatter_back, layout)

    return Method(function, _grouped_weight(case), _ungrouped)


def prepacked(case: Case) -> Method:
    """``aten`` in channels_last on a weight reordered by oneDNN: what a frozen model calls."""
    problem, partition = case.problem, case.partition
    stride, padding, dilation = [problem.stride] * 2, [problem.padding] * 2, [1, 1]
    reads = _flat(partition.inputs, case)
    gather = _unless_identity(reads)
    scatter = _unless_identity(_flat(partition.outputs, case).argsort())
    reorder: Any = torch._C._nn.mkldnn_reorder_conv2d_weight
    convolve = torch.ops.mkldnn._convolution_pointwise
    weight = _grouped_weight(case)
    x_size = [problem.batch, len(reads), problem.height, problem.width]
    packed = reorder(weight.to_mkldnn(), padding, stride, dilation, problem.groups, x_size)

    def function(x: Tensor, _: Tensor) -> Tensor:
        window = (padding, stride, dilation, problem.groups)
        y = convolve(_take(x, gather, "NHWC"), packed, None, *window, "none", [], "")
        return _take(y, scatter, "NHWC")

    return Method(function, weight)


def shuffle(case: Case) -> Method:
    """ShuffleNet's shuffle by view, transpose and one copy, instead of an index."""
    problem = case.problem
    layout, groups = problem.layout, problem.groups
    convolve = _grouped_call(problem)
    before = problem.kind == "interleaved"

    def function(x: Tensor, weight: Tensor) -> Tensor:
        if before:
            x = _transpose_channels(x, x.shape[1] // groups, layout)
        return _transpose_channels(convolve(x, weight), groups, layout)

    return Method(function, _grouped_weight(case), _ungrouped)


def _transpose_channels(x: Tensor, rows: int, layout: Layout) -> Tensor:
    """ShuffleNet's shuffle: channels as a ``rows`` × … matrix, transposed; one copy."""
    n, channels, height, width = x.shape
    if layout == "NCHW":
        matrix = x.reshape(n, rows, channels // rows, height, width)
        return matrix.transpose(1, 2).reshape(n, channels, height, width)
    pixels = x.permute(0, 2, 3, 1).reshape(n, height, width, rows, channels // rows)
    return pixels.transpose(3, 4).reshape(n, height, width, channels).permute(0, 3, 1, 2)


# ---- ragged groups -------------------------------------------------------------------------------


def padded(case: Case) -> Method:
    """Every group padded to the largest by zero weights, so that one grouped call does all."""
    problem, partition = case.problem, case.partition
    layout, groups, kernel = problem.layout, problem.groups, problem.kernel
    convolve = _grouped_call(problem)
    most_out = max(n_out for n_out, _ in partition.sizes)
    most_in = max(n_in for _, n_in in partition.sizes)
    present = torch.zeros(groups, most_out, most_in, dtype=torch.bool)
    for group, (n_out, n_in) in enumerate(partition.sizes):
        present[group, :n_out, :n_in] = True
    # A missing input is channel 0 under a zero weight; a missing output is never taken.
    padded_inputs = [[*group, *[0] * (most_in - len(group))] for group in partition.inputs]
    device = case.x.device
    gather = torch.tensor(padded_inputs, device=device).flatten()
    present = present.to(device)
    computed = present.any(2).flatten().nonzero().flatten()
    scatter = computed[_flat(partition.outputs, case).argsort()]

    weight = case.weight.new_zeros(groups, most_out, most_in, kernel, kernel)
    weight[present] = case.weight
    mask = present.view(groups * most_out, most_in, 1, 1).to(problem.torch_dtype)
    trains = problem.trains

    def function(x: Tensor, weight: Tensor) -> Tensor:
        y = convolve(_take(x, gather, layout), weight * mask if trains else weight)
        return _take(y, scatter, layout)

    def to_packed(weight: Tensor) -> Tensor:
        return weight.view(groups, most_out, most_in, kernel, kernel)[present]

    return Method(function, weight.flatten(0, 1), to_packed)


def per_group(case: Case) -> Method:
    """One convolution a group on a view of the packed weight, then cat and one reordering."""
    problem, partition = case.problem, case.partition
    layout, kernel = problem.layout, problem.kernel
    convolve = partial(conv2d, stride=problem.stride, padding=problem.padding)
    gathers = [torch.tensor(group, device=case.x.device) for group in partition.inputs]
    scatter = _flat(partition.outputs, case).argsort()
    sizes = partition.sizes
    lengths = [n_out * n_in for n_out, n_in in sizes]

    def function(x: Tensor, weight: Tensor) -> Tensor:
        blocks = torch.split(weight, lengths)
        ys = [
            convolve(_take(x, gather, layout), block.view(n_out, n_in, kernel, kernel))
            for gather, block, (n_out, n_in) in zip(gathers, blocks, sizes, strict=True)
        ]
        return _take(torch.cat(ys, 1), scatter, layout)

    return Method(function, case.weight)


# ---- dense ---------------------------------------------------------------------------------------


def dense(case: Case) -> Method:
    """A dense convolution with zeros off the mask: masked once, but in training every step."""
    problem, partition, trains = case.problem, case.partition, case.problem.trains
    convolve = partial(conv2d, stride=problem.stride, padding=problem.padding)
    mask = partition.mask(problem.torch_dtype, case.x.device)[:, :, None, None]

    def function(x: Tensor, weight: Tensor) -> Tensor:
        return convolve(x, weight * mask if trains else weight)

    return Method(function, partition.unpack(case.weight), partition.pack)
