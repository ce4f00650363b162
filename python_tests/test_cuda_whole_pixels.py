"""Products of whole channels_last pixels on tensor cores, run on the CPU: see test_cuda_on_cpu."""

import ctypes
import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from cuda_cases import CUDA_ON_CPU, TOLERANCE, Problem, assert_close
from cuda_on_cpu import build as builder
from helpers import needs_native

import groupconv_ext as gc
from groupconv_ext import Partition, reference
from groupconv_ext.window import POINTWISE, Window

pytestmark = CUDA_ON_CPU

TF32 = 1e-3  # of the norm: operands have eleven bits


def overlapping() -> Partition:
    """Groups that share inputs, one without any, and inputs that nobody reads."""
    inputs = [[7, 3, 21, 0, 5], [], [5, 1, 0, 6, 2, 30, 31, 29, 8, 22, 23, 11, 10], [30, 3, 12]]
    order = [o * 5 % 32 for o in range(32)]
    outputs = [order[:9], order[9:11], order[11:25], order[25:]]
    return Partition.from_lists(inputs, outputs, in_channels=40, out_channels=32)


def ragged() -> Partition:
    """One group of more rows and sources than a tile or a step has, beside groups of a few."""
    order = torch.randperm(192, generator=torch.Generator().manual_seed(1)).tolist()
    cuts = [0, 75, 76, 76, 80, 83, 120, 160, 168, 192]
    outs = [0, 70, 71, 72, 75, 75, 110, 159, 160, 160]
    inputs = [order[a:b] for a, b in itertools.pairwise(cuts)]
    outputs = [[o * 3 % 160 for o in range(a, b)] for a, b in itertools.pairwise(outs)]
    return Partition.from_lists(inputs, outputs, in_channels=192, out_channels=160)


PARTITIONS = {
    "even": Partition.random(64, 96, 4, seed=1),
    "small groups": Partition.random(96, 48, 12, seed=2),
    "wide groups": Partition.random(160, 176, 2, seed=3),
    "wide tiles": Partition.random(72, 512, 2, seed=4),
    "wide tiles backward": Partition.random(512, 72, 2, seed=5),
    "contiguous": Partition.contiguous(64, 64, 4),
    "contiguous, with a short step": Partition.contiguous(40, 40, 5),
    "ragged": ragged(),
    "overlapping": overlapping(),
}


