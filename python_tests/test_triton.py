"""The Triton kernels against the reference: in the interpreter, or on a GPU where there is one."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import pytest
import torch
from helpers import (
    GEOMETRIES,
    LAYOUTS,
    PARTITIONS,
    Geometry,
    check_convolution,
    partitions,
    tensors,
)

import groupconv_ext as gc
from groupconv_ext import Partition, backends, reference
from groupconv_ext.backends import Call
from groupconv_ext.backends.remembered import Remembered
from groupconv_ext.backends.triton import TRITON, load, planner, tuning
from groupconv_ext.backends.triton.availability import INTERPRETED, why_not
from groupconv_ext.partition import kronecker_radices
from groupconv_ext.window import POINTWISE

MATRIX_KERNELS = ("convolve", "weight_gradient", "chain")
KERNELS = (
    *MATRIX_KERNELS,
    *("convolve_single", "weight_gradient_single", "collect_readers"),
    *("mask_by_labels", "label_gradient", "gate_labels", "gate_gradient"),
)
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
REASON = why_not(Call(DEVICE, torch.float32, True))
needs_triton = pytest.mark.skipif(REASON is not None, reason=f"the backend {REASON}")


# ---- right --------------------------------------------------------------------------------------


def check(
    partition: Partition,
    geometry: Geometry,
    dtype: torch.dtype = torch.float32,
    layout: str = "NCHW",
    activation: str = "none",
    residual: bool = False,
) -> None:
    x, weight, bias = (t.to(DEVICE) for t in tensors(partition, geometry, dtype=dtype))
    added = None
    if residual:
        y = reference.conv2d(x, weight, bias, partition, *geometry.window)
        added = torch.randn_like(y)
    layer = LAYOUTS[layout]
    check_convolution(
        partition,
        geometry,
        layer(x),
        weight,
        bias,
        added,
        activation,
        grad_layout=layer,
        backend=TRITON,
    )


@needs_triton
@pytest.mark.parametrize("name", PARTITIONS)
def test_partitions(name: str) -> None:
    check(PARTITIONS[name], GEOMETRIES["3×3"], layout="channels_last", activation="relu")
    check(PARTITIONS[name], GEOMETRIES["1×1"])


@needs_triton
@pytest.mark.parametrize("name", GEOMETRIES)
@pytest.mark.parametrize("partition", ["ragged", "depthwise"])
def test_windows(name: str, partition: str) -> None:
    check(PARTITIONS[partition], GEOMETRIES[name])


@needs_triton
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout: str) -> None:
    check(PARTITIONS["overlapping, unread"], GEOMETRIES["3×3"], layout=layout)


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["ragged", "depthwise", "overlapping, unread"])
def test_half_precision(dtype: torch.dtype, name: str) -> None:
    partition, geometry = PARTITIONS[name], GEOMETRIES["3×3"]
    x, weight, bias = (t.to(DEVICE) for t in tensors(partition, geometry, 1, dtype))
    if dtype == torch.float16 or not INTERPRETED:
        check_convolution(partition, geometry, x, weight, bias, backend=TRITON)
        return
    # The interpreter cuts bfloat16 off where a GPU rounds: an ulp instead of half of one.
    results = []
    for kind, backend in ((dtype, "triton"), (torch.float64, "reference")):
        leaves = [t.to(kind).requires_grad_() for t in (x, weight)]
        y = gc.conv2d(*leaves, bias.to(kind), partition=partition, padding=1, backend=backend)
        grad = torch.linspace(-1, 1, y.numel(), device=DEVICE).to(dtype).view_as(y)
        results.append((y, *torch.autograd.grad(y, leaves, grad.to(kind))))
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got.double(), expected, rtol=2**-7, atol=1e-3)


@needs_triton
@pytest.mark.parametrize("activation", reference.activations)
def test_epilogues(activation: str) -> None:
    check(PARTITIONS["permuted"], GEOMETRIES["1×1"], activation=activation, residual=True)
    check(PARTITIONS["depthwise"], GEOMETRIES["1×1"], activation=activation, residual=True)


@needs_triton
def test_groups_larger_than_a_tile() -> None:
    """Pieces of a group, more columns than a block is deep, and more pixels than one block."""
    sizes = Partition.from_labels([0] * 70 + [1] * 5, [0] * 67 + [1] * 3, 2)
    check(sizes, Geometry((9, 17)))
    check(Partition.random(48, 96, 2, seed=1), Geometry((3, 3), (3, 3), padding=(1, 1, 1, 1)))


@needs_triton
@pytest.mark.parametrize("name", ["ragged", "depthwise", "overlapping, unread"])
@pytest.mark.parametrize("layout", ["NCHW", "channels_last"])
def test_prologue(name: str, layout: str) -> None:
    """Zero padding comes after it, and its parameters have gradients."""
    partition, geometry = PARTITIONS[name], GEOMETRIES["3×3"]
    x, weight, bias = (t.to(DEVICE) for t in tensors(partition, geometry, 1, torch.float32))
    x = LAYOUTS[layout](x)
    scale, shift = (torch.randn(partition.in_channels, device=DEVICE) for _ in range(2))
    operands = [t.requires_grad_() for t in (x.clone(), weight, bias, scale, shift)]
    results = []
    for backend in ("triton", "reference"):
        image, w, b, s, t = operands
        y = gc.conv2d(
            image,
            w,
            b,
            partition=partition,
            padding=1,
            prologue=gc.Prologue(s, t, "relu"),
            backend=backend,
        )
        results.append((y, *torch.autograd.grad(y.square().sum(), operands)))
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@needs_triton
def test_second_derivatives() -> None:
    partition, geometry = PARTITIONS["overlapping, unread"], GEOMETRIES["3×3"]
    x, weight, _ = (t.to(DEVICE) for t in tensors(partition, geometry, 1, torch.float32))
    found = []
    for backend in ("triton", "reference"):
        leaves = x.clone().requires_grad_(), weight.clone().requires_grad_()
        y = gc.conv2d(*leaves, partition=partition, padding=1, backend=backend)
        first = torch.autograd.grad(y.pow(3).sum(), leaves, create_graph=True)
        found.append(torch.autograd.grad(sum(g.square().sum() for g in first), leaves))
    for got, expected in zip(*found, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-2)


@needs_triton
def test_offsets_of_64_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """What tensors of more than 2³¹ elements need, on small ones."""
    load()
    for module in ("ops", "mask_ops"):
        name = f"groupconv_ext.backends.triton.{module}"
        monkeypatch.setattr(sys.modules[name], "_LARGEST", 0)
    for name in ("ragged", "depthwise", "overlapping, unread"):
        for layout in ("NCHW", "channels_last"):
            check(PARTITIONS[name], GEOMETRIES["3×3"], layout=layout, activation="relu")
    shapes = [(1, 6, 3, 3), (4, 6, 1, 1), (4,), (6, 2), (4, 2)]
    leaves = [torch.randn(shape, device=DEVICE).requires_grad_() for shape in shapes]
    results = [learned(gc.flgc_conv2d, backend, leaves) for backend in ("triton", "dense")]
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)


@needs_triton
def test_nan_and_infinity_propagate() -> None:
    partition = PARTITIONS["permuted"]
    x = torch.zeros(1, partition.in_channels, 2, 2, device=DEVICE)
    x[0, 3], x[0, 4] = torch.nan, torch.inf
    weight = torch.ones(partition.entries, 1, 1, device=DEVICE)
    for activation in ("relu", "relu6", "silu", "hardswish"):
        got, expected = (
            gc.conv2d(x, weight, partition=partition, activation=activation, backend=backend)
            for backend in ("triton", "reference")
        )
        torch.testing.assert_close(got, expected, equal_nan=True)


@needs_triton
def test_the_same_bits_again() -> None:
    partition = PARTITIONS["overlapping, unread"]
    x = torch.randn(2, partition.in_channels, 6, 5, device=DEVICE, requires_grad=True)
    weight = torch.randn(partition.entries, 3, 3, device=DEVICE, requires_grad=True)
    runs = []
    for _ in range(2):
        y = gc.conv2d(x, weight, partition=partition, padding=1, backend="triton")
        runs.append((y, *torch.autograd.grad(y.sum(), (x, weight))))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@needs_triton
def test_nothing_to_do() -> None:
    partition = PARTITIONS["no connection"]
    empty = torch.empty(0, partition.in_channels, 4, 4, device=DEVICE)
    weight = torch.empty(0, 3, 3, device=DEVICE)
    assert gc.conv2d(empty, weight, partition=partition, backend="triton").shape == (0, 2, 2, 2)
    partition = PARTITIONS["ragged"]
    nothing = torch.empty(1, partition.in_channels, 0, 3, device=DEVICE)
    weight = torch.ones(partition.entries, 1, 1, device=DEVICE)
    y = gc.conv2d(nothing, weight, partition=partition, padding=1, backend="triton")
    assert y.shape == (1, partition.out_channels, 2, 5)
    assert not y.any()


# ---- refused ------------------------------------------------------------------------------------


@needs_triton
def test_refusals() -> None:
    assert "float64" in str(why_not(Call(DEVICE, torch.float64, False)))
    assert "forward mode" in str(why_not(Call(DEVICE, torch.float32, False, forward_mode=True)))


def test_a_refusal_by_name() -> None:
    with pytest.raises(backends.BackendError, match="'triton' cannot run here: it "):
        backends.choose("triton", Call("mps", torch.float32, False))


@needs_triton
def test_a_hostile_plan_reads_and_writes_nothing_else() -> None:
    """Channels and entries outside of their tensors are left out, not followed."""
    load()

    def run(channels: list[int], rows: list[list[int]], tiles: list[list[int]]) -> torch.Tensor:
        x = torch.ones(1, 2, 1, 4, device=DEVICE)
        plan = (
            torch.tensor(tiles, dtype=torch.int32, device=DEVICE),
            torch.tensor(rows, dtype=torch.int64, device=DEVICE),
            torch.tensor(channels, dtype=torch.int32, device=DEVICE),
            torch.tensor(channels, dtype=torch.int32, device=DEVICE),
        )
        weight = torch.ones(4, 1, 1, device=DEVICE)
        window, launch = list(POINTWISE), [16, 16, 16, 4, 2]
        flags = (False, False, False, False, True, False, False, 0, False)
        settings = (None,) * 4 + (False, None, None)
        result: torch.Tensor = torch.ops.groupconv_triton.convolve(
            x, weight, *settings, *plan, 2, 1, 4, window, *flags, launch
        )
        return result

    good = [[0, 2, 0, 1], [0, 2, 2, 1]]
    assert run([0, 1], good, [[0, 2, 0, 2]]).unique().tolist() == [2]
    assert run([0, 1], [[0, 2, 2**40, 1], [0, 2, -9, 1]], [[0, 2, 0, 2]]).unique().tolist() == [0]
    assert run([0, 1], [[0, 2, 0, 2**62], [0, 2, 0, -1]], [[0, 2, 0, 2]]).unique().tolist() == [0]
    assert run([2**30, -5], good, [[0, 2, 0, 2]]).unique().tolist() == [0]
    assert run([0, 1], good, [[-7, 2**30, 2**30, 16]]).unique().tolist() == [0]
    with pytest.raises(RuntimeError, match=r"rows is torch\.int64 \[1, 4\]; expected"):
        run([0, 1], good[:1], [[0, 2, 0, 2]])


# ---- the plan -----------------------------------------------------------------------------------


@hypothesis.given(
    partitions(40, 9),
    hypothesis.strategies.sampled_from((1, 4, 16)),
    hypothesis.strategies.sampled_from((0, 1)),
)
@hypothesis.settings(max_examples=300)
def test_tiles_cover_every_connection_once(
    partition: Partition, block: int, transposed: int
) -> None:
    """The weights that tiles visit are all entries, each from its own row and column."""
    tiles = planner.tile_rows(partition, block, transposed)
    rows = planner.row_weights(partition, transposed)
    reads, writes = planner.read_channels(partition), planner.write_channels(partition)
    row_channels, column_channels = (reads, writes) if transposed else (writes, reads)
    dense = np.zeros((partition.out_channels, partition.in_channels), np.int64)
    packed = partition.unpack(torch.arange(1, partition.entries + 1)).numpy()
    seen = np.zeros(len(rows), np.int64)
    for row, count, column, columns in tiles.tolist():
        assert 0 < count <= block
        for place in range(row, row + count):
            seen[place] += 1
            first, own, base, step = rows[place].tolist()
            assert column <= first or own == 0
            assert first + own <= column + columns or own == 0
            for j in range(first, first + own):
                at = (row_channels[place], column_channels[j])
                dense[at[::-1] if transposed else at] = 1 + base + (j - first) * step
    assert (seen == 1).all()
    assert np.array_equal(dense, packed)
    shared = planner.shares_tiles(partition, block, transposed)
    crossing = any(
        (rows[row : row + count, 1] != columns).any() for row, count, _, columns in tiles.tolist()
    )
    assert shared or not crossing


@hypothesis.given(partitions(20, 6))
def test_readers(partition: Partition) -> None:
    places = planner.read_channels(partition)
    for channel, found in enumerate(planner.readers(partition).tolist()):
        assert [place for place in found if place >= 0] == np.flatnonzero(
            places == channel
        ).tolist()


@pytest.mark.parametrize("rows", [1, 4, 32, 100, 2048])
@pytest.mark.parametrize("pixels", [1, 49, 10**6])
@pytest.mark.parametrize("element_bytes", [2, 4])
@pytest.mark.parametrize("single", [False, True])
def test_launches(rows: int, pixels: int, element_bytes: int, single: bool) -> None:
    """There is always one, every block is a power of two, and its operands fit shared memory."""
    shape = tuning.Shape(rows, rows, pixels, 4 * rows, element_bytes, single)
    for change in ({}, {"gradient": True}, {"stages": 2}):
        found = tuning.candidates(shape._replace(**change))
        assert 0 < len(found) <= 12
        assert len(set(found)) == len(found)
        for launch in found:
            assert all(size & (size - 1) == 0 for size in launch[:3])
            operands = (launch.rows + launch.pixels) * launch.depth * element_bytes
            assert single or operands * launch.stages <= 96 << 10


@needs_triton
@pytest.mark.parametrize("kernel", [1, 3])
def test_two_levels(kernel: int) -> None:
    layer = gc.nn.TwoLevelConv2d(8, 12, kernel, padding=kernel // 2, stride=kernel, groups=4)
    layer = layer.to(DEVICE)
    x = torch.randn(2, 8, 7, 6, device=DEVICE).contiguous(memory_format=torch.channels_last)
    leaves = (x.requires_grad_(), *layer.parameters())
    found = []
    for backend in ("triton", "reference"):
        layer.backend = backend
        y = layer(leaves[0])
        found.append([y, *torch.autograd.grad(y.square().sum(), leaves)])
        with torch.no_grad():
            torch.testing.assert_close(layer(leaves[0]), y)
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-3)


# ---- learned groups -----------------------------------------------------------------------------


def learned(
    function: Callable[..., torch.Tensor], backend: str, leaves: list[torch.Tensor], **settings: Any
) -> list[torch.Tensor]:
    """A result and the gradients of all its operands."""
    y = function(*leaves, backend=backend, **settings)
    grad = torch.linspace(-1, 1, y.numel(), device=DEVICE).view_as(y)
    return [y, *torch.autograd.grad(y, leaves, grad)]


@needs_triton
@pytest.mark.parametrize("gradient", ["straight_through", "winner"])
@pytest.mark.parametrize("weight_gradient", ["straight_through", "masked"])
def test_flgc(gradient: str, weight_gradient: str) -> None:
    settings = {"gradient": gradient, "weight_gradient": weight_gradient}
    shapes = [(2, 20, 5, 4), (18, 20, 3, 3), (18,), (20, 3), (18, 3)]
    leaves = [torch.randn(shape, device=DEVICE).requires_grad_() for shape in shapes]
    for padding in (0, 1):
        got, expected = (
            learned(gc.flgc_conv2d, backend, leaves, padding=padding, **settings)
            for backend in ("triton", "dense")
        )
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-3)
    products = [leaves[1], *leaves[3:]]
    got, expected = (
        learned(gc.flgc_weight, backend, products, **settings) for backend in ("triton", "dense")
    )
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@needs_triton
def test_flgc_without_learning_and_with_empty_groups() -> None:
    shapes = [(1, 7, 4, 4), (40, 7, 1, 1), (40,), (7, 6), (40, 6)]
    leaves = [torch.randn(shape, device=DEVICE) for shape in shapes]
    leaves[3][:, 2] = -9  # nobody reads in group 2, nobody writes in group 4
    leaves[4][:, 4] = -9
    leaves[0] = leaves[0].contiguous(memory_format=torch.channels_last)
    found = []
    for backend in ("triton", "dense"):
        own = [leaf.clone().requires_grad_() for leaf in leaves]
        y = gc.flgc_conv2d(*own, learn=False, backend=backend)
        found.append([y, *torch.autograd.grad(y.square().sum(), own[:3])])
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-3)


@needs_triton
@pytest.mark.parametrize(("outs", "ins"), [(8, 16), (12, 18), (5, 10)])
def test_dgconv(outs: int, ins: int) -> None:
    count = len(kronecker_radices(ins, outs))
    shapes = [(2, ins, 4, 4), (outs, ins, 1, 1), (outs,)]
    leaves = [torch.randn(shape, device=DEVICE).requires_grad_() for shape in shapes]
    for signs in ([1.0, -1.0, 0.0, -1.0], [-1.0] * 4, [1.0] * 4):
        gates = torch.tensor(signs[:count], device=DEVICE).requires_grad_()
        got, expected = (
            learned(gc.dgconv_conv2d, backend, [*leaves, gates]) for backend in ("triton", "dense")
        )
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-3)
        got, expected = (
            learned(gc.dgconv_weight, backend, [leaves[1], gates])
            for backend in ("triton", "dense")
        )
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@needs_triton
def test_learned_groups_refuse_what_is_not_finite() -> None:
    logits = torch.zeros(4, 2, device=DEVICE)
    logits[1, 1] = torch.nan
    x, weight = torch.ones(1, 4, 2, 2, device=DEVICE), torch.ones(4, 4, 1, 1, device=DEVICE)
    with pytest.raises(ValueError, match=r"input_logits has nan at \[1, 1\]; expected finite"):
        gc.flgc_conv2d(x, weight, None, logits, torch.zeros_like(logits), backend="triton")
    gates = torch.tensor([torch.inf, 1], device=DEVICE)
    with pytest.raises(ValueError, match=r"gates has inf at \[0\]; expected finite"):
        gc.dgconv_conv2d(x, weight, None, gates, backend="triton")


def test_tuning(tmp_path: Path) -> None:
    """Each kernel of a call gets its fastest launch, which another process then knows."""
    first = tuning.Shape(32, 32, 1000, 256, 2, False)
    second = first._replace(gradient=True)
    wanted = {shape: tuning.candidates(shape)[-1] for shape in (first, second)}
    path = tmp_path / "choices.json"

    def new() -> tuning.Tuned:
        return tuning.Tuned(lambda: Remembered(path), lambda: "A GPU")

    tuned = new()
    assert tuned.launch(first) == tuning.candidates(first)[0]

    def milliseconds(call: Callable[[], object]) -> float:
        call()
        return sum(tuned.launch(shape) != wanted[shape] for shape in wanted) + 1.0

    found = tuned.tune(lambda: [tuned.launch(shape) for shape in wanted], milliseconds)
    assert found == wanted
    assert {shape: tuned.launch(shape) for shape in wanted} == wanted
    assert {shape: new().launch(shape) for shape in wanted} == wanted
    text = path.read_text()
    assert "A GPU; Shape(rows=32, " in text
    # A launch that is no candidate (any more) is not taken from a file.
    path.write_text(text.replace(str(tuple(wanted[first])), "(1, 2, 3, 4, 5)"))
    assert new().launch(first) == tuning.candidates(first)[0]


# ---- torch.compile ------------------------------------------------------------------------------


@needs_triton
def test_compile_in_one_graph() -> None:
    partition = PARTITIONS["ragged"]
    layer = gc.nn.PartitionedConv2d(
        9, 7, 3, padding=1, partition=partition, activation="relu", backend="triton"
    ).to(DEVICE)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        x = torch.randn(1, 9, 5, 4, device=DEVICE, requires_grad=True)
        expected, got = layer(x), compiled(x)
        torch.testing.assert_close(got, expected)
        parameters = (x, *layer.parameters())
        for one, other in zip(
            torch.autograd.grad(got.square().sum(), parameters),
            torch.autograd.grad(expected.square().sum(), parameters),
            strict=True,
        ):
            torch.testing.assert_close(one, other)


@needs_triton
def test_compile_for_any_batch() -> None:
    partition = PARTITIONS["permuted"]
    layer = gc.nn.PartitionedConv2d(12, 8, 1, partition=partition, backend="triton").to(DEVICE)
    graphs = []

    def keep(graph: torch.fx.GraphModule, _: object) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend=keep)
    with torch.no_grad():
        for batch in (2, 3, 5):
            x = torch.randn(batch, 12, 4, 3, device=DEVICE)
            torch.testing.assert_close(compiled(x), layer(x))
    assert len(graphs) == 1


@needs_triton
def test_vmap() -> None:
    partition = PARTITIONS["permuted"]
    x = torch.randn(3, 1, partition.in_channels, 2, 2, device=DEVICE)
    weight = torch.randn(3, partition.entries, 1, 1, device=DEVICE)

    def convolve(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return gc.conv2d(x, weight, partition=partition, backend="triton")

    both = torch.vmap(convolve)(x, weight)
    expected = torch.stack([convolve(*pair) for pair in zip(x, weight, strict=True)])
    torch.testing.assert_close(both, expected)


# ---- compiled ahead of time ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def ahead_of_time() -> dict[str, Any]:
    """What compilers make of the kernels for GPUs that are not here."""
    pytest.importorskip("triton")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    program = Path(__file__).with_name("triton_ahead.py")
    run = subprocess.run(
        [sys.executable, str(program), "80", "90"],
        env=environment | {"TRITON_DEFAULT_FP_FUSION": "1"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    report: dict[str, Any] = json.loads(run.stdout)
    return report


def test_kernels_compile_without_spills(ahead_of_time: dict[str, Any]) -> None:
    found = ahead_of_time["kernels"]
    assert {entry["kernel"] for entry in found} == set(KERNELS)
    assert {entry["capability"] for entry in found} == {80, 90}
    for entry in found:
        # A few words, which some releases keep there outside of the loops.
        assert entry["stack"] <= 32, entry
        assert entry["local"] == 0, entry
        assert 16 <= entry["reg"] <= 255, entry
        assert entry["dynamic shared"] <= 99 << 10, entry


def test_a_chain_is_read_as_it_was_written(ahead_of_time: dict[str, Any]) -> None:
    """No copy runs ahead of the barrier between two stages, and pixels are moved as vectors."""
    entries = [e for e in ahead_of_time["kernels"] if e["kernel"] == "chain"]
    assert len(entries) >= 8
    for entry in entries:
        assert entry["asynchronous copies"] == 0, entry
        assert entry["vector loads"] > 0, entry


def test_kernels_use_the_matrix_units(ahead_of_time: dict[str, Any]) -> None:
    products = [e for e in ahead_of_time["kernels"] if e["kernel"] in MATRIX_KERNELS]
    assert len(products) > 10
    for entry in products:
        assert entry["matrix instructions"] > 0, entry


def test_rows_of_pixels_are_loaded_as_vectors(ahead_of_time: dict[str, Any]) -> None:
    """A gather of channels leaves the pixels of a channel next to each other, for 16 bytes each."""
    rows = [e for e in ahead_of_time["kernels"] if e["case"] == "1×1 f32 NCHW"]
    assert {e["direction"] for e in rows} == {"forward", "input gradient", "weight gradient"}
    for entry in rows:
        assert entry["vector loads"] > 0, entry


def test_torch_compile_sees_the_kernels(ahead_of_time: dict[str, Any]) -> None:
    """As kernels with what they write, not as operations that it cannot look into."""
    targets = ahead_of_time["graph"]
    assert targets.count("triton_kernel_wrapper_functional") == 4
    assert not any("groupconv" in target for target in targets)
