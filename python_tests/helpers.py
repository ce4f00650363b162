"""What several tests share: problems of every kind, the oracle, and what rounding may change."""

import ctypes
import itertools
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeAlias

import hypothesis.strategies as st
import pytest
import torch
from hypothesis.strategies import DrawFn, SearchStrategy
from torch.nn import functional

from groupconv_ext import _ops, backends, reference
from groupconv_ext.autograd import FUSED_IN_TRAINING
from groupconv_ext.backends.native import NATIVE
from groupconv_ext.backends.registry import Backend
from groupconv_ext.partition import Partition
from groupconv_ext.window import Window

PARTITIONS: dict[str, Partition] = {
    "dense": Partition.contiguous(5, 3, 1),
    "contiguous": Partition.contiguous(8, 12, 4),
    "permuted": Partition.random(12, 8, 2, seed=0),
    "depthwise": Partition.shuffled(6, 6, 6),
    "multiplier": Partition.contiguous(3, 6, 3),
    "ragged": Partition.from_labels([0, 0, 1, 2, 0, 2, 2, 2, 0], [1, 0, 0, 2, 2, 1, 1], 3),
    "group without inputs": Partition(3, 4, [[0, 2], [], [1]], [[3], [1, 0], [2]]),
    "group without outputs": Partition(4, 3, [[0], [1, 2], [3]], [[0, 1], [], [2]]),
    "empty group": Partition.from_labels([0, 2, 2, 0], [2, 0, 2], 4),
    "overlapping, unread": Partition(6, 4, [[0, 1, 5], [4, 5, 1]], [[0, 3], [2, 1]]),
    "no connection": Partition(2, 2, [[], []], [[1], [0]]),
}
"""One small Partition of every kind, for parametrised tests."""

MIXED = Partition(
    19,
    21,
    [range(17), [3, 18, 9], [], [0, 16, 5, 2]],
    [range(3, 21, 2), [1, 0], [2], range(4, 21, 2)],
)
"""Overlapping, ragged, with an unread channel, and enough channels for a block of a transpose."""

CHAINS: dict[str, list[Partition]] = {
    "one stage": [PARTITIONS["permuted"]],
    "in place": [Partition.contiguous(12, 12, 4), Partition.interleaved(12, 12, 4)],
    "three stages, ragged": [
        Partition.random(12, 17, 3, seed=1, uneven=True),
        Partition(17, 9, [[0, 1, 2], [2, 3, 16, 7], []], [[0, 1, 2, 3], [4, 5], [6, 7, 8]]),
        Partition.contiguous(9, 6, 3),
    ],
    "overlapping, unread": [PARTITIONS["overlapping, unread"], Partition.contiguous(4, 40, 2)],
    "no connection": [Partition.contiguous(5, 2, 1), PARTITIONS["no connection"]],
    # Twelve rows: two tiles of rows, of which the second reads what the first would overwrite.
    "not in place": [Partition.interleaved(24, 24, 2), Partition.contiguous(24, 24, 2)],
    "wide groups": [Partition.contiguous(40, 66, 2), Partition.random(66, 33, 3, seed=2)],
}
"""Stages of which each reads what the one before it writes."""


