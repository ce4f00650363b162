"""Where a convolution must work: compilers, transforms, modes, Python threads, processes."""

import copy
import io
import pickle
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from helpers import (
    GEOMETRIES,
    LAYOUTS,
    PARTITIONS,
    Layout,
    backends_for,
    needs_native,
    tensors,
    window_of,
)
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call, grad, hessian, jvp, vmap
from torch.library import opcheck
from torch.nn import functional

import groupconv_ext as gc
from groupconv_ext import Partition, backends

pytestmark = needs_native

each_layout = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
each_backend = pytest.mark.parametrize("backend", backends_for(torch.float32))

RAGGED = PARTITIONS["ragged"]


class Network(torch.nn.Module):
    """Two layers, a permutation between them and a shortcut around the second."""

    def __init__(self, backend: str = "auto") -> None:
        super().__init__()
        first, second = Partition.random(6, 8, 2, seed=0), PARTITIONS["overlapping, unread"]
        self.first = gc.nn.PartitionedConv2d(
            6, 8, 3, padding=1, partition=first, activation="relu", backend=backend
        )
        self.second = gc.nn.PartitionedConv2d(
            6, 4, 1, partition=second, activation="silu", backend=backend
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.first(x)
        return self.second(y[:, :6], residual=y[:, 4:])


def results(
    function: Callable[[torch.Tensor], torch.Tensor], network: Network, x: torch.Tensor
) -> list[torch.Tensor]:
    """Output and all gradients."""
    x = x.detach().requires_grad_()
    y = function(x)
    weights = (torch.arange(y.numel()) % 7 - 3.0).view_as(y)
    return [y.detach(), *torch.autograd.grad((y * weights).sum(), (x, *network.parameters()))]


def assert_same(actual: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    for a, e in zip(actual, expected, strict=True):
        # Fused by a compiler, the sums around the convolution round in another order.
        torch.testing.assert_close(a, e, rtol=1e-5, atol=1e-5)
        assert a.stride() == e.stride()


@pytest.fixture(autouse=True)
def compile_anew() -> None:
    """torch stops compiling a function that it had to compile too often, over all tests."""
    torch._dynamo.reset()


# ---- operations ---------------------------------------------------------------------------------


@each_layout
def test_opcheck(layout: Layout) -> None:
    geometry = GEOMETRIES["strided"]
    x, weight, bias = tensors(RAGGED, geometry, dtype=torch.float32)
    table, window, ops = RAGGED.cpu_table, window_of(geometry), torch.ops.groupconv
    x = layout(x)
    y = ops.conv2d(x, weight, bias, None, table, 7, *window, 1)
    y = layout(y)
    opcheck(ops.conv2d.default, (x, weight, bias, y, table, 7, *window, 3))
    opcheck(
        ops.conv2d_input_grad.default, (y, weight, table, 9, *geometry.input_size, *window, False)
    )
    opcheck(
        ops.conv2d_input_grad.default, (y, weight, table, 9, *geometry.input_size, *window, True)
    )
    entries, kernel = RAGGED.entries, geometry.kernel_size
    opcheck(ops.conv2d_weight_grad.default, (y, x, table, entries, *kernel, *window))


@pytest.mark.parametrize("said", [{}, {"activation": 3}], ids=["nothing", "activation"])
def test_numbers_left_out_are_a_pointwise_window(said: dict[str, int]) -> None:
    op, table = torch.ops.groupconv.conv2d.default, RAGGED.cpu_table
    x, weight = torch.randn(2, 9, 5, 6), torch.randn(RAGGED.entries, 1, 1)
    code = said.get("activation", 0)
    expected = op(x, weight, None, None, table, 7, 1, 1, 0, 0, 0, 0, 1, 1, code)
    assert torch.equal(op(x, weight, None, None, table, 7, **said), expected)
    opcheck(op, (x, weight, None, None, table, 7), said)


@each_layout
@pytest.mark.parametrize(
    "shape", [(2, 9, 5, 6), (1, 9, 5, 6), (2, 9, 1, 6), (1, 9, 1, 1), (0, 9, 5, 6)]
)
def test_fake_results_lie_in_memory_as_real_ones(shape: tuple[int, ...], layout: Layout) -> None:
    x, weight = layout(torch.randn(shape)), torch.randn(RAGGED.entries, 1, 1)

    def run(x: torch.Tensor, weight: torch.Tensor) -> list[torch.Tensor]:
        x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_()
        y = gc.conv2d(x, weight, partition=RAGGED, backend="native")
        return [y, *torch.autograd.grad(y, (x, weight), y.detach())]

    real, meta = run(x, weight), run(x.to("meta"), weight.to("meta"))
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = run(mode.from_tensor(x), mode.from_tensor(weight))
    for r, f, m in zip(real, fake, meta, strict=True):
        assert f.shape == m.shape == r.shape
        assert f.stride() == m.stride() == r.stride()
        assert f.dtype == m.dtype == r.dtype


# ---- compilers ----------------------------------------------------------------------------------


@each_backend
def test_compiles_into_one_graph(backend: str) -> None:
    network = Network(backend)
    compiled = torch.compile(network, fullgraph=True, backend="aot_eager")
    for layout in ("NCHW", "channels_last"):
        x = LAYOUTS[layout](torch.randn(2, 6, 7, 9))
        assert_same(results(compiled, network, x), results(network, network, x))


def test_compiles_for_any_size() -> None:
    network = Network()
    graphs = 0

    def count(graph: torch.fx.GraphModule, _: object) -> torch.fx.GraphModule:
        nonlocal graphs
        graphs += 1
        return graph

    compiled = torch.compile(network, fullgraph=True, backend=count, dynamic=True)
    for shape in ((2, 6, 7, 9), (3, 6, 8, 5), (5, 6, 11, 11)):
        x = torch.randn(shape)
        with torch.no_grad():
            assert_same([compiled(x)], [network(x)])
    assert graphs == 1


@pytest.mark.slow
def test_inductor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))  # or it may be a stored result
    network = Network()
    compiled = torch.compile(network, fullgraph=True)
    x = torch.randn(2, 6, 7, 9)
    assert_same(results(compiled, network, x), results(network, network, x))


