"""The two-level convolution by the CUDA kernels, run on the CPU: see test_cuda_on_cpu."""

import ctypes
from typing import Any

import pytest
import torch
from cuda_cases import (
    CUDA_ON_CPU,
    DTYPES,
    ODD,
    SAME,
    Problem,
    assert_close,
    hostile_tables,
    overlapping,
    wide_overlap,
)
from cuda_on_cpu import build as builder
from helpers import LAYOUTS, needs_native

import groupconv_ext as gc
from groupconv_ext import Partition, _ops
from groupconv_ext._layout import is_channels_last
from groupconv_ext.window import Window

pytestmark = CUDA_ON_CPU

STRIDED = Window(2, 2, 1, 1, 1, 1, 1, 1)
CASES = {
    "pointwise": Problem(Partition.contiguous(16, 24, 4)),
    "3×3": Problem(Partition.contiguous(40, 24, 8), 2, (9, 11), (3, 3), SAME),
    "strided": Problem(Partition.contiguous(48, 36, 3), 2, (9, 8), (3, 3), STRIDED),
    "one channel a group": Problem(Partition.contiguous(70, 70, 70), 1, (5, 7), (3, 3), SAME),
    "more groups than a chunk": Problem(Partition.contiguous(90, 180, 45), 1, (9, 17)),
    "one group": Problem(Partition.contiguous(36, 70, 1), 2, (12, 11)),
    "more weights than fit": Problem(Partition.contiguous(160, 70, 1), 1, (6, 7), (3, 3), SAME),
    "neighbours in memory": Problem(Partition.contiguous(128, 136, 2), 2, (8, 24)),
    "ragged": Problem(Partition.random(61, 83, 7, seed=2, uneven=True), 2, (7, 9), (3, 2), ODD),
    "overlap, no inputs": Problem(overlapping(), 2, (5, 6), (3, 2), ODD),
    "wide overlap": Problem(wide_overlap(), 1, (4, 5), (2, 2), ODD),
}


class TwoLevels:
    """Operands of a problem with a second level, and its formula."""

    def __init__(self, problem: Problem, dtype: torch.dtype, channels_last: bool) -> None:
        p = self.partition = problem.partition
        self.problem = problem
        self.x, self.weight, self.bias = problem.tensors(dtype, channels_last)
        reads = sum(len(inputs) for inputs in p.inputs)
        self.restriction = torch.randn(reads, *problem.kernel).to(dtype)
        self.coarse = torch.randn(p.out_channels, p.groups).to(dtype)

    def arguments(self, table: torch.Tensor | None = None) -> tuple[Any, ...]:
        table = self.partition.cpu_table if table is None else table
        operands = (self.x, self.weight, self.restriction, self.coarse, self.bias, table)
        return (*operands, *self.problem.window)

    def expected(self) -> tuple[torch.Tensor, torch.Tensor]:
        """By the formula, in float64, z rounded as it is stored."""
        p, dtype = self.partition, self.x.dtype
        restrict = Partition(p.in_channels, p.groups, p.inputs, [[g] for g in range(p.groups)])
        lower = Problem(restrict, window=self.problem.window)
        z = lower.reference(self.x.double(), self.restriction.double())
        y = self.problem.reference(self.x.double(), self.weight.double(), self.bias.double())
        return y + torch.einsum("ng,bghw->bnhw", self.coarse.double(), z.to(dtype).double()), z


@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_both_levels(
    library: ctypes.CDLL, name: str, dtype: torch.dtype, channels_last: bool
) -> None:
    library.take_turns_backwards(ctypes.c_bool(channels_last != (dtype == torch.float16)))
    ops = getattr(torch.ops, builder.NAMESPACE)
    levels = TwoLevels(CASES[name], dtype, channels_last)
    y, z = ops.two_level(*levels.arguments())
    for found, expected in zip((y, z), levels.expected(), strict=True):
        assert_close(found, expected, dtype)
        assert is_channels_last(found) == is_channels_last(levels.x)
    again = ops.two_level(*levels.arguments())
    assert all(torch.equal(*pair) for pair in zip((y, z), again, strict=True))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_views(ops: Any, layout: str, dtype: torch.dtype) -> None:
    levels = TwoLevels(Problem(Partition.contiguous(24, 32, 4), 2, (9, 16)), dtype, False)
    levels.x = LAYOUTS[layout](levels.x)
    y, z = ops.two_level(*levels.arguments())
    for found, expected in zip((y, z), levels.expected(), strict=True):
        assert_close(found, expected, dtype)


def test_the_sum_of_both_levels_is_rounded_once(ops: Any) -> None:
    """A x = 1 + 2⁻¹⁰, S z = −1: the small part is lost if A x is rounded to bfloat16 first."""
    p = Partition.contiguous(8, 8, 2)
    levels = TwoLevels(Problem(p, 1, (3, 3)), torch.bfloat16, True)
    levels.x.fill_(1)
    levels.weight.zero_()[::4] = 1
    levels.weight[1::4] = 2.0**-10
    levels.restriction.zero_()[::4] = -1
    levels.coarse.zero_()[:, 0] = 1
    levels.bias.zero_()
    y, z = ops.two_level(*levels.arguments())
    assert (z == -1).all()
    assert (y == 2.0**-10).all()