class Launches:
    """How often products of whole pixels were launched."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self.library = library
        for name in ("narrow", "wide"):
            getattr(library, f"{name}_whole_pixel_launches").restype = ctypes.c_int64

    def wide(self) -> int:
        return int(self.library.wide_whole_pixel_launches())

    def all(self) -> int:
        return self.wide() + int(self.library.narrow_whole_pixel_launches())

    @contextmanager
    def expected(self, count: int, wide: int = 0) -> Iterator[None]:
        before = self.all(), self.wide()
        yield
        assert (self.all() - before[0], self.wide() - before[1]) == (count, wide)


@pytest.fixture
def launches(library: ctypes.CDLL) -> Launches:
    return Launches(library)


@pytest.fixture
def tf32(library: ctypes.CDLL) -> Iterator[None]:
    allow = getattr(torch.ops, builder.NAMESPACE).allow_tf32
    allow(True)
    yield
    allow(False)


def assert_near(found: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> None:
    """As products in float32 as TF32 may be, and others must be."""
    if dtype != torch.float32:
        assert_close(found, expected, dtype)
        return
    assert found.dtype == dtype
    assert found.shape == expected.shape
    error = (found.double() - expected).norm() / (expected.norm() + 1e-30)
    assert TOLERANCE[dtype] < error < TF32 or not expected.any()


@pytest.mark.usefixtures("tf32")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", PARTITIONS)
def test_convolution_and_input_gradient(
    ops: Any, launches: Launches, name: str, dtype: torch.dtype
) -> None:
    """Several runs of pixels for a block, the last of which is not full."""
    p = PARTITIONS[name]
    problem = Problem(p, 3, (9, 13))
    x, weight, bias = problem.tensors(dtype, True)
    wide = [t.double().requires_grad_() for t in (x, weight)]
    expected = problem.reference(*wide, bias.double())
    is_wide = name.startswith("wide tiles")
    fitting = 1 if is_wide and dtype == torch.float32 else 2  # two runs of 512 sources do not
    with launches.expected(fitting, wide=is_wide):
        y = ops.conv2d(x, weight, bias, None, p.cpu_table, p.out_channels, *POINTWISE, 0)
        grad = torch.randn_like(y)
        by_x = ops.conv2d_input_grad(
            grad, weight, p.cpu_table, p.in_channels, 9, 13, *POINTWISE, True
        )
    assert_near(y, expected.detach(), dtype)
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert_near(by_x, torch.autograd.grad(expected, wide[0], grad.double())[0], dtype)
    unread = sorted(set(range(p.in_channels)) - {c for group in p.inputs for c in group})
    assert not by_x[:, unread].any()


@pytest.mark.parametrize("activation", list(reference.activations))
@pytest.mark.parametrize("with_residual", [False, True], ids=["", "residual"])
def test_epilogue(ops: Any, launches: Launches, activation: str, with_residual: bool) -> None:
    p = PARTITIONS["ragged"]
    problem = Problem(p, 2, (8, 19))
    x, weight, bias = problem.tensors(torch.float16, True)
    residual = torch.randn_like(problem.reference(x.float(), weight.float())).half()
    residual = residual.contiguous(memory_format=torch.channels_last) if with_residual else None
    wide = [None if t is None else t.double() for t in (x, weight, bias, residual)]
    expected = problem.reference(*wide[:3], activation, wide[3])
    code = list(reference.activations).index(activation)
    with launches.expected(1):
        y = ops.conv2d(x, weight, bias, residual, p.cpu_table, 160, *POINTWISE, code)
    assert_close(y, expected, torch.float16)


@needs_native
@pytest.mark.usefixtures("in_their_place")
@pytest.mark.parametrize("relu", [False, True], ids=["affine", "relu"])
def test_prologue(launches: Launches, relu: bool) -> None:
    p = PARTITIONS["overlapping"]
    problem = Problem(p, 2, (7, 11))
    x, weight, bias = problem.tensors(torch.bfloat16, True)
    before = gc.Prologue(
        torch.randn(40).bfloat16(), torch.randn(40).bfloat16(), "relu" if relu else None
    )
    with launches.expected(1):
        y = gc.conv2d(x, weight, bias, partition=p, prologue=before, backend="native")
    exact = gc.conv2d(
        x.double(),
        weight.double(),
        bias.double(),
        partition=p,
        prologue=gc.Prologue(before.scale.double(), before.shift.double(), before.activation),
        backend="reference",
    )
    assert_close(y, exact, torch.bfloat16)


@pytest.mark.parametrize("stride", [(2, 2), (1, 3), (20, 2)])
def test_strides(ops: Any, launches: Launches, stride: tuple[int, int]) -> None:
    """Other pixels are read; in the input gradient, most receive nothing."""
    p = PARTITIONS["even"]
    window = Window(*stride, 0, 0, 0, 0, 1, 1)
    problem = Problem(p, 2, (9, 14), window=window)
    x, weight, _ = problem.tensors(torch.float16, True)
    wide = [t.double().requires_grad_() for t in (x, weight)]
    expected = problem.reference(*wide)
    with launches.expected(2):
        y = ops.conv2d(x, weight, None, None, p.cpu_table, 96, *window, 0)
        grad = torch.randn_like(y)
        by_x = ops.conv2d_input_grad(grad, weight, p.cpu_table, 64, 9, 14, *window, True)
    assert_close(y, expected.detach(), torch.float16)
    assert_close(by_x, torch.autograd.grad(expected, wide[0], grad.double())[0], torch.float16)


def test_pixels_apart(ops: Any, launches: Launches) -> None:
    """Channels cut out of wider pixels, rows out of wider images: whole all the same."""
    p = PARTITIONS["even"]
    x = torch.randn(2, 11, 17, 80).half()[:, 1:8, 2:15, 16:].permute(0, 3, 1, 2)
    residual = torch.randn(2, 9, 13, 112).half()[:, 2:, :, 8:104].permute(0, 3, 1, 2)
    weight = torch.randn(p.entries, 1, 1).half()
    with launches.expected(1):
        y = ops.conv2d(x, weight, None, residual, p.cpu_table, 96, *POINTWISE, 0)
    expected = reference.conv2d(x.double(), weight.double(), None, p) + residual.double()
    assert_close(y, expected, torch.float16)


@pytest.mark.parametrize("first", [0, 2, 3])
def test_neighbours_that_begin_anywhere(ops: Any, launches: Launches, first: int) -> None:
    """Sources next to each other are picked several at once only where a GPU can read them so."""
    inputs = [range(first, first + 16), range(first + 16, first + 32)]
    p = Partition(40, 32, inputs, [range(16), range(16, 32)])
    x, weight, _ = Problem(p, 1, (8, 9)).tensors(torch.float16, True)
    with launches.expected(1):
        y = ops.conv2d(x, weight, None, None, p.cpu_table, 32, *POINTWISE, 0)
    assert_close(y, reference.conv2d(x.double(), weight.double(), None, p), torch.float16)


def test_learned_groups(ops: Any, launches: Launches) -> None:
    """A dense weight, of which only the blocks are read; the host guesses how many there are."""
    ins, outs = torch.randint(4, (64,)).int(), torch.randint(4, (72,)).int()
    ins[:50] = 2  # far more than the guess
    outs[:50] = 2
    x = torch.randn(2, 64, 9, 7).half().contiguous(memory_format=torch.channels_last)
    weight = torch.randn(72, 64, 1, 1).half()
    with launches.expected(1):
        y = ops.labelled_conv2d(x, weight, None, ins, outs, 4, *POINTWISE)
    mask = (outs[:, None] == ins[None]).double()[:, :, None, None]
    assert_close(y, torch.nn.functional.conv2d(x.double(), weight.double() * mask), torch.float16)


@pytest.mark.parametrize("where", ["weight", "input", "unread input", "gradient"])
@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_what_is_not_finite_stays_where_it_is(
    ops: Any, launches: Launches, where: str, value: float
) -> None:
    """Zeros, of other groups that share a tile or behind the last pixel, are nobody's factors."""
    p = PARTITIONS["overlapping"]
    problem = Problem(p, 1, (5, 7))
    x, weight, _ = problem.tensors(torch.bfloat16, True)
    grad = torch.randn(1, 32, 5, 7).bfloat16().contiguous(memory_format=torch.channels_last)
    place = {
        "weight": weight[9:10],
        "input": x[0, 5, 2, 1:3],
        "unread input": x[0, 39, 2],
        "gradient": grad[0, 6, 1, :2],
    }
    place[where].fill_(value)
    wide = [t.double() for t in (x, weight)]
    expected = problem.reference(*wide)
    with launches.expected(2):
        y = ops.conv2d(x, weight, None, None, p.cpu_table, 32, *POINTWISE, 0)
        by_x = ops.conv2d_input_grad(grad, weight, p.cpu_table, 40, 5, 7, *POINTWISE, True)
    torch.testing.assert_close(y.double(), expected, equal_nan=True, rtol=2e-2, atol=5e-2)
    exact = reference.conv2d_input_grad(grad.double(), wide[1], p, (5, 7))
    torch.testing.assert_close(by_x.double(), exact, equal_nan=True, rtol=2e-2, atol=5e-2)


