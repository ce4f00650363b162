"""Weights kept as kernels have packed them: the same bits, and never of one that has changed."""

import itertools
import threading
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from helpers import DTYPES, ISAS, LAYOUTS, Geometry, forced_isa, needs_native, split, tensors
from torch import nn

import groupconv_ext as gc
from groupconv_ext import Partition

pytestmark = [needs_native, pytest.mark.native]

AROUND = (1, 1, 1, 1)
PARTITION = Partition.random(64, 64, 2, seed=0)
SIZES = (PARTITION.entries, 3, 3)

# What the drivers that pack take, each in some layout and instruction set.
CASES = {
    "3×3": (PARTITION, Geometry((8, 8), (3, 3), padding=AROUND)),
    "3×3 on 7²": (Partition.random(96, 96, 3, seed=0), Geometry((7, 7), (3, 3), padding=AROUND)),
    "3×3 in order": (Partition.contiguous(64, 64, 2), Geometry((8, 8), (3, 3), padding=AROUND)),
    "3×3 uneven": (
        Partition.random(150, 170, 3, seed=1, uneven=True),
        Geometry((7, 6), (3, 3), padding=AROUND),
    ),
    "3×3 stride 2": (PARTITION, Geometry((15, 16), (3, 3), (2, 2), AROUND)),
    "3×3 small groups": (
        Partition.random(256, 256, 32, seed=0),
        Geometry((9, 9), (3, 3), padding=AROUND),
    ),
    "3×3 few outputs": (
        Partition.random(768, 16, 4, seed=0),
        Geometry((9, 9), (3, 3), padding=AROUND),
    ),
    "3×3, much weight": (
        Partition.random(256, 256, 2, seed=0),
        Geometry((7, 6), (3, 3), padding=AROUND),
    ),
    "2×2": (PARTITION, Geometry((8, 9), (2, 2))),
    "1×1": (Partition.random(256, 256, 2, seed=0), Geometry((9, 8))),
    "1×1 stride 2": (Partition.random(1024, 1024, 2, seed=0), Geometry((11, 13), stride=(2, 2))),
}


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    gc.keep_weights(0)
    yield
    gc.keep_weights(0)
    assert gc.kept_weights() == (0, 0, 0)


def convolve(x: torch.Tensor, weight: torch.Tensor, padding: int = 1) -> torch.Tensor:
    with torch.no_grad():
        return gc.conv2d(x, weight, partition=PARTITION, padding=padding)


def operands() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(1, 64, 8, 8), torch.randn(SIZES)


def fresh(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """By a weight of which nothing can be kept."""
    return convolve(x, weight.detach().clone())


def looked_up() -> tuple[int, int]:
    kept = gc.kept_weights()
    return kept.hits, kept.misses


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["NCHW", "channels_last"])
@pytest.mark.parametrize("case", CASES)
def test_the_same_bits(case: str, layout: str, dtype: torch.dtype, isa: str) -> None:
    partition, geometry = CASES[case]
    x, weight, bias = tensors(partition, geometry, dtype=dtype)
    x = LAYOUTS[layout](x)

    def call() -> torch.Tensor:
        return gc.conv2d(
            x,
            weight,
            bias,
            partition=partition,
            stride=geometry.stride,
            padding=(geometry.padding[0], geometry.padding[2]),
            backend="native",
        )

    with forced_isa(isa):
        expected = call()
        gc.keep_weights(16)
        assert torch.equal(call(), expected)
        kept = gc.kept_weights()
        assert kept.hits == 0
        assert (kept.bytes > 0) == (kept.misses > 0)
        for _ in range(2):
            assert torch.equal(call(), expected)
        assert gc.kept_weights() == (kept.bytes, 2 * kept.misses, kept.misses)


