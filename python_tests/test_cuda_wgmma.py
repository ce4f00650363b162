"""The kernels of Hopper's warp-group instructions, run on the CPU.

The instructions are emulated as the PTX ISA describes them (``cuda_on_cpu/warp_group.h``), and the
emulation is held against that text here: its layouts and examples are written down once more, as
they stand there.
"""

import ctypes
import faulthandler
import math
import os
import signal
import tempfile
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cuda_cases import CUDA_ON_CPU, SAME, Problem, assert_close
from cuda_on_cpu import build as builder

from groupconv_ext import Partition, reference
from groupconv_ext.window import Window

pytestmark = CUDA_ON_CPU

# ---- the emulation, against the PTX ISA ----------------------------------------------------------

Layout = tuple[tuple[tuple[int, ...], tuple[int, ...]], tuple[tuple[int, ...], tuple[int, ...]]]

# "Matrix Descriptor Format": bits 62 and 63.
MODES = {0: 0, 128: 1, 64: 2, 32: 3}

# Bytes of an element, whether K-major, bytes of the swizzle, both offsets in the descriptor's units
# of sixteen bytes, and the layout in elements: shapes and strides along M or N and along K. The
# first five are the section's own examples ("Strides"); the last two its canonical layouts with
# their letters filled in.
LAYOUTS: dict[str, tuple[int, bool, int, int, int, Layout]] = {
    "K-major, none, tf32": (4, True, 0, 16, 8, (((8, 2), (4, 32)), ((4, 4), (1, 64)))),
    "K-major, 32, tf32": (4, True, 32, 1, 16, (((8, 2), (8, 64)), ((4, 4), (1, 4)))),
    "MN-major, none, bf16": (2, False, 0, 16, 8, (((8, 1, 2), (1, 8, 64)), ((8, 2), (8, 128)))),
    "MN-major, 32, bf16": (2, False, 32, 16, 32, (((8, 2, 2), (1, 8, 128)), ((8, 2), (16, 256)))),
    "MN-major, 64, bf16": (2, False, 64, 32, 64, (((8, 4, 2), (1, 8, 256)), ((8, 2), (32, 512)))),
    "K-major, 128, bf16": (2, True, 128, 1, 64, (((8, 8), (64, 512)), ((8, 2), (1, 8)))),
    "MN-major, 128, bf16": (2, False, 128, 1, 64, (((8, 8), (1, 8)), ((8, 2), (64, 512)))),
}


def along(index: int, shape: tuple[int, ...], strides: tuple[int, ...]) -> int:
    """An index through nested dimensions, the first of which runs fastest."""
    offset = 0
    for size, stride in zip(shape, strides, strict=True):
        offset += index % size * stride
        index //= size
    return offset


def swizzle(address: int, bits: int) -> int:
    """``Swizzle<bits, 4, 3>``: as many bits from the fourth on change by those three further up."""
    return address ^ ((address >> 7) % 2**bits) << 4


def descriptor(start: int, leading: int, stride: int, mode: int) -> ctypes.c_uint64:
    return ctypes.c_uint64((start & 0x3FFFF) >> 4 | leading << 16 | stride << 32 | mode << 62)