def test_a_hostile_table_gives_nan(ops: Any, launches: Launches) -> None:
    p = PARTITIONS["overlapping"]
    x, weight, _ = Problem(p).tensors(torch.float16, True)
    table = p.cpu_table.clone()
    table[-1] = table[-2]  # an output twice, another never
    with launches.expected(2):
        y = ops.conv2d(x, weight, None, None, table, 32, *POINTWISE, 0)
        by_x = ops.conv2d_input_grad(y, weight, table, 40, 5, 6, *POINTWISE, True)
    assert y.isnan().all()
    assert by_x.isnan().all()


# ---- how it is cut, and when it is taken --------------------------------------------------------

OTHERS = {
    "nchw": {"layout": torch.contiguous_format},
    "unaligned inputs": {"partition": Partition.random(36, 32, 4, seed=1)},
    "unaligned outputs": {"partition": Partition.random(32, 36, 4, seed=1)},
    "one group": {"partition": Partition.random(32, 32, 1, seed=1)},
    "tiny groups": {"partition": Partition.random(32, 32, 16, seed=1)},
    "padded": {"window": Window(1, 1, 0, 1, 0, 0, 1, 1)},
    "a window": {"kernel": (1, 2)},
    "unaligned pixels": {"cut": (0, 1)},
    "residual in nchw": {"residual": torch.contiguous_format},
    "no tensor cores": {"dtype": torch.float32},
    "too many channels": {"partition": Partition.random(1024, 1024, 128, seed=1)},
}