def test_compiles_anew_for_another_partition() -> None:
    def convolve(x: torch.Tensor, weight: torch.Tensor, partition: Partition) -> torch.Tensor:
        return gc.conv2d(x, weight, partition=partition)

    compiled = torch.compile(convolve, fullgraph=True, backend="aot_eager")
    x, weight = torch.randn(1, 8, 3, 3), torch.randn(32, 1, 1)
    for seed in (0, 1):
        partition = Partition.random(8, 8, 2, seed=seed)
        assert torch.equal(compiled(x, weight, partition), convolve(x, weight, partition))


def test_export_with_any_batch() -> None:
    network = Network().eval()
    batch = torch.export.Dim("batch")
    program = torch.export.export(network, (torch.randn(2, 6, 7, 9),), dynamic_shapes=[{0: batch}])
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    for size in (1, 2, 5):
        x = torch.randn(size, 6, 7, 9)
        assert torch.equal(loaded(x), network(x))


# ---- transforms ---------------------------------------------------------------------------------


def convolve(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, residual: torch.Tensor
) -> torch.Tensor:
    return gc.conv2d(
        x, weight, bias, partition=RAGGED, stride=2, padding=1, activation="relu", residual=residual
    )


@pytest.mark.parametrize("in_dims", [(0, None, None, None), (None, 0, None, None), (1, 2, 0, 3)])
def test_vmap(in_dims: tuple[int | None, ...]) -> None:
    operands = (
        torch.randn(2, 9, 5, 6),
        torch.randn(RAGGED.entries, 3, 3),
        torch.randn(7),
        torch.randn(2, 7, 3, 3),
    )
    batches = [torch.stack([(i + 1) * t for i in range(3)]) for t in operands]

    def argument(i: int, dim: int | None) -> torch.Tensor:
        return operands[i] if dim is None else batches[i].movedim(0, dim)

    actual = vmap(convolve, in_dims)(*(argument(i, dim) for i, dim in enumerate(in_dims)))
    for n in range(3):
        one = [batches[i][n] if dim is not None else operands[i] for i, dim in enumerate(in_dims)]
        assert torch.equal(actual[n], convolve(*one))


@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize("in_dims", [(0, None), (None, 0), (0, 0)])
def test_vmap_of_a_pointwise_layer(in_dims: tuple[int | None, ...], activation: str | None) -> None:
    x, weight = torch.randn(3, 2, 9, 5, 6), torch.randn(3, RAGGED.entries, 1, 1)
    given = [t if dim == 0 else t[0] for t, dim in zip((x, weight), in_dims, strict=True)]
    pointwise = partial(gc.conv2d, partition=RAGGED, activation=activation)
    actual = vmap(pointwise, in_dims)(*given)
    for n in range(3):
        one = [t[n] if dim == 0 else t for t, dim in zip(given, in_dims, strict=True)]
        assert torch.equal(actual[n], pointwise(*one))


