"""What only a GPU can show: the CUDA kernels run there, on any stream, in graphs, repeatably.

Their arithmetic is checked without one, in test_cuda_on_cpu.py.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import LAYOUTS

import groupconv_ext as gc
from groupconv_ext import Partition, _ops

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.skipif(not _ops.has_cuda_kernels, reason="built without CUDA"),
]

PARTITIONS = {
    "depthwise": Partition.contiguous(64, 64, 64),
    "small groups": Partition.random(128, 128, 32, seed=1),
    "uneven": Partition.random(192, 160, 5, seed=2, uneven=True),
    "in order": Partition.contiguous(256, 256, 4),
    "overlapping": Partition.from_lists(
        [list(range(70)), list(range(40, 128))],
        [list(range(0, 96, 2)), list(range(1, 96, 2))],
        in_channels=128,
        out_channels=96,
    ),
}
TOLERANCE = {
    torch.float64: 1e-12,
    torch.float32: 1e-5,
    torch.bfloat16: 1e-2,
    torch.float16: 2e-3,
}


def call(
    p: Partition, operands: list[torch.Tensor], backend: str, kernel: int, stride: int
) -> list[torch.Tensor]:
    """The output and all gradients."""
    x, weight, bias = (t.detach().requires_grad_() for t in operands)
    settings: dict[str, Any] = {"stride": stride, "padding": kernel // 2, "activation": "relu"}
    y = gc.conv2d(x, weight, bias, partition=p, backend=backend, **settings)
    grad = torch.linspace(-1, 1, y.numel(), dtype=y.dtype, device=y.device).view_as(y)
    return [y, *torch.autograd.grad(y, (x, weight, bias), grad)]


def random_operands(
    p: Partition, kernel: int, dtype: torch.dtype, batch: int = 3
) -> list[torch.Tensor]:
    shapes = (batch, p.in_channels, 19, 22), (p.entries, kernel, kernel), (p.out_channels,)
    scale = (p.entries * kernel * kernel / p.out_channels) ** -0.5
    scales = (1.0, scale, 1.0)
    return [
        (torch.randn(*shape, device="cuda") * s).to(dtype)
        for shape, s in zip(shapes, scales, strict=True)
    ]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", PARTITIONS)
def test_matches_the_reference(name: str, layout: str, dtype: torch.dtype) -> None:
    p = PARTITIONS[name]
    for kernel, stride in ((1, 1), (3, 2)):
        x, *rest = random_operands(p, kernel, dtype)
        operands = [LAYOUTS[layout](x.cpu()).to("cuda"), *rest]
        found = call(p, operands, "native", kernel, stride)
        # What a ReLU's derivative is decided by is the output as it was rounded.
        exact = call(p, [t.double() for t in operands], "reference", kernel, stride)
        for name_, got, want in zip(["y", "x", "weight", "bias"], found, exact, strict=True):
            error = (got.double() - want).norm() / want.norm()
            assert error < 4 * TOLERANCE[dtype] ** (1 if name_ == "y" else 0.75), name_


MANY_CHANNELS = {
    "in order": (Partition.contiguous(256, 256, 4), 3),
    "permuted": (Partition.random(512, 512, 2, seed=5), 1),
    "uneven": (Partition.random(600, 700, 4, seed=6, uneven=True), 1),
    "overlapping": (
        Partition.from_lists(
            [list(range(200)), list(range(100, 300))],
            [list(range(0, 260, 2)), list(range(1, 260, 2))],
            in_channels=320,
            out_channels=260,
        ),
        1,
    ),
}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("name", MANY_CHANNELS)
def test_groups_of_many_channels(name: str, channels_last: bool, dtype: torch.dtype) -> None:
    """Enough of them, and of pixels, for the warp-group instructions of an H100."""
    p, kernel = MANY_CHANNELS[name]
    x, *rest = random_operands(p, kernel, dtype, batch=48)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    found = call(p, [x, *rest], "native", kernel, 1)
    exact = call(p, [t.double() for t in (x, *rest)], "reference", kernel, 1)
    for name_, got, want in zip(["y", "x", "weight", "bias"], found, exact, strict=True):
        error = (got.double() - want).norm() / want.norm()
        assert error < 4 * TOLERANCE[dtype] ** (1 if name_ == "y" else 0.75), name_


def test_tf32_only_where_torch_allows_it(monkeypatch: pytest.MonkeyPatch) -> None:
    p = PARTITIONS["in order"]
    operands = random_operands(p, 1, torch.float32)
    exact = call(p, [t.double() for t in operands], "reference", 1, 1)[0]
    errors = []
    for allowed in (False, True):
        monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", allowed)
        y = call(p, operands, "native", 1, 1)[0]
        errors.append(((y.double() - exact).norm() / exact.norm()).item())
    assert errors[0] < 1e-6
    assert 1e-5 < errors[1] < 2e-3


@pytest.mark.parametrize("name", PARTITIONS)
def test_the_same_bits_every_time_and_on_any_stream(name: str) -> None:
    p = PARTITIONS[name]
    operands = random_operands(p, 3, torch.float16)
    first = call(p, operands, "native", 3, 1)
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        for _ in range(5):
            again = call(p, operands, "native", 3, 1)
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def layer(kind: str) -> torch.nn.Module:
    layers: dict[str, Callable[[], torch.nn.Module]] = {
        "partitioned": lambda: gc.nn.PartitionedConv2d(
            160, 160, 3, padding=1, partition=Partition.random(160, 160, 5, seed=4)
        ),
        "flgc": lambda: gc.nn.FLGConv2d(96, 128, 1, groups=4, backend="native"),
        "dgconv": lambda: gc.nn.DGConv2d(96, 96, 3, padding=1, backend="native"),
    }
    made = layers[kind]().cuda()
    if kind == "partitioned":
        made.backend = "native"  # type: ignore[assignment]
    return made


@pytest.mark.parametrize("kind", ["partitioned", "flgc", "dgconv"])
def test_a_training_step_in_a_graph(kind: str) -> None:
    """Nothing waits, nothing is allocated elsewhere: a captured step replays on new numbers."""
    made = layer(kind)
    x = torch.randn(4, made.in_channels, 14, 14, device="cuda")  # type: ignore[arg-type]

    def step() -> list[torch.Tensor]:
        y = made(x)
        wanted = [p for p in made.parameters() if p.requires_grad]
        return [y, *torch.autograd.grad(y.square().sum(), wanted)]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    x.copy_(torch.randn_like(x))
    graph.replay()
    for found, expected in zip(captured, step(), strict=True):
        torch.testing.assert_close(found, expected)


def test_chain() -> None:
    partitions = [Partition.random(128, 128, 16, seed=s) for s in range(3)]
    x = torch.randn(2, 128, 15, 13, device="cuda", dtype=torch.float64).requires_grad_()
    weights = [
        torch.randn(p.entries, 1, 1, device="cuda", dtype=torch.float64).requires_grad_()
        for p in partitions
    ]

    def run(backend: str) -> list[torch.Tensor]:
        y = gc.chain(x, weights, partitions=partitions, activation="relu", backend=backend)
        return [y, *torch.autograd.grad(y, [x, *weights], torch.cos(y.detach()))]

    torch.testing.assert_close(run("native"), run("reference"))


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("layout", ["NCHW", "channels_last"])
def test_two_levels(layout: str, dtype: torch.dtype) -> None:
    for channels, groups, kernel in ((96, 8, 3), (64, 32, 1), (70, 2, 1)):
        layer = gc.nn.TwoLevelConv2d(channels, 2 * channels, kernel, groups=groups)
        layer = layer.to("cuda", dtype)
        x = LAYOUTS[layout](torch.randn(2, channels, 13, 18)).to("cuda", dtype)
        layer.backend = "native"
        with torch.no_grad():
            y = layer(x)
            layer.double().backend = "reference"
            exact = layer(x.double())
        assert (y.double() - exact).norm() / exact.norm() < 4 * TOLERANCE[dtype]


def test_operands_on_two_devices_are_refused() -> None:
    p = PARTITIONS["small groups"]
    x, weight, bias = random_operands(p, 1, torch.float32)
    for operands in ((x, weight.cpu(), bias), (x, weight, bias.cpu()), (x.cpu(), weight, bias)):
        with pytest.raises(ValueError, match="is on"):
            gc.conv2d(*operands, partition=p, backend="native")
    window = (1, 1, 0, 0, 0, 0, 1, 1)
    with pytest.raises(RuntimeError, match="on the device of the other operands"):
        _ops.conv2d(x, weight, None, None, p.cpu_table, p.out_channels, *window, 0)
    torch.cuda.synchronize()


def test_out_of_memory_is_torchs_own_error() -> None:
    p = Partition.contiguous(4, 4096, 4)
    free, _ = torch.cuda.mem_get_info()
    side = int((free / 4096 * 4) ** 0.5)
    x = torch.zeros(1, 4, 1, 1, device="cuda").expand(1, 4, side, side)
    weight = torch.randn(p.entries, 1, 1, device="cuda")
    with pytest.raises(torch.cuda.OutOfMemoryError):
        gc.conv2d(x, weight, partition=p, backend="native")
    assert gc.conv2d(x[:, :, :2, :2], weight, partition=p, backend="native").isfinite().all()


def test_compiles_into_one_graph() -> None:
    p = PARTITIONS["uneven"]
    x, weight, bias = random_operands(p, 3, torch.float32)

    def convolve(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return gc.conv2d(x, weight, bias, partition=p, padding=1, backend="native")

    compiled = torch.compile(convolve, fullgraph=True)
    torch.testing.assert_close(compiled(x, weight), convolve(x, weight))
