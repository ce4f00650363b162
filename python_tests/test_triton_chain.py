"""The Triton kernel of a chain against the stages one after another; see test_triton."""

import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from helpers import CHAINS, LAYOUTS, PARTITIONS

import groupconv_ext as gc
from groupconv_ext import Partition, backends, reference
from groupconv_ext.backends import Call
from groupconv_ext.backends.triton import load, planner
from groupconv_ext.backends.triton.availability import INTERPRETED, why_not

DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
REASON = why_not(Call(DEVICE, torch.float32, True))
pytestmark = pytest.mark.skipif(REASON is not None, reason=f"the backend {REASON}")

TWO_STAGES = [Partition.contiguous(16, 16, 4), Partition.interleaved(16, 16, 4)]


@pytest.fixture
def chain_ops() -> Any:
    load()
    return sys.modules["groupconv_ext.backends.triton.chain_ops"]


@pytest.fixture
def launches(chain_ops: Any, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The settings of every chain kernel that is launched."""
    found: list[dict[str, Any]] = []
    launch = chain_ops.launch_kernel

    def note(kernel: Any, grid: Any, x: torch.Tensor, settings: dict[str, Any]) -> None:
        found.append({"programs": grid[0], **settings})
        launch(kernel, grid, x, settings)

    monkeypatch.setattr(chain_ops, "launch_kernel", note)
    return found


def operands(
    partitions: list[Partition], size: tuple[int, int, int] = (2, 5, 6)
) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    batch, *image = size
    x = torch.randn(batch, partitions[0].in_channels, *image, device=DEVICE)
    bias = torch.randn(partitions[-1].out_channels, device=DEVICE)
    return x, bias, [torch.randn(p.entries, 1, 1, device=DEVICE) for p in partitions]


def results(
    backend: str,
    partitions: list[Partition],
    leaves: list[torch.Tensor],
    activation: str | None,
    learning: int,
) -> list[torch.Tensor]:
    """y, and the gradients of the first operands."""
    leaves = [t.detach().requires_grad_(i < learning) for i, t in enumerate(leaves)]
    x, bias, *weights = leaves
    y = gc.chain(x, weights, bias, partitions=partitions, activation=activation, backend=backend)
    by = torch.cos(torch.arange(y.numel(), device=DEVICE)).view_as(y)
    wanted = leaves[:learning]
    if y.requires_grad:
        grads = torch.autograd.grad(y, wanted, by, allow_unused=True)
    else:  # the reference, where no output reads anything
        grads = (None,) * learning
    return [
        y,
        *(torch.zeros_like(t) if g is None else g for g, t in zip(grads, wanted, strict=True)),
    ]


@pytest.mark.parametrize("layout", ["NCHW", "channels_last", "columns sliced"])
@pytest.mark.parametrize("name", CHAINS)
def test_equals_the_stages(name: str, layout: str, launches: list[dict[str, Any]]) -> None:
    partitions = CHAINS[name]
    x, bias, weights = operands(partitions)
    leaves = [LAYOUTS[layout](x), bias, *weights]
    for activation, learning in ((None, len(leaves)), ("relu", 2), ("silu", 1), ("hardswish", 0)):
        got = results("triton", partitions, leaves, activation, learning)
        expected = results("reference", partitions, leaves, activation, learning)
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    # Forward at each call; for x alone its gradient is a chain as well, where nothing overlaps.
    backwards = all(p.reads_all and not p.has_overlap for p in partitions)
    assert len(launches) == 4 + 2 * backwards
    assert {settings["STAGES"] for settings in launches} == {len(partitions)}


def test_a_strip_of_memory_is_used_again(
    chain_ops: Any, launches: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a program that takes several blocks of pixels."""
    partitions = [*TWO_STAGES, Partition.random(16, 24, 2, seed=1)]
    x, bias, weights = operands(partitions, (3, 9, 17))
    for bytes_of_all in (1, 40000):
        monkeypatch.setattr(chain_ops, "_SCRATCH_BYTES", bytes_of_all)
        got = results("triton", partitions, [x, bias, *weights], "relu6", 1)
        expected = results("reference", partitions, [x, bias, *weights], "relu6", 1)
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    blocks = -(-3 * 9 * 17 // launches[0]["PIXELS"])
    programs = [settings["programs"] for settings in launches]
    assert programs[:2] == [1, 1]
    assert all(1 < count < blocks for count in programs[2:])
    monkeypatch.undo()
    monkeypatch.setattr(sys.modules["groupconv_ext.backends.triton.ops"], "_LARGEST", 0)
    got = results("triton", partitions, [x, bias, *weights], "relu6", 1)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_groups_larger_than_a_tile() -> None:
    partitions = [Partition.random(90, 150, 2, seed=3), Partition.contiguous(150, 70, 1)]
    x, bias, weights = operands(partitions, (1, 5, 7))
    got = results("triton", partitions, [x, bias, *weights], None, 1)
    expected = results("reference", partitions, [x, bias, *weights], None, 1)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision(dtype: torch.dtype) -> None:
    """What lies between two stages is rounded as a tensor between them would be."""
    x, bias, weights = operands(TWO_STAGES)
    given = [t.to(dtype) for t in (x, bias, *weights)]
    y = gc.chain(given[0], given[2:], given[1], partitions=TWO_STAGES, backend="triton")
    assert y.dtype == dtype
    exact = [t.double() for t in given]
    expected = reference.chain(exact[0], exact[2:], exact[1], TWO_STAGES, None)
    # The interpreter cuts bfloat16 off where a GPU rounds.
    bound = 2**-9 if dtype == torch.float16 else 2**-6
    assert (y.double() - expected).norm() <= bound * expected.norm()
    first, second = TWO_STAGES
    between = gc.conv2d(given[0], given[2], partition=first, backend="triton")
    torch.testing.assert_close(
        y, gc.conv2d(between, given[3], given[1], partition=second, backend="triton")
    )


def test_nan_and_infinity_stay_in_their_groups() -> None:
    partitions = [PARTITIONS["contiguous"], Partition.contiguous(12, 12, 6)]
    x, bias, weights = operands(partitions)
    x[0, 3, 1, 2], x[1, 6, 0, 0], weights[1][3] = torch.nan, torch.inf, torch.inf
    got = results("triton", partitions, [x, bias, *weights], None, 1)
    expected = results("reference", partitions, [x, bias, *weights], None, 1)
    assert expected[0].isfinite().any(1).all()
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4, equal_nan=True)


def test_second_derivatives() -> None:
    x, bias, weights = operands(TWO_STAGES, (1, 3, 2))
    found = []
    for backend in ("triton", "reference"):
        leaves = [t.clone().requires_grad_() for t in (x, *weights)]
        y = gc.chain(leaves[0], leaves[1:], bias, partitions=TWO_STAGES, backend=backend)
        grads = torch.autograd.grad(y.square().sum(), leaves, create_graph=True)
        found.append(torch.autograd.grad(sum(g.square().sum() for g in grads), leaves))
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-1)