@pytest.mark.parametrize("start", [0, 2048, 1024 * 37])
@pytest.mark.parametrize("name", LAYOUTS)
def test_elements_lie_where_the_descriptor_says(
    library: ctypes.CDLL, name: str, start: int
) -> None:
    size, k_major, swizzled, leading, stride, (lines, depths) = LAYOUTS[name]
    bits = 0 if swizzled == 0 else int(math.log2(swizzled // 16))
    matrix = descriptor(start, leading, stride, MODES[swizzled])
    for line in range(math.prod(lines[0])):
        for k in range(math.prod(depths[0])):
            expected = swizzle(start + size * (along(line, *lines) + along(k, *depths)), bits)
            found = library.matrix_address(matrix, line, k, ctypes.c_bool(k_major), size)
            assert found == expected, (line, k)


def test_a_matrix_within_swizzled_rows(library: ctypes.CDLL) -> None:
    """The swizzle is one of addresses, not of what the descriptor begins with."""
    for start in (4096 + 32, 4096 + 64, 4096 + 96):
        matrix = descriptor(start, 1, 64, MODES[128])
        for line in range(64):
            for k in range(16):
                plain = start + line * 128 + k * 2
                found = library.matrix_address(matrix, line, k, ctypes.c_bool(True), 2)
                assert found == swizzle(plain, 3)


def test_the_threads_of_a_warp_group_have_all_sums(library: ctypes.CDLL) -> None:
    """Figure "register fragment layout for accumulator matrix D" of ``wgmma .m64nNk16``."""
    seen = set()
    place = (ctypes.c_uint * 2)()
    for thread in range(128):
        warp, lane = divmod(thread, 32)
        for i in range(64):
            library.place_of_sum(thread, i, place)
            row = 16 * warp + lane // 4 + (8 if i % 4 >= 2 else 0)
            column = 8 * (i // 4) + 2 * (lane % 4) + i % 2
            assert tuple(place) == (row, column)
            seen.add((row, column))
    assert len(seen) == 64 * 128


# What is left out, and what the emulation says to it.
MISTAKES = {
    1: "reads what was not shown to it",
    3: "without a fence",
    4: "different products",
    5: "a factor changed under a product",
    6: "sums changed under a product",
    7: "ended with products under way",
}


def last_words(call: Callable[[], object]) -> tuple[int, str]:
    """The signal that a call ends its process with, and what it says before."""
    with tempfile.TemporaryFile() as said:
        child = os.fork()
        if child == 0:
            os.dup2(said.fileno(), 2)
            faulthandler.disable()  # which pytest has writing elsewhere
            call()
            os._exit(0)
        _, status = os.waitpid(child, 0)
        said.seek(0)
        return status & 0x7F, said.read().decode()


@pytest.mark.parametrize("backwards", [False, True], ids=["forwards", "backwards"])
def test_mistakes_are_found(library: ctypes.CDLL, backwards: bool) -> None:
    library.take_turns_backwards(ctypes.c_bool(backwards))
    library.one_product.restype = ctypes.c_float
    assert library.one_product(0) == 64 * 64 * 2 * 16
    for without, words in MISTAKES.items():
        died_of, said = last_words(lambda without=without: library.one_product(without))
        assert died_of == signal.SIGABRT, (without, said)
        assert words in said, (without, said)
    assert library.one_product(2) != 64 * 64 * 2 * 16  # a barrier: others' copies are not there yet


def test_descriptors_that_are_none_are_refused(library: ctypes.CDLL) -> None:
    for bit, words in ((14, "reserved"), (46, "reserved"), (52, "reserved"), (50, "base offset")):
        matrix = ctypes.c_uint64(1 << bit)
        died_of, said = last_words(lambda m=matrix: library.matrix_address(m, 0, 0, True, 2))
        assert died_of == signal.SIGABRT
        assert words in said


# ---- the kernels' descriptors --------------------------------------------------------------------


def test_what_the_kernels_store_is_what_their_descriptors_name(library: ctypes.CDLL) -> None:
    library.swizzled_descriptor.restype = ctypes.c_uint64
    base = 1024 * 50
    assert library.swizzled_descriptor(base) == descriptor(base, 1, 1024 // 16, 1).value
    for first in range(0, 64, 16):
        by_row = ctypes.c_uint64(library.swizzled_descriptor(base + first * 2))
        by_column = ctypes.c_uint64(library.swizzled_descriptor(base + first * 128))
        for line in range(64):
            for k in range(16):
                stored = base + 2 * library.swizzled_place(line, first + k)
                assert library.matrix_address(by_row, line, k, ctypes.c_bool(True), 2) == stored
                stored = base + 2 * library.swizzled_place(first + k, line)
                found = library.matrix_address(by_column, line, k, ctypes.c_bool(False), 2)
                assert found == stored


# ---- the kernels ---------------------------------------------------------------------------------


def overlapping() -> Partition:
    """Groups that share channels, one without any, some read by nobody."""
    inputs = [list(range(90)), [], list(range(70, 150)), [5, 149, 3]]
    outputs = [list(range(0, 140, 2)), [141], list(range(1, 140, 2)), [140, 142]]
    return Partition.from_lists(inputs, outputs, in_channels=160, out_channels=143)


CASES = {
    "in order": Problem(Partition.contiguous(128, 256, 2), 2, (9, 16)),
    "flat rows, long strips": Problem(Partition.contiguous(64, 64, 1), 3, (16, 20)),
    "permuted": Problem(Partition.random(150, 140, 2, seed=1), 1, (11, 13), (3, 3), SAME),
    "ragged, strided": Problem(
        Partition.random(130, 170, 3, seed=2, uneven=True),
        *(2, (9, 10), (3, 2), Window(2, 2, 1, 1, 0, 1, 1, 1)),
    ),
    "dilated": Problem(
        Partition.random(70, 66, 1, seed=5), 1, (7, 9), (2, 3), Window(1, 2, 2, 0, 3, 2, 3, 2)
    ),
    "overlapping": Problem(overlapping(), 1, (5, 6), (2, 2), Window(2, 3, 0, 2, 3, 1, 1, 1)),
    "small groups": Problem(Partition.random(96, 96, 8, seed=7), 2, (8, 9)),
    "more weights than fit": Problem(Partition.random(1190, 90, 1, seed=6), 1, (10, 15)),
}


def image_sizes(image: torch.Tensor | None) -> list[int]:
    return [0] * 8 if image is None else [*image.shape, *image.stride()]


def run(
    library: ctypes.CDLL,
    source: torch.Tensor,
    dest: torch.Tensor,
    weight: torch.Tensor,
    problem: Problem,
    *,
    rows: int,
    strip: int = 1,
    transposed: bool = False,
    residual: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    activation: int = 0,
    before: tuple[torch.Tensor, torch.Tensor] | None = None,
    table: torch.Tensor | None = None,
) -> torch.Tensor:
    """The kernel with tiles of so many rows and strips of so many tiles, whatever the problem."""
    p, w = problem.partition, problem.window
    table = p.cpu_table if table is None else table
    window = [*problem.kernel, w[0], w[1], *w[2:6], w[6], w[7]]
    sizes = [*image_sizes(source), *image_sizes(dest), *image_sizes(residual), *window]
    sizes += [len(table), p.in_channels, p.out_channels, p.entries]
    operands = [source, dest, residual, weight, bias, *(before or (None, None)), table]
    data = (ctypes.c_void_p * 8)(*(t.data_ptr() if t is not None else None for t in operands))
    library.be_hopper(ctypes.c_bool(True))
    try:
        status = library.run_wgmma(
            *(ctypes.c_bool(source.dtype == torch.bfloat16), rows, strip),
            *(ctypes.c_bool(transposed), ctypes.c_bool(weight.dim() == 4)),
            *(ctypes.c_bool(before is not None), activation),
            *((ctypes.c_int64 * len(sizes))(*sizes), data),
        )
    finally:
        library.be_hopper(ctypes.c_bool(False))
    assert status == 0
    return dest


@pytest.mark.parametrize(
    ("dtype", "channels_last", "rows", "strip"),
    [
        (torch.float16, False, 64, 1),
        (torch.float16, True, 128, 5),
        (torch.bfloat16, False, 128, 4),
        (torch.bfloat16, True, 64, 2),
    ],
    ids=["f16-nchw-64", "f16-nhwc-128", "bf16-nchw-128", "bf16-nhwc-64"],
)
@pytest.mark.parametrize("name", CASES)
def test_convolution_and_input_gradient(
    library: ctypes.CDLL, name: str, dtype: torch.dtype, channels_last: bool, rows: int, strip: int
) -> None:
    problem = CASES[name]
    library.take_turns_backwards(ctypes.c_bool(channels_last != (dtype == torch.bfloat16)))
    layout = torch.channels_last if channels_last else torch.contiguous_format
    x, weight, _ = problem.tensors(dtype, channels_last)
    wide = [t.double().requires_grad_() for t in (x, weight)]
    expected = problem.reference(*wide)

    y = torch.empty(expected.shape, dtype=dtype).contiguous(memory_format=layout)
    run(library, x, y, weight, problem, rows=rows, strip=strip)
    assert_close(y, expected.detach(), dtype)

    grad = torch.randn_like(y)
    (by_x,) = torch.autograd.grad(expected, wide[0], grad.double())
    found = torch.empty_like(x)
    run(library, grad, found, weight, problem, rows=rows, strip=strip, transposed=True)
    assert_close(found, by_x, dtype)


@pytest.mark.parametrize("backwards", [False, True], ids=["forwards", "backwards"])
@pytest.mark.parametrize("activation", list(reference.activations))
def test_epilogue_and_prologue(library: ctypes.CDLL, activation: str, backwards: bool) -> None:
    """And a weight that is stored whole, of which the blocks are read."""
    library.take_turns_backwards(ctypes.c_bool(backwards))
    problem = Problem(Partition.random(70, 90, 2, seed=3), 1, (6, 7), (3, 3), SAME)
    x, weight, bias = problem.tensors(torch.float16, not backwards)
    residual = torch.randn(1, 90, 6, 7).half().transpose(2, 3).contiguous().transpose(2, 3)
    scale, shift = torch.randn(2, 70)
    prepared = x.float() * scale[:, None, None] + shift[:, None, None]
    prepared = prepared.relu().half().double()
    y = torch.empty(1, 90, 6, 7, dtype=torch.float16)
    expected = problem.reference(
        prepared, weight.double(), bias.double(), activation, residual.double()
    )
    run(
        *(library, x, y, problem.partition.unpack(weight), problem),
        rows=128 if backwards else 64,
        residual=residual,
        bias=bias,
        activation=list(reference.activations).index(activation),
        before=(scale, shift),
    )
    assert_close(y, expected, torch.float16)


@pytest.mark.parametrize("where", ["weight", "input"])
def test_what_is_infinite_stays_where_it_is(library: ctypes.CDLL, where: str) -> None:
    """As in the kernels of multiply-adds, in which nothing is multiplied that does not exist."""
    ops = getattr(torch.ops, builder.NAMESPACE)
    problem = Problem(overlapping(), 1, (4, 5), (3, 3), SAME)
    p, window = problem.partition, problem.window
    x, weight, _ = problem.tensors(torch.bfloat16, True)
    grad = torch.randn(1, 143, 4, 5).bfloat16()
    for changed in {"weight": [weight], "input": [x, grad]}[where]:
        changed.as_strided((changed.numel(),), (1,))[5] = torch.inf
    wide_x, wide_weight, wide_grad = (t.double() for t in (x, weight, grad))
    expected = ops.conv2d(wide_x, wide_weight, None, None, p.cpu_table, 143, *window, 0)
    y = run(library, x, torch.empty(expected.shape).bfloat16(), weight, problem, rows=128)
    sizes = (p.cpu_table, 160, 4, 5, *window, True)
    by_x = ops.conv2d_input_grad(wide_grad, wide_weight, *sizes)
    found = torch.empty(by_x.shape).bfloat16()
    run(library, grad, found, weight, problem, rows=64, transposed=True)
    for ours, theirs in ((y, expected), (found, by_x)):
        torch.testing.assert_close(ours.double(), theirs, equal_nan=True, rtol=1e-2, atol=0.05)
        assert 0 < ours.isfinite().float().mean() < 1


def test_a_table_that_is_none_makes_nan(library: ctypes.CDLL) -> None:
    problem = CASES["small groups"]
    x, weight, _ = problem.tensors(torch.float16, False)
    table = problem.partition.cpu_table.clone()
    table[30] = 96
    y = run(library, x, torch.zeros(2, 96, 8, 9).half(), weight, problem, rows=64, table=table)
    assert y.isnan().all()


# ---- when they are taken -------------------------------------------------------------------------

ELEMENTS = {"f32": 0, "f64": 1, "f16": 2, "bf16": 3}


def chosen_rows(
    library: ctypes.CDLL,
    channels: tuple[int, int],
    groups: int,
    area: int,
    pixels: int,
    element: str = "f16",
    side: int = 256,
    *,
    two_level: bool = False,
) -> int:
    """The rows of a tile for warp-groups, or 0 where another kernel is chosen."""
    ins, outs = channels
    sizes = (ins, outs, ins * outs // groups, area, pixels, side)
    rows: int = library.wgmma_rows_of(
        ELEMENTS[element], *map(ctypes.c_int64, sizes), ctypes.c_bool(two_level)
    )
    return rows


def test_they_are_taken_on_hopper_for_groups_of_many_channels(library: ctypes.CDLL) -> None:
    batch = 256
    layers: list[tuple[tuple[Any, ...], int]] = [
        (((512, 512), 8, 9, batch * 14**2), 64),
        (((1024, 1024), 2, 1, batch * 14**2), 128),
        (((512, 512), 4, 1, batch * 28**2), 128),
        (((512, 512), 32, 9, batch * 14**2), 0),  # 16 channels a group
        (((512, 512), 8, 1, batch * 14**2), 0),  # one step for a tile: bound by memory
        (((1024, 1024), 1, 9, batch * 14**2), 0),  # a tile's weights would not stay
        (((512, 512), 8, 9, 14**2), 0),  # too few pixels
        (((512, 8), 8, 9, batch * 14**2), 0),  # too few outputs
        (((512, 512), 8, 9, batch * 14**2, "f32"), 0),
        (((512, 512), 8, 9, batch * 14**2, "f64"), 0),
        (((512, 512), 8, 9, batch * 14**2, "bf16"), 64),
        (((512, 512), 8, 9, batch * 14**2, "bf16", 2**30), 0),
    ]
    try:
        for layer, rows in layers:
            library.be_hopper(ctypes.c_bool(True))
            assert chosen_rows(library, *layer) == rows, layer
            assert chosen_rows(library, *layer, two_level=True) == 0, layer
            library.be_hopper(ctypes.c_bool(False))
            assert chosen_rows(library, *layer) == 0, layer
    finally:
        library.be_hopper(ctypes.c_bool(False))


def test_the_op_takes_them(library: ctypes.CDLL) -> None:
    ops = getattr(torch.ops, builder.NAMESPACE)
    library.take_turns_backwards(ctypes.c_bool(False))
    problem = Problem(Partition.random(256, 128, 2, seed=4), 1, (88, 96))
    # In channels_last, products of whole pixels come first.
    x, weight, bias = problem.tensors(torch.float16, False)
    table = problem.partition.cpu_table
    try:
        library.be_hopper(ctypes.c_bool(True))
        assert chosen_rows(library, (256, 128), 2, 1, 88 * 96) == 64
        assert chosen_rows(library, (256, 128), 2, 1, 87 * 96) == 0
        y = ops.conv2d(x, weight, bias, None, table, 128, *problem.window, 1)
    finally:
        library.be_hopper(ctypes.c_bool(False))
    expected = problem.reference(x.double(), weight.double(), bias.double(), "relu")
    assert_close(y, expected, torch.float16)
