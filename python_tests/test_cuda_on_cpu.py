"""The CUDA kernels, their launchers and their ops, run on the CPU: no GPU is needed to check them.

`cuda_on_cpu/` turns them into plain C++ with a fiber for every thread; all that stays unchecked is
what only a GPU has: its scheduler, its instructions and its speed.
"""

import ctypes
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from cuda_cases import (
    CASES,
    CUDA_ON_CPU,
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
from groupconv_ext import Partition, _ops, reference
from groupconv_ext._layout import is_channels_last

pytestmark = CUDA_ON_CPU


@pytest.mark.parametrize(
    ("dtype", "channels_last"),
    [
        (torch.float64, False),
        (torch.float64, True),
        (torch.float32, False),
        (torch.bfloat16, True),
        (torch.float16, False),
        (torch.float16, True),
    ],
    ids=lambda value: str(value) if isinstance(value, torch.dtype) else ("nchw", "nhwc")[value],
)
@pytest.mark.parametrize("name", CASES)
def test_convolution_and_gradients(
    library: ctypes.CDLL, name: str, dtype: torch.dtype, channels_last: bool
) -> None:
    problem = CASES[name]
    ops = getattr(torch.ops, builder.NAMESPACE)
    library.take_turns_backwards(ctypes.c_bool(channels_last != (dtype == torch.float32)))
    p, window, kernel = problem.partition, problem.window, problem.kernel
    x, weight, _ = problem.tensors(dtype, channels_last)
    wide = [t.double().requires_grad_() for t in (x, weight)]
    expected = problem.reference(*wide)
    table, entries = p.cpu_table, p.entries

    y = ops.conv2d(x, weight, None, None, table, p.out_channels, *window, 0)
    assert_close(y, expected.detach(), dtype)
    assert is_channels_last(y) == is_channels_last(x)

    grad = torch.randn_like(y)
    by_x, by_weight = torch.autograd.grad(expected, wide, grad.double())
    found = ops.conv2d_input_grad(
        grad, weight, table, p.in_channels, *problem.size, *window, channels_last
    )
    assert_close(found, by_x, dtype)
    found = ops.conv2d_weight_grad(grad, x, table, entries, *kernel, *window)
    assert_close(found, by_weight, dtype)
    again = ops.conv2d_weight_grad(grad, x, table, entries, *kernel, *window)
    assert torch.equal(found, again)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_views(library: ctypes.CDLL, layout: str, dtype: torch.dtype) -> None:
    """Any strides, any alignment, for every image."""
    ops = getattr(torch.ops, builder.NAMESPACE)
    p, window = Partition.random(24, 32, 2, seed=12), SAME
    problem = Problem(p, 2, (9, 16), (3, 3), window)
    x, weight, _ = problem.tensors(dtype, False)
    x = LAYOUTS[layout](x)
    residual = LAYOUTS[layout](torch.randn(2, 32, 9, 16).to(dtype))
    wide = [t.double().requires_grad_() for t in (x, weight)]
    expected = problem.reference(*wide)
    y = ops.conv2d(x, weight, None, residual, p.cpu_table, 32, *window, 0)
    assert_close(y, expected.detach() + residual.double(), dtype)
    grad = LAYOUTS[layout](torch.randn(2, 32, 9, 16).to(dtype))
    by_x, by_weight = torch.autograd.grad(expected, wide, grad.double())
    for last in (False, True):
        found = ops.conv2d_input_grad(grad, weight, p.cpu_table, 24, 9, 16, *window, last)
        assert_close(found, by_x, dtype)
    found = ops.conv2d_weight_grad(grad, x, p.cpu_table, p.entries, 3, 3, *window)
    assert_close(found, by_weight, dtype)


@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("name", ["strided", "many pixels", "small groups", "neighbours in memory"])
def test_tf32_where_it_is_allowed(ops: Any, name: str, channels_last: bool) -> None:
    """Operands are rounded to eleven bits, sums stay float32; without leave nothing is rounded."""
    problem = CASES[name]
    p, window, kernel = problem.partition, problem.window, problem.kernel
    x, weight, _ = problem.tensors(torch.float32, channels_last)
    wide = [t.double().requires_grad_() for t in (x, weight)]
    expected = problem.reference(*wide)
    grad = torch.randn_like(expected).float()
    exact = [expected.detach(), *torch.autograd.grad(expected, wide, grad.double())]

    def run(allowed: bool) -> list[torch.Tensor]:
        ops.allow_tf32(allowed)
        y = ops.conv2d(x, weight, None, None, p.cpu_table, p.out_channels, *window, 0)
        sizes = (p.in_channels, *problem.size, *window, channels_last)
        by_x = ops.conv2d_input_grad(grad, weight, p.cpu_table, *sizes)
        by_weight = ops.conv2d_weight_grad(grad, x, p.cpu_table, p.entries, *kernel, *window)
        return [y, by_x, by_weight]

    try:
        for rounded, found in zip(run(True), exact, strict=True):
            error = ((rounded.double() - found).norm() / found.norm()).item()
            assert 2e-5 < error < 1e-3
        for ieee, found in zip(run(False), exact, strict=True):
            assert_close(ieee, found, torch.float32)
    finally:
        ops.allow_tf32(False)


@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
def test_a_strip_of_several_tiles(library: ctypes.CDLL, channels_last: bool) -> None:
    p = Partition.random(8, 8, 2, seed=8)
    ops = getattr(torch.ops, builder.NAMESPACE)
    x, weight, _ = Problem(p, 1, (500, 410)).tensors(torch.float16, channels_last)
    y = ops.conv2d(x, weight, None, None, p.cpu_table, 8, 1, 1, 0, 0, 0, 0, 1, 1, 0)
    assert_close(y, reference.conv2d(x.double(), weight.double(), None, p), torch.float16)


@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("activation", list(reference.activations))
def test_epilogue(ops: Any, activation: str, channels_last: bool) -> None:
    problem = CASES["overlap, no inputs"]
    p = problem.partition
    x, weight, bias = problem.tensors(torch.float64, channels_last)
    x[0, :, 0, 0] = torch.nan
    residual = torch.randn_like(problem.reference(x, weight)).transpose(2, 3).contiguous()
    residual = residual.transpose(2, 3)
    expected = problem.reference(x, weight, bias, activation, residual)
    code = list(reference.activations).index(activation)
    y = ops.conv2d(x, weight, bias, residual, p.cpu_table, p.out_channels, *problem.window, code)
    torch.testing.assert_close(y, expected, equal_nan=True)


@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("activation", ["none", "relu", "relu6"])
def test_backward(ops: Any, activation: str, channels_last: bool) -> None:
    problem = Problem(Partition.random(21, 45, 3, seed=5), 3, (37, 9), (3, 3), SAME)
    p = problem.partition
    x, weight, bias = problem.tensors(torch.float64, channels_last)
    operands = [t.requires_grad_() for t in (x, weight, bias)]
    y = problem.reference(*operands, activation, None)
    grad = torch.randn_like(y)
    expected = torch.autograd.grad(y, operands, grad)
    code = list(reference.activations).index(activation)
    output = None if activation == "none" else y.detach()
    call = (grad, output, x.detach(), weight.detach(), p.cpu_table, *problem.window, code)
    found = ops.conv2d_backward(*call, True, True, True)
    torch.testing.assert_close(found, expected)
    assert [g.numel() for g in ops.conv2d_backward(*call, False, False, False)] == [0, 0, 0]


@needs_native
@pytest.mark.usefixtures("in_their_place")
@pytest.mark.parametrize("ops", [True], ids=["backwards"], indirect=True)
@pytest.mark.parametrize("name", ["overlap, no inputs", "strided"])
def test_derivatives_of_derivatives(name: str) -> None:
    problem = CASES[name]
    x, weight, bias = problem.tensors(torch.float64, False)
    w = problem.window

    def run(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        padded = torch.nn.functional.pad(x, (w[4], w[5], w[2], w[3]))
        settings: dict[str, Any] = {"stride": (w[0], w[1]), "dilation": (w[6], w[7])}
        settings |= {"partition": problem.partition, "backend": "native"}
        return gc.conv2d(padded, weight, bias, **settings)

    operands = [t[:1].clone() if t is x else t for t in (x, weight, bias)]
    operands = [t.requires_grad_() for t in operands]
    assert torch.autograd.gradcheck(run, operands, fast_mode=True)
    assert torch.autograd.gradgradcheck(run, operands, fast_mode=True)


@needs_native
@pytest.mark.usefixtures("in_their_place")
@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("relu", [False, True], ids=["affine", "relu"])
def test_prologue(relu: bool, channels_last: bool) -> None:
    problem = CASES["wide overlap"]
    p, w = problem.partition, problem.window
    x, weight, bias = problem.tensors(torch.float64, channels_last)
    scale, shift = torch.randn(2, p.in_channels, dtype=torch.float64)
    operands = [t.requires_grad_() for t in (x, weight, bias, scale, shift)]

    def run(backend: str) -> list[torch.Tensor]:
        before = gc.Prologue(scale, shift, "relu" if relu else None)
        settings: dict[str, Any] = {"stride": (w[0], w[1]), "padding": 1, "partition": p}
        y = gc.conv2d(x, weight, bias, prologue=before, backend=backend, **settings)
        return [y, *torch.autograd.grad(y, operands, torch.cos(y.detach()))]

    torch.testing.assert_close(run("native"), run("reference"))


@pytest.mark.parametrize("where", ["weight", "input", "gradient"])
def test_what_is_infinite_stays_where_it_is(ops: Any, where: str) -> None:
    """A tile's zeros, for padding or for another group, times infinity are nobody's product."""
    p = wide_overlap()
    problem = Problem(p, 1, (4, 5), (3, 3), SAME)
    x, weight, _ = problem.tensors(torch.float64, False)
    grad = torch.randn_like(problem.reference(x, weight))
    {"weight": weight, "input": x, "gradient": grad}[where].view(-1)[5] = torch.inf
    sizes = (p.cpu_table, p.in_channels, *problem.size, *problem.window, False)
    by_x = ops.conv2d_input_grad(grad, weight, *sizes)
    by_weight = ops.conv2d_weight_grad(grad, x, p.cpu_table, p.entries, 3, 3, *problem.window)
    torch.testing.assert_close(by_x, _ops.conv2d_input_grad(grad, weight, *sizes), equal_nan=True)
    torch.testing.assert_close(
        by_weight,
        _ops.conv2d_weight_grad(grad, x, p.cpu_table, p.entries, 3, 3, *problem.window),
        equal_nan=True,
    )


def assert_same_where_infinite(found: torch.Tensor, exact: torch.Tensor) -> None:
    wide = found.double()
    assert torch.equal(wide.isnan(), exact.isnan())
    assert torch.equal(wide.isinf(), exact.isinf())
    finite = exact.isfinite()
    assert not finite.all()
    assert finite.any()
    assert_close(torch.where(finite, found, 0), torch.where(finite, exact, 0), found.dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16], ids=str)
@pytest.mark.parametrize("overlap", [True, False], ids=["overlap", "small groups"])
def test_infinity_at_the_edges_of_tiles(ops: Any, overlap: bool, dtype: torch.dtype) -> None:
    """As above in every kernel with tiles: first and last pixel of tiles of 64, 128 and 256."""
    p = wide_overlap() if overlap else Partition.random(48, 48, 8, seed=8)
    problem = Problem(p, 1, (16, 16), (3, 3), SAME)
    x, weight, _ = problem.tensors(dtype, False)
    for pixel in (0, 63, 64, 127, 128, 255):
        x[0, pixel % 48].view(-1)[pixel] = torch.inf
    wide = [t.double() for t in (x, weight)]
    y = ops.conv2d(x, weight, None, None, p.cpu_table, p.out_channels, *SAME, 0)
    assert_same_where_infinite(y, problem.reference(*wide))

    grad = torch.randn(y.shape).to(dtype)
    for pixel in (0, 63, 64, 127, 128, 255):
        grad[0, pixel % 48].view(-1)[pixel] = torch.inf
    # PyTorch's own gradients multiply infinity by the padding, too.
    sizes = (p.cpu_table, p.in_channels, 16, 16, *SAME, False)
    found = ops.conv2d_input_grad(grad, weight, *sizes)
    assert_same_where_infinite(found, _ops.conv2d_input_grad(grad.double(), wide[1], *sizes))
    sizes = (p.cpu_table, p.entries, 3, 3, *SAME)
    found = ops.conv2d_weight_grad(grad, x, *sizes)
    assert_same_where_infinite(found, _ops.conv2d_weight_grad(grad.double(), wide[0], *sizes))


def test_no_launch_takes_memory_from_another(library: ctypes.CDLL) -> None:
    """A thread may launch a kernel between another's asking for memory and its launch."""
    ops = getattr(torch.ops, builder.NAMESPACE)
    for channels in (256, 32, 128):  # with fewer weights a block takes less
        p = Partition.contiguous(channels, 32, 1)
        x, weight, _ = Problem(p).tensors(torch.float16, False)
        y = ops.conv2d(x, weight, None, None, p.cpu_table, 32, 1, 1, 0, 0, 0, 0, 1, 1, 0)
        expected = reference.conv2d(x.double(), weight.double(), None, p)
        assert_close(y, expected, torch.float16)
    assert library.memory_taken_back() == 0


def random_partition(rng: np.random.Generator) -> Partition:
    """Uneven, with empty groups, overlaps, repetitions of whole lists and channels left out."""
    ins, outs, groups = (int(rng.integers(1, most)) for most in (40, 40, 9))
    labels = rng.integers(0, groups, outs)
    outputs = [rng.permutation(np.flatnonzero(labels == g)).tolist() for g in range(groups)]
    kind = rng.integers(3)
    if kind == 0:
        labels = rng.integers(0, groups + 1, ins)  # the last label: nobody's
        inputs = [rng.permutation(np.flatnonzero(labels == g)).tolist() for g in range(groups)]
    else:
        share = rng.random() ** kind
        inputs = [np.flatnonzero(rng.random(ins) < share).tolist() for _ in range(groups)]
    return Partition.from_lists(inputs, outputs, in_channels=ins, out_channels=outs)


def test_random_partitions(library: ctypes.CDLL) -> None:
    """What the plan says, through every kernel that reads it, on images of one pixel."""
    ops = getattr(torch.ops, builder.NAMESPACE)
    rng = np.random.default_rng(int(torch.randint(2**31, ()).item()))
    for round_ in range(120):
        library.take_turns_backwards(ctypes.c_bool(round_ % 2 == 1))
        p = random_partition(rng)
        dtype = (torch.float64, torch.float16)[round_ // 2 % 2]
        x, weight, _ = Problem(p, 1, (1, 1)).tensors(dtype, False)
        dense = p.unpack(weight.double())[:, :, 0, 0]
        window = (1, 1, 0, 0, 0, 0, 1, 1)
        y = ops.conv2d(x, weight, None, None, p.cpu_table, p.out_channels, *window, 0)
        assert_close(y.flatten(), dense @ x.double().flatten(), dtype)
        by_x = ops.conv2d_input_grad(y, weight, p.cpu_table, p.in_channels, 1, 1, *window, False)
        assert_close(by_x.flatten(), y.double().flatten() @ dense, dtype)
        by_weight = ops.conv2d_weight_grad(y, x, p.cpu_table, p.entries, 1, 1, *window)
        outer = torch.outer(y.double().flatten(), x.double().flatten())[:, :, None, None]
        assert_close(by_weight, p.pack(outer), dtype)


@pytest.mark.parametrize("round_", range(4))
def test_plans_of_random_partitions(library: ctypes.CDLL, round_: int) -> None:
    """Every row and every weight is in one tile, whatever the tiles."""
    library.take_turns_backwards(ctypes.c_bool(round_ % 2 == 1))
    library.check_plan.restype = ctypes.c_char_p
    rng = np.random.default_rng(int(torch.randint(2**31, ()).item()))
    for _ in range(200):
        p = random_partition(rng)
        table = p.cpu_table.numpy()
        transposed = bool(rng.integers(2))
        rows = int(rng.integers(1, 20))
        columns = 0 if transposed else int(rng.integers(20))
        tiles = (ctypes.c_int64(rows), ctypes.c_int64(columns), ctypes.c_bool(rng.integers(2)))
        sizes = (ctypes.c_int64(len(table)), ctypes.c_int64(p.entries), ctypes.c_bool(transposed))
        answer = library.check_plan(ctypes.c_void_p(table.ctypes.data), *sizes, *tiles)
        assert not answer, (answer, p, transposed, rows, columns)


def test_choices_keep_within_their_bounds(library: ctypes.CDLL) -> None:
    """Shared by all sizes: memory for slices, short types alone on tensor cores, no overflow."""
    rng = np.random.default_rng(int(torch.randint(2**31, ()).item()))
    found = (ctypes.c_int64 * 9)()
    for _ in range(5000):
        element = int(rng.integers(4))
        ins, outs = (int(2 ** (rng.random() * 14)) for _ in range(2))
        entries = int(ins * outs * rng.random())
        area, pixels = int(rng.integers(1, 50)), int(2 ** (rng.random() * 40))
        side = int(2 ** (rng.random() * 40))
        sizes = (ins, outs, 100 + 3 * (ins + outs), entries, area, pixels, side)
        library.choices(element, *map(ctypes.c_int64, sizes), found)
        kernel, rows, words, grad_kernel, side_of_tile, slices, channel_slices, blocks, two = found
        on_tensor_cores = kernel >= 3
        assert on_tensor_cores <= (element >= 2 and side < 2**30)
        assert (grad_kernel >= 2) == on_tensor_cores
        assert two >= 3 if on_tensor_cores else two >= 2  # those that have coarse channels
        assert (two >= 3) <= (element >= 2 and side < 2**30)
        assert rows in (4, 16, 32, 64)
        assert side_of_tile in (16, 32, 64)
        assert words > 0
        assert 1 <= slices <= 1024
        assert slices == 1 or slices * entries * area <= 2**24
        assert slices == 1 or pixels // slices >= 256
        assert channel_slices == 1 or channel_slices * outs <= 2**15
        assert 1 <= blocks <= 528
        assert blocks == 1 or blocks * entries <= 2**24


# ---- bad input ----------------------------------------------------------------------------------


Call = Callable[[Any, Problem, torch.Tensor], torch.Tensor]


def forward_with(ops: Any, problem: Problem, table: torch.Tensor) -> torch.Tensor:
    x, weight, _ = problem.tensors(torch.float64, False)
    y: torch.Tensor = ops.conv2d(x, weight, None, None, table, 7, *problem.window, 0)
    return y


def input_grad_with(ops: Any, problem: Problem, table: torch.Tensor) -> torch.Tensor:
    x, weight, _ = problem.tensors(torch.float64, False)
    grad = torch.ones_like(problem.reference(x, weight))
    y: torch.Tensor = ops.conv2d_input_grad(
        grad, weight, table, 8, *problem.size, *problem.window, False
    )
    return y


def weight_grad_with(ops: Any, problem: Problem, table: torch.Tensor) -> torch.Tensor:
    x, weight, _ = problem.tensors(torch.float64, False)
    grad = torch.ones_like(problem.reference(x, weight))
    entries = weight.shape[0]
    y: torch.Tensor = ops.conv2d_weight_grad(
        grad, x, table, entries, *problem.kernel, *problem.window
    )
    return y


@pytest.mark.parametrize("call", [forward_with, input_grad_with, weight_grad_with])
@pytest.mark.parametrize("name", hostile_tables())
def test_hostile_table_gives_nan_and_touches_nothing(ops: Any, name: str, call: Call) -> None:
    problem = Problem(overlapping(), 1, (5, 6), (3, 3))
    table = torch.from_numpy(hostile_tables()[name])
    assert call(ops, problem, table).isnan().all()


def test_a_group_that_reads_a_channel_twice_has_no_input_gradient(ops: Any) -> None:
    table = overlapping().cpu_table.clone()
    table[12] = 3  # group 0 reads 3, 3, 5
    assert table[12:15].tolist() == [3, 3, 5]
    assert input_grad_with(ops, Problem(overlapping()), table).isnan().all()


def test_nothing_to_do(ops: Any) -> None:
    p = overlapping()
    x, weight = torch.zeros(0, 8, 3, 3), torch.randn(p.entries, 3, 3)
    y = ops.conv2d(x, weight, None, None, p.cpu_table, 7, *SAME, 0)
    assert y.shape == (0, 7, 3, 3)
    found = ops.conv2d_backward(y, None, x, weight, p.cpu_table, *SAME, 0, True, True, True)
    assert [tuple(g.shape) for g in found] == [(0, 8, 3, 3), tuple(weight.shape), (7,)]
    assert all(torch.equal(g, torch.zeros_like(g)) for g in found)


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "table of int64": ({"table": torch.zeros(30, dtype=torch.int64)}, "int32"),
    "short table": ({"table": torch.zeros(9, dtype=torch.int32)}, "at least 15 entries"),
    "dtype": ({"x": torch.zeros(1, 8, 5, 6, dtype=torch.int32)}, "dtype"),
    "weight dtype": ({"weight": torch.zeros(21, 1, 1, dtype=torch.float16)}, "another dtype"),
    "weight rank": ({"weight": torch.zeros(21, 1)}, r"\[entries, kh, kw\], got \[21, 1\]"),
    "bias": ({"bias": torch.zeros(8)}, r"bias must have sizes \[7\], got \[8\]"),
    "residual": ({"residual": torch.zeros(1, 7, 5, 5)}, r"residual has sizes \[1, 7, 5, 5\]"),
    "activation": ({"activation": 9}, "activation must be 0 .*, got 9"),
    "image": ({"x": torch.zeros(8, 5, 6)}, r"must have 4 dimensions, got sizes \[8, 5, 6\]"),
    "freed": ({"x": "freed"}, "reaches beyond its memory"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_does_not_fit_is_refused(ops: Any, name: str) -> None:
    change, message = WRONG[name]
    p = overlapping()
    given: dict[str, Any] = {"x": torch.zeros(1, 8, 5, 6), "weight": torch.zeros(p.entries, 1, 1)}
    given |= {"bias": None, "residual": None, "table": p.cpu_table, "activation": 0} | change
    if given["x"] == "freed":
        given["x"] = torch.zeros(1, 8, 5, 6)
        given["x"].untyped_storage().resize_(0)
    pointwise = (1, 1, 0, 0, 0, 0, 1, 1)
    operands = (given[key] for key in ("x", "weight", "bias", "residual", "table"))
    with pytest.raises((RuntimeError, NotImplementedError), match=message):
        ops.conv2d(*operands, 7, *pointwise, given["activation"])


def test_memory_that_there_is_not(ops: Any) -> None:
    """How much of it the Python above these asks torch for once more."""
    p = Partition.contiguous(2, 2048, 2)
    x = torch.zeros(1, 1, 1, 1).expand(1, 2, 1 << 19, 1 << 19)
    weight = torch.ones(p.entries, 1, 1)
    window = (1, 1, 0, 0, 0, 0, 1, 1)
    with pytest.raises(RuntimeError, match=f"out of memory: {2**51} bytes could not be allocated"):
        ops.conv2d(x, weight, None, None, p.cpu_table, p.out_channels, *window, 0)
    grad = torch.zeros(1, 1, 1, 1).expand(1, 2048, 1, 1)
    table, entries = p.cpu_table, 1 << 46
    with pytest.raises(RuntimeError, match=f"out of memory: {2**48} bytes could not be allocated"):
        ops.conv2d_weight_grad(grad, x[:, :, :1, :1], table, entries, 1, 1, *window)