@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("name", ["3×3", "more groups than a chunk"])
def test_tf32_where_it_is_allowed(ops: Any, name: str, channels_last: bool) -> None:
    levels = TwoLevels(CASES[name], torch.float32, channels_last)
    expected = levels.expected()[0]
    try:
        for allowed, least, most in ((True, 2e-5, 1e-3), (False, 0, 2e-6)):
            ops.allow_tf32(allowed)
            found = ops.two_level(*levels.arguments())[0].double()
            assert least <= ((found - expected).norm() / expected.norm()).item() <= most
    finally:
        ops.allow_tf32(False)


def test_a_strip_of_several_tiles(library: ctypes.CDLL) -> None:
    ops = getattr(torch.ops, builder.NAMESPACE)
    levels = TwoLevels(Problem(Partition.contiguous(8, 8, 2), 1, (500, 410)), torch.float16, True)
    assert_close(ops.two_level(*levels.arguments())[0], levels.expected()[0], torch.float16)


@needs_native
@pytest.mark.parametrize("where", ["x", "weight", "restriction", "coarse"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_what_is_infinite_stays_where_it_is(ops: Any, where: str, dtype: torch.dtype) -> None:
    """The zeros that a tile has for the blocks of other groups do not meet it."""
    levels = TwoLevels(CASES["3×3"], dtype, False)
    getattr(levels, where).view(-1)[4] = torch.inf  # of a window the middle: no padding
    y, z = ops.two_level(*levels.arguments())

    x, weight, restriction, bias = (
        t.double() for t in (levels.x, levels.weight, levels.restriction, levels.bias)
    )
    p, pointwise = levels.partition, (1, 1, 0, 0, 0, 0, 1, 1)
    one_each = Partition.contiguous(p.in_channels, p.groups, p.groups)
    lower = _ops.conv2d(x, restriction, None, None, one_each.cpu_table, p.groups, *SAME, 0)
    all_of_z = Partition.contiguous(p.groups, p.out_channels, 1)
    spread = levels.coarse.double().view(-1, 1, 1)
    upper = _ops.conv2d(
        lower, spread, None, None, all_of_z.cpu_table, p.out_channels, *pointwise, 0
    )
    both = _ops.conv2d(x, weight, bias, upper, p.cpu_table, p.out_channels, *SAME, 0)
    assert both.isfinite().any() or where == "restriction"
    assert not both.isfinite().all()
    rough = {"rtol": 0.1, "atol": 0.2} if dtype == torch.bfloat16 else {"rtol": 1e-9, "atol": 1e-9}
    torch.testing.assert_close((y.double(), z.double()), (both, lower), equal_nan=True, **rough)


@needs_native
@pytest.mark.usefixtures("in_their_place")
@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
def test_the_layer_and_its_gradients(channels_last: bool) -> None:
    layer = gc.nn.TwoLevelConv2d(18, 30, 3, stride=2, padding=1, groups=3).double()
    layout = torch.channels_last if channels_last else torch.contiguous_format
    x = torch.randn(2, 18, 9, 7, dtype=torch.float64).contiguous(memory_format=layout)
    leaves = (x.requires_grad_(), *layer.parameters())
    found = []
    for backend in ("native", "reference"):
        layer.backend = backend
        y = layer(x)
        found.append([y, *torch.autograd.grad(y, leaves, torch.cos(y.detach()))])
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("name", hostile_tables())
def test_hostile_table_gives_nan_and_touches_nothing(ops: Any, name: str) -> None:
    levels = TwoLevels(Problem(overlapping(), 1, (5, 6), (3, 3)), torch.float64, False)
    table = torch.from_numpy(hostile_tables()[name])
    if name == "too short":
        with pytest.raises(RuntimeError, match="too short for 3 groups"):
            ops.two_level(*levels.arguments(table))
        return
    assert ops.two_level(*levels.arguments(table))[0].isnan().all()


def test_other_groups_than_the_tables_give_nan(ops: Any) -> None:
    """z has as many channels as the caller says, whatever the table says."""
    levels = TwoLevels(Problem(overlapping(), 1, (5, 6)), torch.float64, False)
    for groups in (2, 4):
        levels.coarse = torch.randn(7, groups, dtype=torch.float64)
        y, z = ops.two_level(*levels.arguments())
        assert z.shape[1] == groups
        assert y.isnan().all()
        assert z.isnan().all()


def test_nothing_to_do(ops: Any) -> None:
    levels = TwoLevels(Problem(overlapping()), torch.float32, False)
    levels.x = levels.x[:0]
    y, z = ops.two_level(*levels.arguments())
    assert (y.shape, z.shape) == ((0, 7, 5, 6), (0, 3, 5, 6))


def test_what_does_not_fit_is_refused(ops: Any) -> None:
    good = TwoLevels(Problem(overlapping(), 1, (5, 6), (3, 3)), torch.float32, False).arguments()
    ops.two_level(*good)
    for at, value, message in (
        (0, good[0].double(), "another dtype"),
        (1, good[1][0], r"weight must have sizes \[entries, kh, kw\]"),
        (2, good[2][0], r"restriction must have sizes \[entries, kh, kw\]"),
        (2, good[2][..., :2], r"restriction has sizes \[8, 3, 2\], expected windows of 3×3"),
        (3, good[3][0], r"coarse must have sizes \[outputs, groups\], got \[3\]"),
        (3, good[3].double(), "coarse has another dtype"),
        (3, torch.zeros(9, 3), r"bias must have sizes \[9\], got \[7\]"),
        (3, torch.zeros(7, 20), "too short for 20 groups"),
        (4, torch.zeros(8), r"bias must have sizes \[7\], got \[8\]"),
        (5, good[5].long(), "int32"),
    ):
        bad = list(good)
        bad[at] = value
        with pytest.raises(RuntimeError, match=message):
            ops.two_level(*bad)