@pytest.mark.parametrize("isa", [isa for isa in ISAS if isa != "scalar"])
@pytest.mark.parametrize(
    ("case", "layout"),
    [
        ("3×3", "NCHW"),
        ("3×3", "channels_last"),
        ("3×3 small groups", "channels_last"),
        ("3×3 few outputs", "channels_last"),
        ("3×3, much weight", "channels_last"),
    ],
)
def test_windows_are_packed_once(case: str, layout: str, isa: str) -> None:
    """What torch does not count goes unseen: so the weight itself is not read again."""
    partition, geometry = CASES[case]
    x, weight, _ = tensors(partition, geometry, dtype=torch.float32)
    x = LAYOUTS[layout](x)
    gc.keep_weights(16)
    with forced_isa(isa):
        expected = gc.conv2d(x, weight, partition=partition, padding=1)
        weight.data.zero_()
        assert torch.equal(gc.conv2d(x, weight, partition=partition, padding=1), expected)
        assert looked_up() == (1, 1)
        gc.keep_weights(0)
        assert not gc.conv2d(x, weight, partition=partition, padding=1).any()


def test_one_weight_serves_all_threads_layouts_and_maps() -> None:
    _, weight = operands()
    inputs = [
        LAYOUTS[layout](torch.randn(batch, 64, size, size + 1)).to(dtype)
        for dtype in (torch.float32, torch.bfloat16)
        for layout in ("NCHW", "channels_last")
        for size in (6, 7, 13)
        for batch in (1, 3)
    ]
    weights = {dtype: weight.to(dtype) for dtype in (torch.float32, torch.bfloat16)}

    def results(isa: str) -> list[torch.Tensor]:
        with forced_isa(isa):
            return [convolve(x, weights[x.dtype]) for x in inputs]

    expected = {isa: results(isa) for isa in ISAS}
    gc.keep_weights(16)
    before = torch.get_num_threads()
    try:
        for threads in (1, 3, 2):
            torch.set_num_threads(threads)
            for isa in ISAS:
                assert all(map(torch.equal, results(isa), expected[isa]))
    finally:
        torch.set_num_threads(before)
    kept = gc.kept_weights()
    assert kept.hits > 2 * kept.misses


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("layout", ["NCHW", "channels_last"])
def test_one_weight_in_other_groups_and_windows(layout: str, isa: str) -> None:
    uneven = split(64, 48, 16), split(64, 32, 32)
    partitions = [
        Partition.random(64, 64, 2, seed=0),
        Partition.contiguous(64, 64, 2),
        Partition(64, 64, *uneven),
        Partition(64, 64, *(lists[::-1] for lists in uneven)),
        Partition(64, 64, uneven[0][::-1], uneven[1]),
    ]
    windows = [
        {"padding": 1},
        {"padding": 1, "stride": 2},
        {"padding": 2, "dilation": 2},
        {"padding": (1, 0)},
    ]
    x = LAYOUTS[layout](torch.randn(1, 64, 8, 7))
    weight = torch.randn(SIZES)

    def results() -> list[torch.Tensor]:
        calls = itertools.product(partitions, windows)
        return [gc.conv2d(x, weight, partition=p, **window) for p, window in calls]

    with forced_isa(isa):
        expected = results()
        gc.keep_weights(16)
        for _ in range(2):
            assert all(map(torch.equal, results(), expected))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("layout", ["NCHW", "channels_last"])
def test_as_many_other_taps(layout: str, isa: str) -> None:
    """Padded above, the first row of the window meets no pixel; padded below, the last."""
    partition = Partition.random(128, 128, 2, seed=0)
    x = LAYOUTS[layout](torch.randn(2, 128, 2, 16))
    weight = torch.randn(partition.entries, 3, 3)

    def results() -> list[torch.Tensor]:
        arguments = x, weight, None, None, partition.table("cpu"), 128, 1, 1
        pads = (2, 0, 1, 1), (0, 2, 1, 1)
        return [torch.ops.groupconv.conv2d(*arguments, *pad) for pad in pads]

    with forced_isa(isa):
        expected = results()
        gc.keep_weights(16)
        for _ in range(2):
            assert all(map(torch.equal, results(), expected))
    if layout == "channels_last" and isa != "scalar":
        assert looked_up() == (2, 2)