@each_backend
def test_gradients_of_every_sample(backend: str) -> None:
    network = Network(backend)
    x = torch.randn(3, 6, 5, 4)

    def loss(parameters: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        return functional_call(network, parameters, x[None]).square().sum()

    parameters = dict(network.named_parameters())
    actual = vmap(grad(loss), (None, 0))(parameters, x)
    for n in range(3):
        for name, value in grad(loss)(parameters, x[n]).items():
            torch.testing.assert_close(actual[name][n], value)


def test_hessian_and_forward_mode() -> None:
    x, weight = torch.randn(1, 9, 2, 2), torch.randn(RAGGED.entries, 1, 1)
    dense = RAGGED.unpack(weight)
    tangent = torch.randn_like(x)

    def squares(convolve: Callable[[torch.Tensor], torch.Tensor]) -> list[torch.Tensor]:
        return [
            hessian(lambda x: convolve(x).square().sum())(x),
            jvp(convolve, (x,), (tangent,))[1],
        ]

    actual = squares(lambda x: gc.conv2d(x, weight, partition=RAGGED))
    expected = squares(lambda x: functional.conv2d(x, dense))
    torch.testing.assert_close(actual, expected)


def test_native_says_that_it_has_no_forward_mode() -> None:
    x, weight = torch.randn(1, 9, 2, 2), torch.randn(RAGGED.entries, 1, 1)
    with pytest.raises(backends.BackendError, match=r"'native' cannot run .* forward mode"):
        jvp(lambda x: gc.conv2d(x, weight, partition=RAGGED, backend="native"), (x,), (x,))


# ---- modes --------------------------------------------------------------------------------------


@each_backend
def test_autocast(backend: str) -> None:
    network = Network(backend)
    x = torch.randn(2, 6, 7, 9, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = network(x)
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    assert x.grad.dtype == network.first.weight.grad.dtype == torch.float32
    low = copy.deepcopy(network).bfloat16()
    assert torch.equal(y, low(x.bfloat16()))
    if backends.explain("cpu", torch.float64)[backend] is None:
        with torch.autocast("cpu", torch.bfloat16):
            assert Network(backend).double()(x.double()).dtype == torch.float64


@each_backend
def test_inference_mode(backend: str) -> None:
    x, weight = torch.randn(1, 6, 5, 5), torch.randn(24, 1, 1)
    with torch.inference_mode():
        # First used here; what it keeps for later must still be fit for training.
        partition = Partition.random(6, 8, 2, seed=1)
        y = gc.conv2d(x, weight, partition=partition, backend=backend)
    assert y.is_inference()
    weight.requires_grad_()
    trained = gc.conv2d(x, weight, partition=partition, backend=backend)
    trained.sum().backward()
    assert weight.grad.abs().min() > 0
    with torch.no_grad():
        plain = gc.conv2d(x, weight, partition=partition, backend=backend)
    assert not plain.requires_grad
    torch.testing.assert_close([y, plain], [trained.detach()] * 2)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda n: pickle.loads(pickle.dumps(n))])
def test_copies_are_apart(duplicate: Callable[[Network], Network]) -> None:
    network = Network()
    x = torch.randn(2, 6, 7, 9)
    expected = network(x)
    twin = duplicate(network)
    assert twin.first.partition == network.first.partition
    with torch.no_grad():
        network.first.weight.zero_()
    assert torch.equal(twin(x), expected)
    assert not torch.equal(network(x), expected)


def test_several_python_threads_at_once() -> None:
    network = Network()
    inputs = [torch.randn(n % 3 + 1, 6, 20 + n, 30) for n in range(6)]
    expected = [results(network, network, x) for x in inputs]
    wrong: list[int] = []
    start = threading.Barrier(len(inputs))

    def work(n: int) -> None:
        start.wait()
        for _ in range(15):
            found = results(network, network, inputs[n])
            if not all(map(torch.equal, found, expected[n])):
                wrong.append(n)

    workers = [threading.Thread(target=work, args=(n,)) for n in range(len(inputs))]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong
