"""What only a GPU can show: both sets of kernels on it, streams, CUDA graphs, the compiler.

Skipped without one; `benches/gpu.sh` runs these on a machine that has one.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from helpers import (
    GEOMETRIES,
    LAYOUTS,
    PARTITIONS,
    Geometry,
    check_convolution,
    tensors,
)

import groupconv_ext as gc
from groupconv_ext import Partition, backends
from groupconv_ext.backends import Backend, Call, choice
from groupconv_ext.backends.native import NATIVE
from groupconv_ext.backends.remembered import Remembered
from groupconv_ext.backends.triton import TRITON

DEVICE = "cuda"
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
LARGER = {
    "1×1": (Partition.random(96, 160, 4, seed=0, uneven=True), Geometry((14, 14))),
    "3×3": (Partition.random(64, 64, 16, seed=0), Geometry((9, 13), (3, 3), padding=(1,) * 4)),
    "one group": (Partition.contiguous(80, 72, 1), Geometry((8, 8), (3, 3), stride=(2, 2))),
}

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def _reason(backend: Backend) -> str | None:
    return backend.why_not(Call(DEVICE, torch.float32, True))


each_backend = pytest.mark.parametrize(
    "backend",
    [
        pytest.param(
            b, id=b.name, marks=pytest.mark.skipif(bool(_reason(b)), reason=str(_reason(b)))
        )
        for b in (NATIVE, TRITON)
    ],
)


@contextmanager
def float32_as(precision: str) -> Iterator[None]:
    """Whether PyTorch may round the factors of float32 convolutions."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = precision == "tf32"
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


def operands(
    partition: Partition, geometry: Geometry, dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, ...]:
    return tuple(t.to(DEVICE) for t in tensors(partition, geometry, dtype=dtype))


# ---- right --------------------------------------------------------------------------------------


@each_backend
@pytest.mark.parametrize("name", PARTITIONS)
def test_partitions(backend: Backend, name: str) -> None:
    """A few windows only: every one is a kernel of its own to Triton, and takes a second."""
    partition = PARTITIONS[name]
    for window in ("1×1", "3×3", "strided"):
        x, weight, bias = operands(partition, GEOMETRIES[window])
        check_convolution(
            partition, GEOMETRIES[window], x, weight, bias, None, "relu6", backend=backend
        )


@each_backend
@pytest.mark.parametrize(
    "layout",
    [
        *("NCHW", "channels_last", "channels sliced", "columns sliced"),
        *("rows and columns swapped", "unaligned", "one image expanded"),
    ],
)
def test_layouts(backend: Backend, layout: str) -> None:
    for name in ("ragged", "depthwise", "overlapping, unread"):
        x, weight, _ = operands(PARTITIONS[name], GEOMETRIES["3×3"])
        turned = LAYOUTS[layout](x)
        check_convolution(PARTITIONS[name], GEOMETRIES["3×3"], turned, weight, backend=backend)


@each_backend
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("name", LARGER)
def test_larger_layers(
    backend: Backend, dtype: torch.dtype, channels_last: bool, name: str
) -> None:
    """Several tiles, blocks and splits, in every dtype."""
    partition, geometry = LARGER[name]
    x, weight, bias = operands(partition, geometry, dtype)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    check_convolution(partition, geometry, x, weight, bias, backend=backend)


@each_backend
def test_tf32_where_it_is_allowed(backend: Backend) -> None:
    partition, geometry = LARGER["1×1"]
    x, weight, _ = operands(partition, geometry)
    exact = gc.conv2d(x.double(), weight.double(), partition=partition, backend="reference")
    scale = exact.abs().max()
    errors = []
    for precision in ("ieee", "tf32"):
        with float32_as(precision):
            y = gc.conv2d(x, weight, partition=partition, backend=backend.name)
        errors.append(float((y.double() - exact).abs().max() / scale))
    assert errors[0] < 1e-5
    assert errors[1] < 5e-3


@each_backend
def test_the_same_bits_again(backend: Backend) -> None:
    partition, geometry = LARGER["3×3"]
    x, weight, _ = (t.requires_grad_() for t in operands(partition, geometry))
    runs = []
    for _ in range(3):
        y = gc.conv2d(x, weight, partition=partition, padding=1, backend=backend.name)
        runs.append((y, *torch.autograd.grad(y.square().sum(), (x, weight))))
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], other, strict=True))


# ---- streams, graphs, compilers -----------------------------------------------------------------