def add_in_place(weight: nn.Parameter) -> None:
    with torch.no_grad():
        weight.add_(1)


def add_in_inference_mode(weight: nn.Parameter) -> None:
    with torch.inference_mode():
        weight.add_(1)


def add_to_a_view(weight: nn.Parameter) -> None:
    with torch.no_grad():
        weight[3:5].view(-1)[2] += 1


def add_to_what_is_detached(weight: nn.Parameter) -> None:
    weight.detach().mul_(2)


def copy(weight: nn.Parameter) -> None:
    with torch.no_grad():
        weight.copy_(torch.randn(SIZES))


def step(optimizer: Callable[..., torch.optim.Optimizer], **settings: bool) -> Callable[..., None]:
    def change(weight: nn.Parameter) -> None:
        weight.grad = torch.randn(SIZES)
        optimizer([weight], lr=0.1, **settings).step()

    return change


def load(weight: nn.Parameter) -> None:
    holder = nn.Module()
    holder.weight = weight
    holder.load_state_dict({"weight": torch.randn(SIZES)})
    assert holder.weight is weight


def assign(weight: nn.Parameter) -> None:
    weight.data = torch.randn(SIZES)


def set_to_another(weight: nn.Parameter) -> None:
    with torch.no_grad():
        weight.set_(torch.randn(SIZES))


def free_and_fill(weight: nn.Parameter) -> None:
    storage = weight.untyped_storage()
    size = storage.size()
    storage.resize_(0)
    storage.resize_(size)
    with torch.no_grad():
        weight.normal_()


def resize(weight: nn.Parameter) -> None:
    with torch.no_grad():
        weight.requires_grad_(False).resize_(0).resize_(SIZES).normal_()