@pytest.mark.parametrize("name", OTHERS)
def test_another_kernel_is_taken(ops: Any, launches: Launches, name: str) -> None:
    case: dict[str, Any] = {"partition": Partition.random(32, 32, 4, seed=1)} | OTHERS[name]
    p, dtype = case["partition"], case.get("dtype", torch.float16)
    problem = Problem(p, 1, (3, 4), case.get("kernel", (1, 1)), case.get("window", POINTWISE))
    x, weight, bias = problem.tensors(dtype, True)
    x = x.contiguous(memory_format=case.get("layout", torch.channels_last))
    before, behind = case.get("cut", (0, 0))
    wider = torch.zeros(1, 3, 4, before + p.in_channels + behind).to(dtype).permute(0, 3, 1, 2)
    x = wider[:, before : before + p.in_channels].copy_(x) if "cut" in case else x
    wide = [t.double() for t in (x, weight, bias)]
    expected = problem.reference(*wide)
    residual = None
    if "residual" in case:
        residual = torch.randn_like(expected).to(dtype).contiguous(memory_format=case["residual"])
        expected += residual
    with launches.expected(0):
        y = ops.conv2d(x, weight, bias, residual, p.cpu_table, p.out_channels, *problem.window, 0)
    assert_close(y, expected, dtype)


class Cut:
    """What the planner says of a device's shared memory and multiprocessors."""

    def __init__(self, library: ctypes.CDLL, *sizes: int) -> None:
        found = (ctypes.c_int64 * 8)()
        library.whole_pixel_cut(*map(ctypes.c_int64, sizes), found)
        self.pixels, self.stages, self.resident, self.blocks, self.bytes = found[:5]
        self.pitches, self.offsets = found[5:7], found[7]


def test_cuts_keep_within_their_bounds(library: ctypes.CDLL) -> None:
    rng = np.random.default_rng(int(torch.randint(2**31, ()).item()))
    taken = 0
    for _ in range(5000):
        element = int(rng.choice([2, 4]))
        ins, outs = (int(2 ** (rng.random() * 8)) * 8 for _ in range(2))
        items, pixels = int(ins * (1 + rng.random())), int(2 ** (rng.random() * 30))
        residual, bias = map(int, rng.integers(2, size=2))
        weights = int(2 ** (rng.random() * 12)) * 256
        shared, multiprocessors = int(rng.integers(48, 228)) << 10, int(rng.integers(1, 200))
        sizes = (ins, outs, items, element, residual, bias, pixels, weights)
        cut = Cut(library, *sizes, shared, multiprocessors)
        if cut.pixels == 0:
            continue
        taken += 1
        assert cut.pixels in (32, 64, 128)
        assert cut.stages in (2, 3)
        assert cut.blocks in (multiprocessors, 2 * multiprocessors)
        blocks_together = cut.blocks // multiprocessors
        assert blocks_together * (cut.bytes + 1024) <= shared + 1024
        assert cut.resident * 256 >= weights or weights <= 2 * cut.pixels * (ins + outs) * element
        assert cut.offsets % 16 == 0
        assert [pitch % 32 for pitch in cut.pitches] == [16, 16]
        assert cut.pitches[0] > ins * element
        images = cut.pixels * (cut.stages * ins + (cut.stages if residual else 1) * outs) * element
        assert images + cut.resident * 256 + 2 * (items + outs) < cut.bytes
    assert 1000 < taken < 5000