@each_backend
def test_runs_on_the_current_stream(backend: Backend) -> None:
    """What a stream still computes is what a convolution on that stream reads."""
    partition = LARGER["1×1"][0]
    weight = torch.randn(partition.entries, 1, 1, device=DEVICE)
    source = torch.randn(4, 96, 64, 64, device=DEVICE)
    expected = gc.conv2d(source * 2, weight, partition=partition, backend=backend.name)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        x = torch.zeros_like(source)
        torch.cuda._sleep(20_000_000)
        x.copy_(source).mul_(2)
        y = gc.conv2d(x, weight, partition=partition, backend=backend.name)
    stream.synchronize()
    torch.testing.assert_close(y, expected)


@each_backend
def test_a_training_step_in_a_graph(backend: Backend) -> None:
    """Captured once, replayed on other numbers; nothing is measured while it is captured."""
    partition, _ = LARGER["3×3"]
    x = torch.randn(2, 64, 9, 13, device=DEVICE, requires_grad=True)
    weight = torch.randn(partition.entries, 3, 3, device=DEVICE, requires_grad=True)

    def step() -> tuple[torch.Tensor, ...]:
        y = gc.conv2d(x, weight, partition=partition, padding=1, backend=backend.name)
        return y, *torch.autograd.grad(y.square().sum(), (x, weight))

    warm = torch.cuda.Stream()
    warm.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(warm):
        step()
    torch.cuda.current_stream().wait_stream(warm)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for _ in range(2):
        with torch.no_grad():
            x.copy_(torch.randn_like(x))
        graph.replay()
        torch.testing.assert_close(captured, step())


def test_auto_in_a_graph_measures_nothing(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path_factory.mktemp("cache") / "choices.json"
    monkeypatch.setattr(choice, "_known", {})
    monkeypatch.setattr(choice, "remembered", lambda: Remembered(path))
    partition, _ = LARGER["1×1"]
    x = torch.randn(2, 96, 14, 14, device=DEVICE)
    weight = torch.randn(partition.entries, 1, 1, device=DEVICE)
    expected = gc.conv2d(x, weight, partition=partition, backend="reference")
    gc.conv2d(x, weight, partition=partition, backend="aten")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = gc.conv2d(x, weight, partition=partition)
    graph.replay()
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-3)
    assert not path.exists()
    torch.testing.assert_close(
        gc.conv2d(x, weight, partition=partition), expected, rtol=1e-4, atol=1e-3
    )
    assert path.exists(), "measured outside of a graph, once"


@each_backend
def test_inductor(backend: Backend) -> None:
    partition, _ = LARGER["3×3"]
    layer = gc.nn.PartitionedConv2d(
        64, 64, 3, padding=1, partition=partition, activation="relu", backend=backend.name
    ).to(DEVICE)
    compiled = torch.compile(lambda x: layer(x * 2) + 1, fullgraph=True)
    x = torch.randn(2, 64, 9, 13, device=DEVICE, requires_grad=True)
    expected, got = layer(x * 2) + 1, compiled(x)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-3)
    parameters = (x, *layer.parameters())
    grads = [torch.autograd.grad(y.square().mean(), parameters) for y in (got, expected)]
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-3)


# ---- learned groups -----------------------------------------------------------------------------


def test_learned_groups_by_triton() -> None:
    if reason := _reason(TRITON):
        pytest.skip(reason)
    shapes = [(4, 96, 14, 14), (160, 96, 1, 1), (160,), (96, 8), (160, 8)]
    leaves = [torch.randn(shape, device=DEVICE).requires_grad_() for shape in shapes]
    found = []
    for backend in ("triton", "dense"):
        y = gc.flgc_conv2d(*leaves, backend=backend)
        found.append([y, *torch.autograd.grad(y.square().mean(), leaves)])
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-3)


# ---- refused ------------------------------------------------------------------------------------


@each_backend
def test_operands_on_different_devices(backend: Backend) -> None:
    partition, _ = LARGER["1×1"]
    x = torch.randn(1, 96, 4, 4, device=DEVICE)
    weight = torch.randn(partition.entries, 1, 1)
    with pytest.raises(ValueError, match=r"weight is on cpu and x is on cuda:0; move one of them"):
        gc.conv2d(x, weight, partition=partition, backend=backend.name)


def test_every_backend_answers_for_the_gpu() -> None:
    for name, reason in backends.explain("cuda", torch.bfloat16, needs_grad=True).items():
        assert reason is None or name in ("native", "triton")