CHANGES = {
    "in place": add_in_place,
    "in place in inference mode": add_in_inference_mode,
    "a view of it": add_to_a_view,
    "detached": add_to_what_is_detached,
    "copy_": copy,
    "SGD": step(torch.optim.SGD),
    "Adam, one by one": step(torch.optim.Adam, foreach=False),
    "Adam, all at once": step(torch.optim.Adam, foreach=True),
    "load_state_dict": load,
    ".data = another": assign,
    "set_": set_to_another,
    "storage freed and filled": free_and_fill,
    "resized": resize,
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_never_stale(change: Callable[[nn.Parameter], None]) -> None:
    x, start = operands()
    weight = nn.Parameter(start)
    gc.keep_weights(16)
    for _ in range(3):
        for _ in range(2):
            result = convolve(x, weight)
        before = gc.kept_weights()
        assert before.hits > 0
        change(weight)
        changed = convolve(x, weight)
        assert gc.kept_weights().misses == before.misses + 1
        assert not torch.equal(changed, result)
        assert torch.equal(changed, fresh(x, weight))


@pytest.mark.parametrize("way", ["in place", "copy_", "load_state_dict", "SGD"])
def test_a_weight_that_changes_takes_no_more_memory(way: str) -> None:
    x, start = operands()
    weight = nn.Parameter(start)
    gc.keep_weights(16)
    convolve(x, weight)
    one = gc.kept_weights().bytes
    for _ in range(5):
        CHANGES[way](weight)
        convolve(x, weight)
        assert gc.kept_weights().bytes == one


def test_another_weight_in_the_same_memory() -> None:
    """Its version may be the same, too."""
    x, _ = operands()
    memory = np.empty(SIZES, np.float32)
    gc.keep_weights(16)
    for seed in range(3):
        memory[:] = np.random.default_rng(seed).standard_normal(SIZES)
        weight = torch.from_numpy(memory)
        assert weight._version == 0
        expected = fresh(x, weight)
        for _ in range(2):
            assert torch.equal(convolve(x, weight), expected)


def test_a_weight_where_one_was_freed() -> None:
    x, _ = operands()
    gc.keep_weights(16)
    for _ in range(8):
        weight = torch.randn(SIZES)
        for _ in range(2):
            assert torch.equal(convolve(x, weight), fresh(x, weight))
        del weight


def test_parts_of_a_storage_are_weights_of_their_own() -> None:
    x, _ = operands()
    both = torch.randn(2, *SIZES)
    gc.keep_weights(16)
    for _ in range(2):
        for weight in (both[0], both[1], both[0].transpose(1, 2)):
            assert torch.equal(convolve(x, weight), fresh(x, weight))


def test_memory_is_held_until_it_is_dropped() -> None:
    x, _ = operands()
    memory = np.ones(SIZES, np.float32)
    held = weakref.ref(memory)
    weight = torch.from_numpy(memory)
    gc.keep_weights(16)
    convolve(x, weight)
    del memory, weight
    assert held() is not None
    gc.keep_weights(0)
    assert held() is None
    assert gc.kept_weights().bytes == 0


def test_the_bound_holds_and_what_is_used_stays() -> None:
    x, _ = operands()
    weights = [torch.randn(SIZES) for _ in range(5)]
    expected = [fresh(x, weight) for weight in weights]
    gc.keep_weights(16)
    convolve(x, weights[0])
    one = gc.kept_weights().bytes
    gc.keep_weights(3.5 * one / 2**20)
    for _ in range(3):
        for weight, result in zip(weights, expected, strict=True):
            for one_of_two in (weights[0], weight):
                y = convolve(x, one_of_two)
            assert torch.equal(y, result)
            assert gc.kept_weights().bytes <= 3 * one
    gc.keep_weights(3.5 * one / 2**20)
    for weight in weights[1:]:
        convolve(x, weight)
        convolve(x, weights[0])
    assert gc.kept_weights() == (3 * one, 4, 4)
    gc.keep_weights(1.5 * one / 2**20)
    assert gc.kept_weights() == (one, 0, 0)
    convolve(x, weights[0])
    assert looked_up() == (1, 0)
    gc.keep_weights(0.5 * one / 2**20)
    assert torch.equal(convolve(x, weights[0]), expected[0])
    assert gc.kept_weights() == (0, 0, 1)


def test_threads_at_once() -> None:
    """More weights than there is memory for, and one that changes while others are used."""
    x, _ = operands()
    weights = [torch.randn(SIZES) for _ in range(6)]
    expected = [fresh(x, weight) for weight in weights]
    gc.keep_weights(0.3)
    stop = threading.Event()

    def change() -> None:
        own, own_x = torch.randn(SIZES), x + 1
        while not stop.is_set():
            own.mul_(1.01).clamp_(-9, 9)
            assert torch.equal(convolve(own_x, own), fresh(own_x, own))

    def call(first: int) -> None:
        for i in range(200):
            at = (first + i // 3) % len(weights)
            assert torch.equal(convolve(x, weights[at]), expected[at])
            assert gc.kept_weights().bytes <= 0.3 * 2**20

    with ThreadPoolExecutor(4) as pool:
        changing = pool.submit(change)
        calling = [pool.submit(call, first) for first in (0, 0, 3)]
        try:
            for one in calling:
                one.result()
        finally:
            stop.set()
        changing.result()


def test_inference_mode() -> None:
    """A tensor made there has no version, so nothing of it is kept; one made before has."""
    x, weight = operands()
    expected = fresh(x, weight)
    gc.keep_weights(16)
    with torch.inference_mode():
        unversioned = weight.clone()
        for _ in range(2):
            assert torch.equal(gc.conv2d(x, unversioned, partition=PARTITION, padding=1), expected)
        assert gc.kept_weights() == (0, 0, 0)
        for _ in range(2):
            assert torch.equal(gc.conv2d(x, weight, partition=PARTITION, padding=1), expected)
        assert looked_up() == (1, 1)


def test_training() -> None:
    x, start = operands()
    weights = [nn.Parameter(start.clone()) for _ in range(2)]
    for weight, megabytes in zip(weights, (0, 16), strict=True):
        gc.keep_weights(megabytes)
        optimizer = torch.optim.SGD([weight], lr=0.01)
        for _ in range(4):
            optimizer.zero_grad()
            gc.conv2d(x, weight, partition=PARTITION, padding=1).square().mean().backward()
            optimizer.step()
    assert torch.equal(*weights)
    assert looked_up() == (0, 4)


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW])
@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("layout", ["NCHW", "channels_last"])
def test_fused_optimizers(
    layout: str, kernel: int, optimizer: Callable[..., torch.optim.Optimizer]
) -> None:
    """Torch does not count their steps, so nothing is kept across one."""
    partition = Partition.random(256, 256, 2, seed=0)
    x = torch.randn(1, 256, 9, 8, requires_grad=True)
    weight = nn.Parameter(torch.randn(partition.entries, kernel, kernel))
    steps = optimizer([weight], lr=0.1, fused=True)

    def call(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return gc.conv2d(x, weight, partition=partition, padding=kernel // 2)

    gc.keep_weights(16)
    in_lanes = LAYOUTS["channels_last"](x.detach())
    for _ in range(3):
        with torch.no_grad():
            for _ in range(2):
                assert torch.equal(call(in_lanes, weight), call(in_lanes, weight.clone()))
        steps.zero_grad()
        call(LAYOUTS[layout](x), weight).square().mean().backward()
        with torch.no_grad():
            call(in_lanes, weight)
        assert (gc.kept_weights().bytes > 0) == (kernel == 3)
        steps.step()
        assert gc.kept_weights().bytes == 0
    with torch.no_grad():
        assert torch.equal(call(in_lanes, weight), call(in_lanes, weight.clone()))


def test_a_small_part_of_a_storage() -> None:
    """It would hold all of it."""
    x, weight = operands()
    many = weight.repeat(3, 1, 1)
    gc.keep_weights(16)
    for _ in range(2):
        convolve(x, many[: PARTITION.entries])
    assert gc.kept_weights().bytes == 0


def test_with_a_prologue() -> None:
    x, weight = operands()
    prologue = gc.Prologue(torch.randn(64), torch.randn(64), "relu")

    def call() -> torch.Tensor:
        return gc.conv2d(x, weight, partition=PARTITION, padding=1, prologue=prologue)

    expected = call()
    gc.keep_weights(16)
    assert torch.equal(call(), expected)
    assert torch.equal(call(), expected)
    assert looked_up() == (1, 1)


def test_nothing_is_kept_where_it_would_not_pay() -> None:
    gc.keep_weights(16)
    x, weight = operands()
    convolve(torch.randn(1, 64, 40, 40), weight)  # many pixels
    gc.conv2d(x[:, :8], weight[:64], partition=Partition.contiguous(8, 8, 1), padding=1)
    assert gc.kept_weights() == (0, 0, 0)


@pytest.mark.parametrize("megabytes", [True, "1", None])
def test_what_is_no_number(megabytes: object) -> None:
    with pytest.raises(TypeError, match="must be a number"):
        gc.keep_weights(megabytes)  # type: ignore[arg-type]


@pytest.mark.parametrize("megabytes", [-1, float("nan"), float("inf"), 2.0**41])
def test_what_is_no_size(megabytes: float) -> None:
    with pytest.raises(ValueError, match="expected 0 to"):
        gc.keep_weights(megabytes)


def test_the_operation_refuses_less_than_nothing() -> None:
    with pytest.raises(RuntimeError, match="must not be negative"):
        torch.ops.groupconv.keep_weights(-1)