def test_kinds_of_cuts(library: ctypes.CDLL, launches: Launches) -> None:
    """Rings of two and of three, weights that stay and weights that are read again."""
    ops = getattr(torch.ops, builder.NAMESPACE)
    kinds = set()
    for ins, groups in ((64, 4), (240, 2), (320, 4), (400, 5), (368, 23)):
        p = Partition.random(ins, ins, groups, seed=ins)
        fragments = ins // 8 * -(-ins // groups // 16)
        limits = (91 << 10, 2)  # of the device that the tests pretend to have
        cut = Cut(
            library, ins, ins, len(p.cpu_table) - ins - 8, 2, 0, 0, 4 * 77, fragments * 256, *limits
        )
        kinds.add((cut.stages, cut.resident >= fragments))
        x, weight, _ = Problem(p, 4, (7, 11)).tensors(torch.float16, True)
        with launches.expected(1):
            y = ops.conv2d(x, weight, None, None, p.cpu_table, ins, *POINTWISE, 0)
        assert_close(y, reference.conv2d(x.double(), weight.double(), None, p), torch.float16)
    assert kinds == {(2, False), (2, True), (3, False), (3, True)}


def random_partition(rng: np.random.Generator) -> Partition:
    """Uneven, with empty groups, overlaps, whole lists again and channels left out."""
    ins, outs = (int(rng.integers(1, 30)) * 8 for _ in range(2))
    groups = int(rng.integers(1, 12))
    labels = rng.integers(0, groups, outs)
    outputs = [rng.permutation(np.flatnonzero(labels == g)).tolist() for g in range(groups)]
    kind = rng.integers(3)
    if kind == 0:
        cuts = np.sort(rng.integers(0, ins // 4 + 1, groups - 1)).tolist()
        cuts = [0, *(4 * cut for cut in cuts), ins]
        inputs = [list(range(a, b)) for a, b in itertools.pairwise(cuts)]
    elif kind == 1:
        labels = rng.integers(0, groups + 1, ins)  # the last label: nobody's
        inputs = [rng.permutation(np.flatnonzero(labels == g)).tolist() for g in range(groups)]
    else:
        share = rng.random() ** 2
        inputs = [
            rng.permutation(np.flatnonzero(rng.random(ins) < share)).tolist() for _ in range(groups)
        ]
    return Partition.from_lists(inputs, outputs, in_channels=ins, out_channels=outs)


def test_layouts_of_random_partitions(library: ctypes.CDLL) -> None:
    """Every row in one tile, every weight in one place with zeros around, within the scratch."""
    library.check_whole_pixel_layout.restype = ctypes.c_char_p
    rng = np.random.default_rng(int(torch.randint(2**31, ()).item()))
    for round_ in range(400):
        library.take_turns_backwards(ctypes.c_bool(round_ % 2 == 1))
        p = random_partition(rng)
        table = p.cpu_table.numpy()
        transposed = bool(rng.integers(2))
        rows = int(rng.choice([32, 64]))
        # Weights are told apart by their numbers, which have to be exact.
        element = 2 if p.entries < 2048 else 4
        sizes = (ctypes.c_int64(len(table)), ctypes.c_int64(p.entries), ctypes.c_bool(transposed))
        answer = library.check_whole_pixel_layout(
            ctypes.c_void_p(table.ctypes.data),
            *sizes,
            ctypes.c_int64(element),
            ctypes.c_int64(rows),
        )
        assert not answer, (answer, p, transposed, rows)


def test_random_partitions(library: ctypes.CDLL, launches: Launches) -> None:
    ops = getattr(torch.ops, builder.NAMESPACE)
    rng = np.random.default_rng(int(torch.randint(2**31, ()).item()))
    before = launches.all()
    for round_ in range(60):
        library.take_turns_backwards(ctypes.c_bool(round_ % 2 == 1))
        p = random_partition(rng)
        dtype = (torch.bfloat16, torch.float16)[round_ // 2 % 2]
        x, weight, _ = Problem(p, 1, (3, 13)).tensors(dtype, True)
        dense = p.unpack(weight.double())[:, :, 0, 0]
        y = ops.conv2d(x, weight, None, None, p.cpu_table, p.out_channels, *POINTWISE, 0)
        assert_close(y, torch.einsum("oi,nihw->nohw", dense, x.double()), dtype)
        by_x = ops.conv2d_input_grad(y, weight, p.cpu_table, p.in_channels, 3, 13, *POINTWISE, True)
        assert_close(by_x, torch.einsum("oi,nohw->nihw", dense, y.double()), dtype)
    assert launches.all() - before > 30