def test_the_same_bits_again() -> None:
    x, bias, weights = operands(TWO_STAGES, (2, 9, 9))
    runs = [results("triton", TWO_STAGES, [x, bias, *weights], "relu", 1) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_no_images_and_one_without_batch() -> None:
    x, bias, weights = operands(TWO_STAGES)
    settings: dict[str, Any] = {"partitions": TWO_STAGES, "backend": "triton"}
    assert gc.chain(x[:0], weights, bias, **settings).shape == (0, 16, 5, 6)
    y = gc.chain(x, weights, bias, **settings)
    torch.testing.assert_close(gc.chain(x[1], weights, bias, **settings), y[1])
    both = torch.vmap(lambda part: gc.chain(part, weights, bias, **settings))(x[:, None])
    torch.testing.assert_close(both[:, 0], y)


def test_compile_in_one_graph() -> None:
    x, bias, weights = operands(TWO_STAGES)
    leaves = [t.requires_grad_() for t in (x, bias, *weights)]

    def run(x: torch.Tensor, bias: torch.Tensor, *weights: torch.Tensor) -> torch.Tensor:
        return gc.chain(
            x, weights, bias, partitions=TWO_STAGES, activation="relu", backend="triton"
        )

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    got, expected = compiled(*leaves), run(*leaves)
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(
        torch.autograd.grad(got.square().sum(), leaves),
        torch.autograd.grad(expected.square().sum(), leaves),
    )


def test_float64_is_refused() -> None:
    x, bias, weights = operands(TWO_STAGES)
    with pytest.raises(backends.BackendError, match="float64"):
        gc.chain(
            x.double(),
            [w.double() for w in weights],
            bias.double(),
            partitions=TWO_STAGES,
            backend="triton",
        )


# ---- the raw operation --------------------------------------------------------------------------


def raw(tables: list[torch.Tensor], **changes: Any) -> torch.Tensor:
    load()
    x, bias, weights = operands(TWO_STAGES, (1, 3, 3))
    given = {"x": x, "weights": weights, "bias": bias, "widest": 16} | changes
    first = (given["x"], given["weights"], given["bias"], tables)
    launch = [16, 16, 16, 4, 1]
    settings = (16, given["widest"], False, True, 0, False, launch)
    y: torch.Tensor = torch.ops.groupconv_triton.chain(*first, *settings)
    return y


def sound_tables() -> list[torch.Tensor]:
    return [torch.from_numpy(planner.chain_table(p, 16, 0)).to(DEVICE) for p in TWO_STAGES]


def test_what_does_not_fit_is_refused() -> None:
    tables = sound_tables()
    weight = torch.zeros(64, 1, 1, device=DEVICE)
    assert raw(tables).shape == (1, 16, 3, 3)
    for message, call in {
        "at least one stage": lambda: raw([], weights=[]),
        "2 weights and 1 tables": lambda: raw(tables[:1]),
        r"tables\[1\] is torch.int32": lambda: raw([tables[0], tables[1].int()]),
        r"weights\[0\] is torch.float16": lambda: raw(tables, weights=[weight.half(), weight]),
        r"bias has shape \[9\]; expected \[16\]": lambda: raw(
            tables, bias=torch.zeros(9, device=DEVICE)
        ),
        "widest is 0": lambda: raw(tables, widest=0),
        r"x has shape \[16\]": lambda: raw(tables, x=torch.zeros(16, device=DEVICE)),
    }.items():
        with pytest.raises(RuntimeError, match=message):
            call()


@pytest.fixture
def watched(launches: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """How many loads and stores there were; each must stay inside of a tensor of the launch."""
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    seen = 0

    def check(pointers: Any, mask: Any) -> None:
        nonlocal seen
        addresses = np.broadcast_to(pointers.data, mask.data.shape)[mask.data.astype(bool)]
        seen += 1
        inside = np.zeros(addresses.shape, bool)
        for tensor in launches[-1].values():
            if isinstance(tensor, torch.Tensor):
                first = tensor.untyped_storage().data_ptr()
                end = first + tensor.untyped_storage().nbytes()
                inside |= (addresses >= first) & (addresses < end)
        assert inside.all()

    builder = interpreter.InterpreterBuilder
    load_masked, store_masked = builder.create_masked_load, builder.create_masked_store

    def watched_load(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        check(pointers, mask)
        return load_masked(self, pointers, mask, *rest)

    def watched_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        check(pointers, mask)
        return store_masked(self, pointers, value, mask, *rest)

    monkeypatch.setattr(builder, "create_masked_load", watched_load)
    monkeypatch.setattr(builder, "create_masked_store", watched_store)
    return lambda: seen


@pytest.mark.skipif(not INTERPRETED, reason="watches the interpreter's loads and stores")
def test_a_hostile_table_leads_nowhere_else(watched: Callable[[], int]) -> None:
    raw(sound_tables())
    assert watched() > 10
    rng = np.random.default_rng(int(torch.randint(2**31, ()).item()))
    wrong = (-1, -(2**40), 2**31 - 1, 2**31, 2**40, 2**62, 0, 1, 15, 16, 17, 63, 64, 65)
    for round_ in range(60):
        tables = sound_tables()
        table = tables[int(rng.integers(2))]
        # Every number of a header, then any.
        at = round_ % 5 if round_ < 20 else int(rng.integers(table.numel()))
        table[at] = int(rng.choice(wrong))
        raw(tables)
    raw(sound_tables(), weights=[torch.zeros(64, 1, 1), torch.zeros(3, 1, 1)])
    raw(sound_tables(), widest=5)
    raw([table[:-3] for table in sound_tables()])
    raw([table[:4] for table in sound_tables()])


def test_chains_of_tables() -> None:
    """A table knows its length, so that others can follow it."""
    for partition in PARTITIONS.values():
        for transposed in (0, 1):
            table = planner.chain_table(partition, 16, transposed)
            assert table[0] == len(table)
            assert table[4] == partition.entries
            rows = planner.row_weights(partition, transposed)
            begin = 5 + 4 * table[1]
            assert np.array_equal(table[begin : begin + rows.size].reshape(-1, 4), rows)