@st.composite
def even_partitions(draw: DrawFn, max_channels: int, max_groups: int) -> Partition:
    """Even groups of permuted channels."""
    groups = draw(st.integers(1, max_groups))
    ins, outs = (draw(st.integers(1, max(1, max_channels // groups))) for _ in range(2))
    order = draw(st.permutations(range(groups * ins)))
    out_order = draw(st.permutations(range(groups * outs)))
    return Partition(
        groups * ins,
        groups * outs,
        [order[g * ins : (g + 1) * ins] for g in range(groups)],
        [out_order[g * outs : (g + 1) * outs] for g in range(groups)],
    )


@st.composite
def labelled_partitions(draw: DrawFn, max_channels: int, max_groups: int) -> Partition:
    """Ragged groups, often with empty ones."""
    groups = draw(st.integers(1, max_groups))
    labels = st.lists(st.integers(0, groups - 1), min_size=1, max_size=max_channels)
    return Partition.from_labels(draw(labels), draw(labels), groups)


@st.composite
def listed_partitions(draw: DrawFn, max_channels: int, max_groups: int) -> Partition:
    """Anything: inputs that overlap, come in any order, or are read by nobody."""
    in_channels, out_channels = (draw(st.integers(1, max_channels)) for _ in range(2))
    groups = draw(st.integers(1, max_groups))
    channels = st.integers(0, in_channels - 1)
    inputs = draw(st.lists(st.lists(channels, unique=True), min_size=groups, max_size=groups))
    outputs: list[list[int]] = [[] for _ in range(groups)]
    for channel in draw(st.permutations(range(out_channels))):
        outputs[draw(st.integers(0, groups - 1))].append(channel)
    return Partition(in_channels, out_channels, inputs, outputs)


def partitions(max_channels: int = 12, max_groups: int = 4) -> SearchStrategy[Partition]:
    """Partitions of every kind: even, ragged, with empty groups, overlapping, unread inputs."""
    kinds = (even_partitions, labelled_partitions, listed_partitions)
    return st.one_of(*(kind(max_channels, max_groups) for kind in kinds))


class Geometry(NamedTuple):
    """Everything about a convolution that is not channels."""

    input_size: tuple[int, int] = (5, 6)
    kernel_size: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int, int, int] = (0, 0, 0, 0)
    dilation: tuple[int, int] = (1, 1)

    @property
    def window(self) -> tuple[tuple[int, int], tuple[int, int, int, int], tuple[int, int]]:
        """Stride, padding and dilation, in the order in which every function takes them."""
        return self.stride, self.padding, self.dilation


GEOMETRIES: dict[str, Geometry] = {
    "1×1": Geometry(),
    "1×1 stride 2": Geometry((7, 5), stride=(2, 2)),
    "3×3": Geometry((5, 6), (3, 3), padding=(1, 1, 1, 1)),
    "strided": Geometry((8, 7), (3, 2), stride=(2, 3), padding=(1, 1, 0, 0)),
    "uneven padding": Geometry((4, 5), (2, 3), padding=(0, 2, 3, 1)),
    "dilated": Geometry((9, 7), (3, 2), padding=(2, 2, 1, 1), dilation=(2, 3)),
    "rows never read": Geometry((6, 6), (1, 2), stride=(4, 3), dilation=(1, 2)),
    "kernel = image": Geometry((3, 4), (3, 4)),
    "padding beyond the kernel": Geometry((2, 2), (2, 2), padding=(3, 0, 0, 3)),
}


@st.composite
def geometries(draw: DrawFn, max_size: int = 8) -> Geometry:
    """A convolution with at least one output pixel."""
    kernel_size, stride, dilation = (
        (draw(st.integers(1, 3)), draw(st.integers(1, 3))) for _ in range(3)
    )
    top, bottom, left, right = (draw(st.integers(0, 3)) for _ in range(4))
    height, width = (
        draw(st.integers(max(1, dilation[i] * (kernel_size[i] - 1) + 1 - pad), max_size))
        for i, pad in enumerate((top + bottom, left + right))
    )
    return Geometry((height, width), kernel_size, stride, (top, bottom, left, right), dilation)


def dense_reference(
    x: torch.Tensor,
    weight: torch.Tensor,
    partition: Partition,
    geometry: Geometry,
    bias: torch.Tensor | None = None,
    activation: str | None = None,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """The same convolution by PyTorch alone: a dense one whose weight is zero off the mask."""
    top, bottom, left, right = geometry.padding
    y = functional.conv2d(
        functional.pad(x, (left, right, top, bottom)),
        partition.unpack(weight),
        bias,
        geometry.stride,
        0,
        geometry.dilation,
    )
    y = y if residual is None else y + residual
    # Spelled out, so that they are no repetition of what they check.
    return {
        None: y,
        "none": y,
        "relu": y.clamp(min=0),
        "relu6": y.clamp(0, 6),
        "silu": y / (1 + torch.exp(-y)),
        "hardswish": y * (y + 3).clamp(0, 6) / 6,
    }[activation]


def tensors(
    partition: Partition, geometry: Geometry, batch: int = 2, dtype: torch.dtype = torch.float64
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Random input, packed weight and bias."""
    x = torch.randn(batch, partition.in_channels, *geometry.input_size, dtype=dtype)
    weight = torch.randn(partition.entries, *geometry.kernel_size, dtype=dtype)
    return x, weight, torch.randn(partition.out_channels, dtype=dtype)


def split(channels: int, *sizes: int, seed: int = 0) -> list[list[int]]:
    """The channels in random order, cut into lists of these sizes."""
    order = torch.randperm(channels, generator=torch.Generator().manual_seed(seed)).tolist()
    ends = list(itertools.accumulate(sizes))
    return [order[end - size : end] for size, end in zip(sizes, ends, strict=True)]


# ---- instruction sets ---------------------------------------------------------------------------

needs_native = pytest.mark.skipif(_ops.unavailable is not None, reason=str(_ops.unavailable))


def backends_for(dtype: torch.dtype) -> list[Any]:
    """Every backend by its name, for parametrised tests; those that cannot run here are skipped."""
    return [
        pytest.param(name, marks=pytest.mark.skipif(reason is not None, reason=f"it {reason}"))
        for name, reason in backends.explain("cpu", dtype).items()
    ]


def _force_isa(name: bytes) -> bool:
    return bool(ctypes.CDLL(str(_ops.LIBRARY)).groupconv_force_isa(name) == 0)


def _isa_in_use() -> bytes:
    function = ctypes.CDLL(str(_ops.LIBRARY)).groupconv_isa_name
    function.restype = ctypes.c_char_p
    name: bytes = function()
    return name


@contextmanager
def forced_isa(name: str) -> Iterator[None]:
    """The native kernels of one instruction set."""
    before = _isa_in_use()
    assert _force_isa(name.encode()), f"{name} does not run here"
    try:
        yield
    finally:
        _force_isa(before)


def runnable_isas() -> list[str]:
    """Instruction sets that were built and that this processor has; none without the library."""
    if _ops.unavailable is not None:
        return []
    before = _isa_in_use()
    names = ("scalar", "avx2", "avx512", "avx512_vnni", "avx512_bf16", "avx512_amx")
    found = [name for name in names if _force_isa(name.encode())]
    _force_isa(before)
    return found


ISAS = [isa for isa in runnable_isas() if isa != "avx512_vnni"]
"""Those that have kernels of their own for floating-point numbers."""

DTYPES = (torch.float32, torch.float64, torch.bfloat16)
"""What the native kernels for the CPU take."""


# ---- layouts ------------------------------------------------------------------------------------


def _inside_larger(x: torch.Tensor, *steps: int, channels_last: bool = False) -> torch.Tensor:
    """``x`` as a view, ``steps`` apart, of a larger tensor that is NaN everywhere else."""
    sizes = [step * (size + 2) for step, size in zip(steps, x.shape, strict=True)]
    larger = torch.full(sizes, torch.nan, dtype=x.dtype, device=x.device)
    if channels_last:
        larger = larger.contiguous(memory_format=torch.channels_last)
    view = larger[tuple(slice(s, s * (n + 1), s) for s, n in zip(steps, x.shape, strict=True))]
    return view.copy_(x)


def _unaligned(x: torch.Tensor) -> torch.Tensor:
    larger = torch.full((x.numel() + 1,), torch.nan, dtype=x.dtype, device=x.device)
    return larger[1:].view_as(x).copy_(x)


def _channels_last(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous(memory_format=torch.channels_last)


Layout: TypeAlias = Callable[[torch.Tensor], torch.Tensor]

LAYOUTS: dict[str, Layout] = {
    "NCHW": torch.Tensor.contiguous,
    "channels_last": _channels_last,
    "images sliced": lambda x: _inside_larger(x, 2, 1, 1, 1),
    "channels sliced": lambda x: _inside_larger(x, 1, 2, 1, 1),
    "rows sliced": lambda x: _inside_larger(x, 1, 1, 2, 1),
    "columns sliced": lambda x: _inside_larger(x, 1, 1, 1, 3),
    "channels_last, channels cut": lambda x: _inside_larger(x, 1, 1, 1, 1, channels_last=True),
    "channels_last, all sliced": lambda x: _inside_larger(x, 2, 2, 2, 2, channels_last=True),
    "rows and columns swapped": lambda x: x.mT.contiguous().mT,
    "images innermost": lambda x: x.movedim(0, -1).contiguous().movedim(-1, 0),
    "unaligned": _unaligned,
    "unaligned channels_last": lambda x: _unaligned(x.movedim(1, -1)).movedim(-1, 1),
    "one image expanded": lambda x: x[:1].expand_as(x),
    "one channel expanded": lambda x: x[:, :1].expand_as(x),
    "one pixel expanded": lambda x: x[:, :, :1, :1].expand_as(x),
}
"""Ways for a batch of images to lie in memory; the expanded ones change what it holds."""


# ---- the oracle, and how far from it a result may be --------------------------------------------


class Exact(NamedTuple):
    """A sum of products in float64, and what the rounding errors of computing it grow with."""

    value: torch.Tensor
    magnitude: torch.Tensor  # Σ |product|
    terms: torch.Tensor  # how many there are


def exact(operation: Callable[..., torch.Tensor], *operands: torch.Tensor | None) -> Exact:
    """``operation``, which is linear in every operand."""

    def apply(change: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        return operation(*(None if t is None else change(t.detach().double()) for t in operands))

    return Exact(apply(torch.Tensor.clone), apply(torch.abs), apply(torch.ones_like))


def assert_within_rounding(
    actual: torch.Tensor, expected: Exact, activation: str | None = None
) -> None:
    """``actual`` is ``expected``, then activated, but for errors that rounding can explain.

    A sum of n products rounded to u = eps / 2, in any order and with or without fused
    multiply-adds, is off by at most γ_n Σ|product|, γ_n = n·u / (1 − n·u) (Higham, *Accuracy and
    Stability of Numerical Algorithms*, §3.1 and §4.2). That is below n·eps Σ|product|, and so are
    two such sums apart from each other, the oracle's own in float64, below (n + 1)·eps Σ|product|.

    bfloat16 and float16 are summed in float32 and rounded once at the end. An activation has a
    slope of at most 1.5 (hardswish at 3), returns nothing larger than its argument, and adds a few
    roundings.
    """
    narrow = actual.dtype in (torch.bfloat16, torch.float16)
    summed_in = torch.float32 if narrow else actual.dtype
    eps = torch.finfo(summed_in).eps
    value, bound = expected.value, (expected.terms + 1) * eps * expected.magnitude
    if activation not in (None, "none"):
        value = reference.activations[activation](value)
        bound = 1.5 * bound + 4 * eps * expected.magnitude
    if actual.dtype != summed_in:
        bound = bound + torch.finfo(actual.dtype).eps / 2 * (value.abs() + bound)
    assert actual.shape == value.shape
    wrong = ~((actual.double() - value).abs() <= bound)
    assert not wrong.any(), (
        f"{int(wrong.sum())} of {wrong.numel()} wrong, the first at {wrong.nonzero()[0].tolist()}: "
        f"{actual[wrong][0]:.9g}, expected {value[wrong][0]:.9g} ± {bound[wrong][0]:.3g}"
    )


def window_of(geometry: Geometry) -> Window:
    """The same as the library has it."""
    return Window(*geometry.stride, *geometry.padding, *geometry.dilation)


def check_convolution(
    partition: Partition,
    geometry: Geometry,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    activation: str = "none",
    grad_layout: Layout = torch.Tensor.contiguous,
    backend: Backend = NATIVE,
) -> None:
    """A backend against the oracle: forward pass and, through autograd, both gradients."""

    def forward(
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        residual: torch.Tensor | None,
    ) -> torch.Tensor:
        return reference.conv2d(x, weight, bias, partition, *geometry.window, None, residual)

    def input_grad(grad: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        size = geometry.input_size
        return reference.conv2d_input_grad(grad, weight, partition, size, *geometry.window)

    def weight_grad(grad: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        kernel = geometry.kernel_size
        return reference.conv2d_weight_grad(grad, x, partition, kernel, *geometry.window)

    x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_()
    differentiable = activation in FUSED_IN_TRAINING
    with torch.set_grad_enabled(differentiable):
        y = backend.convolve(x, weight, bias, residual, partition, window_of(geometry), activation)
    assert y.dtype == x.dtype
    assert_within_rounding(y, exact(forward, x, weight, bias, residual), activation)
    if not differentiable:
        return
    grad = grad_layout(torch.randn_like(y))
    x_grad, new_weight_grad = torch.autograd.grad(y, (x, weight), grad)
    if activation != "none":
        grad = grad * ((y > 0) & (y < 6) if activation == "relu6" else y > 0)
    assert x_grad.dtype == new_weight_grad.dtype == x.dtype
    assert_within_rounding(x_grad, exact(input_grad, grad, weight))
    assert_within_rounding(new_weight_grad, exact(weight_grad, grad, x))


def check_same_bits(
    partition: Partition,
    geometry: Geometry,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
) -> None:
    """Whatever the number of threads, and whichever images are beside one."""

    def call(x: torch.Tensor) -> torch.Tensor:
        return NATIVE.convolve(x, weight, bias, None, partition, window_of(geometry), "none")

    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = call(x)
        assert torch.equal(call(x[1:4]), alone[1:4])
        for count in (2, 3):
            torch.set_num_threads(count)
            assert torch.equal(call(x), alone)
    finally:
        torch.set_num_threads(threads)


def run_alone(test: str, *arguments: str, **environment: str) -> str:
    """What the file of a test prints when it is run as a program, in a process of its own.

    The program sees what lies beside the test, and the package that this process sees.
    """
    environment = os.environ | {"PYTHONSAFEPATH": ""} | environment
    run = subprocess.run(
        [sys.executable, test, *arguments], env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr[-2000:]
    return run.stdout
