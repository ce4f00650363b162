"""The prologue: relu(x · scale + shift) convolved in one call, its gradients, and where it works.

Thousands of random ones on every instruction set run in test_differential.py.
"""

import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import (
    DTYPES,
    GEOMETRIES,
    ISAS,
    LAYOUTS,
    PARTITIONS,
    Geometry,
    Layout,
    backends_for,
    forced_isa,
    needs_native,
    tensors,
    window_of,
)
from torch import nn
from torch.autograd import gradcheck, gradgradcheck
from torch.func import functional_call, grad, jvp, vmap
from torch.library import opcheck
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

import groupconv_ext as gc
from groupconv_ext import Partition, Prologue, backends, reference

RAGGED = PARTITIONS["ragged"]
OVERLAPPING = PARTITIONS["overlapping, unread"]
each_float64_backend = pytest.mark.parametrize("backend", backends_for(torch.float64))
each_backend = pytest.mark.parametrize("backend", backends_for(torch.float32))


def normalisation(channels: int, dtype: torch.dtype = torch.float32) -> nn.BatchNorm2d:
    norm = nn.BatchNorm2d(channels, dtype=dtype).eval()
    with torch.no_grad():
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
        norm.weight.normal_()
        norm.bias.normal_()
    return norm


def numbers(channels: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(channels, dtype=dtype), torch.randn(channels, dtype=dtype)


# ---- right --------------------------------------------------------------------------------------


@each_float64_backend
@pytest.mark.parametrize("layout", ["NCHW", "channels_last"])
@pytest.mark.parametrize("partition", PARTITIONS.values(), ids=PARTITIONS.keys())
def test_is_a_normalisation_a_relu_and_a_convolution(
    partition: Partition, layout: str, backend: str
) -> None:
    """In PyTorch's own words, zero padding after the ReLU included."""
    norm = normalisation(partition.in_channels, torch.float64)
    for geometry in GEOMETRIES.values():
        x, weight, bias = tensors(partition, geometry)
        x, (top, bottom, left, right) = LAYOUTS[layout](x), geometry.padding
        padded = functional.pad(norm(x).relu(), (left, right, top, bottom))
        expected = functional.conv2d(
            padded, partition.unpack(weight), bias, geometry.stride, 0, geometry.dilation
        )
        y = backends.choose(backend, backends.Call("cpu", x.dtype, False, prologue=True)).convolve(
            x,
            weight,
            bias,
            None,
            partition,
            window_of(geometry),
            "none",
            Prologue.from_batch_norm(norm),
        )
        torch.testing.assert_close(y, expected)
        assert backend != "native" or y.stride() == LAYOUTS[layout](y).stride()


@needs_native
@pytest.mark.native
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("layout", ["NCHW", "channels_last", "columns sliced"])
@pytest.mark.parametrize(
    ("partition", "geometry"),
    [
        # More rows than a band or a ring of prepared ones has, with several of them in between.
        (Partition.random(5, 10, 5, seed=0), Geometry((90, 200), (3, 3), padding=(1, 1, 1, 1))),
        (Partition.contiguous(18, 18, 18), Geometry((41, 9), (5, 3), (2, 1), (2, 2, 1, 1), (3, 1))),
        (Partition.contiguous(4, 4, 4), Geometry((300, 40), (1, 1), (5, 2))),
        # Channels as they lie, and some of many.
        (Partition.random(40, 64, 2, seed=1), Geometry((19, 17), (3, 3), padding=(1, 1, 1, 1))),
        (Partition(90, 32, [[3, 70], [70, 8, 1]], [range(16), range(16, 32)]), Geometry((9, 9))),
        (Partition.contiguous(70, 64, 1), Geometry((8, 8))),
        # Lanes over channels, in NCHW.
        (Partition.random(20, 32, 2, seed=1), Geometry((5, 14), (3, 3), padding=(1, 1, 1, 1))),
        # Rows of which the gradient copies a part at a time.
        (Partition.contiguous(3, 3, 1), Geometry((2, 1100))),
    ],
    ids=["bands", "ring", "strided", "as they lie", "few of many", "one block", "lanes", "long"],
)
def test_every_kernel(partition: Partition, geometry: Geometry, layout: str, isa: str) -> None:
    scale, shift = numbers(partition.in_channels, torch.float64)
    x, weight, _ = tensors(partition, geometry)
    operands = [t.requires_grad_() for t in (LAYOUTS[layout](x), weight, scale, shift)]
    top, _, left, _ = geometry.padding

    def run(backend: str) -> list[torch.Tensor]:
        y = gc.conv2d(
            *operands[:2],
            partition=partition,
            stride=geometry.stride,
            padding=(top, left),
            dilation=geometry.dilation,
            prologue=Prologue(*operands[2:], "relu"),
            backend=backend,
        )
        weights = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)
        return [y.detach(), *torch.autograd.grad(y, operands, weights)]

    with forced_isa(isa):
        torch.testing.assert_close(run("native"), run("reference"))


@needs_native
@pytest.mark.native
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("layout", ["NCHW", "channels_last"])
@pytest.mark.parametrize(
    ("partition", "geometry"),
    [
        (Partition.random(80, 80, 80, seed=0), Geometry((7, 6), (5, 5), padding=(2, 2, 2, 2))),
        (Partition.random(48, 96, 48, seed=0), Geometry((14, 13), (3, 3), (2, 2), (1, 1, 1, 1))),
        (Partition.random(37, 37, 37, seed=0), Geometry((90, 35), (3, 3), padding=(1, 1, 1, 1))),
        (Partition.random(140, 12, 2, seed=0), Geometry((9, 10), (3, 3), padding=(1, 1, 1, 1))),
    ],
    ids=["small maps", "strided small maps", "strips", "few outputs of many inputs"],
)
def test_kernels_of_float32(
    partition: Partition, geometry: Geometry, layout: str, isa: str
) -> None:
    scale, shift = numbers(partition.in_channels, torch.float32)
    given = [*tensors(partition, geometry, dtype=torch.float32)[:2], scale, shift]
    given[0] = LAYOUTS[layout](given[0])
    top, _, left, _ = geometry.padding

    def run(backend: str, dtype: torch.dtype) -> list[torch.Tensor]:
        operands = [t.to(dtype).requires_grad_() for t in given]
        y = gc.conv2d(
            *operands[:2],
            partition=partition,
            stride=geometry.stride,
            padding=(top, left),
            prologue=Prologue(*operands[2:], "relu"),
            backend=backend,
        )
        weights = torch.linspace(-1, 1, y.numel(), dtype=dtype).view_as(y)
        gradients = torch.autograd.grad(y, operands, weights)
        return [t.detach().double() for t in (y, *gradients)]

    with forced_isa(isa):
        found = run("native", torch.float32)
    for ours, exact in zip(found, run("reference", torch.float64), strict=True):
        torch.testing.assert_close(ours, exact, rtol=1e-4, atol=1e-4 * float(exact.abs().max()))


@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize("given", [(True, True), (True, False), (False, True), (False, False)])
@each_float64_backend
def test_what_is_left_out(given: tuple[bool, bool], activation: str | None, backend: str) -> None:
    x, weight, bias = tensors(RAGGED, GEOMETRIES["3×3"])
    scale, shift = (
        n if is_given else None
        for n, is_given in zip(numbers(9, torch.float64), given, strict=True)
    )
    wide = torch.ones(9, dtype=torch.float64) if scale is None else scale
    expected = x * wide[:, None, None] + (0 if shift is None else shift[:, None, None])
    expected = expected.relu() if activation else expected
    call: dict[str, Any] = {"partition": RAGGED, "padding": 1}
    y = gc.conv2d(
        x, weight, bias, prologue=Prologue(scale, shift, activation), backend=backend, **call
    )
    torch.testing.assert_close(y, gc.conv2d(expected, weight, bias, backend="reference", **call))


@each_backend
def test_nan_passes_and_infinity_is_clipped(backend: str) -> None:
    if backend == "dense":
        pytest.skip("multiplies the channels of other groups by zero")
    one = Partition.contiguous(3, 3, 3)
    weight = torch.ones(3, 1, 1)
    x = torch.tensor([torch.nan, torch.inf, -torch.inf]).view(1, 3, 1, 1).expand(2, 3, 4, 5)
    x = x.clone().requires_grad_()
    scale = torch.ones(3, requires_grad=True)
    y = gc.conv2d(x, weight, partition=one, prologue=Prologue(scale, None, "relu"), backend=backend)
    assert y[:, 0].isnan().all()
    assert y[:, 1].isposinf().all()
    assert (y[:, 2] == 0).all()
    x_grad, scale_grad = torch.autograd.grad(y.sum(), (x, scale))
    assert torch.equal(x_grad[0, :, 0, 0], torch.tensor([1.0, 1.0, 0.0])), "as torch.relu has it"
    assert scale_grad[0].isnan()


def test_float32_parameters_of_bfloat16() -> None:
    """A normalisation keeps float32; nothing is rounded to bfloat16 but x' and y."""
    x, weight, _ = tensors(RAGGED, GEOMETRIES["3×3"], dtype=torch.bfloat16)
    scale, shift = numbers(9)
    wide = Prologue(scale.requires_grad_(), shift.requires_grad_(), "relu")
    reasons = backends.explain("cpu", torch.bfloat16, prologue=True)
    for backend in (name for name, reason in reasons.items() if reason is None):
        y = gc.conv2d(x, weight, partition=RAGGED, padding=1, prologue=wide, backend=backend)
        assert y.dtype == torch.bfloat16
        grads = torch.autograd.grad(y.sum(), (scale, shift))
        assert all(g.dtype == torch.float32 for g in grads)
        narrow = Prologue(scale.bfloat16(), shift.bfloat16(), "relu")
        z = gc.conv2d(x, weight, partition=RAGGED, padding=1, prologue=narrow, backend=backend)
        torch.testing.assert_close(y, z, rtol=0.1, atol=0.5)


# ---- derivatives --------------------------------------------------------------------------------


def away_from_zero(x: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    """``x`` where no finite difference crosses the kink of a ReLU."""
    prepared = x * scale[:, None, None] + shift[:, None, None]
    return torch.where(prepared.abs() < 1e-3, x + 0.1, x)


@pytest.mark.parametrize("partition", PARTITIONS.values(), ids=PARTITIONS.keys())
@needs_native
def test_first_and_second_derivatives(partition: Partition) -> None:
    for layout, before, geometry in (
        ("channels_last", "relu", Geometry((3, 4))),
        ("NCHW", "relu", Geometry((4, 3), stride=(2, 2))),
        ("NCHW", None, Geometry((5, 3), (2, 1), dilation=(3, 2))),
        ("NCHW", "relu", Geometry((3, 4), (2, 3), (1, 2), (1, 1, 2, 2))),
        ("channels_last", "relu", Geometry((3, 4), (2, 3), (1, 2), (1, 1, 2, 2))),
    ):
        x, weight, bias = tensors(partition, geometry)
        scale, shift = numbers(partition.in_channels, torch.float64)
        scale = torch.where(scale.abs() < 0.1, 0.5, scale)
        top, _, left, _ = geometry.padding

        def convolve(
            x: torch.Tensor,
            weight: torch.Tensor,
            bias: torch.Tensor,
            scale: torch.Tensor,
            shift: torch.Tensor,
            geometry: Geometry = geometry,
            padding: tuple[int, int] = (top, left),
            place: Layout = LAYOUTS[layout],
            before: str | None = before,
        ) -> torch.Tensor:
            return gc.conv2d(
                place(x),
                weight,
                bias,
                partition=partition,
                stride=geometry.stride,
                padding=padding,
                dilation=geometry.dilation,
                prologue=Prologue(scale, shift, before),
                backend="native",
            )

        x = away_from_zero(x, scale, shift)
        inputs = [t.detach().requires_grad_() for t in (x, weight, bias, scale, shift)]
        assert gradcheck(convolve, inputs, fast_mode=True)
        assert gradgradcheck(convolve, inputs, fast_mode=True)


@needs_native
@pytest.mark.parametrize("activation", ["relu", "relu6", "silu"])
def test_derivatives_with_an_epilogue(activation: str) -> None:
    geometry = GEOMETRIES["3×3"]
    x, weight, bias = tensors(OVERLAPPING, geometry)
    scale, shift = numbers(6, torch.float64)
    x = away_from_zero(x, scale, shift)
    residual = torch.randn(2, 4, 5, 6, dtype=torch.float64)

    def results(backend: str) -> list[torch.Tensor]:
        given = [t.detach().requires_grad_() for t in (x, weight, bias, residual, scale, shift)]
        y = gc.conv2d(
            *given[:3],
            partition=OVERLAPPING,
            padding=1,
            activation=activation,
            residual=given[3],
            prologue=Prologue(given[4], given[5], "relu"),
            backend=backend,
        )
        first = torch.autograd.grad((y * y).sum(), given, create_graph=True)
        total = sum(f.square().sum() for f in first)
        return [y, *first, *torch.autograd.grad(total, given)]

    torch.testing.assert_close(results("native"), results("reference"))


class Calls(TorchDispatchMode):
    """The operations that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        self.names.append(func._opname)
        return func(*args, **(kwargs or {}))


@needs_native
def test_nothing_but_the_operations_and_only_those_asked_for() -> None:
    x, weight, _ = tensors(RAGGED, GEOMETRIES["3×3"])
    parameters = numbers(9, torch.float64)

    def names(*wanted: bool) -> list[str]:
        given = [
            t.detach().requires_grad_(want)
            for t, want in zip((x, weight, *parameters), wanted, strict=True)
        ]
        with Calls() as calls:
            prologue = Prologue(*given[2:], "relu")
            y = gc.conv2d(*given[:2], partition=RAGGED, padding=1, prologue=prologue)
            if any(wanted):
                y.backward(torch.ones_like(y))
        assert [t.grad is not None for t in given] == list(wanted)
        return [name for name in calls.names if "conv" in name or name in ("mul", "add", "relu")]

    forward, by_x, by_weight = (f"prologue_conv2d{s}" for s in ("", "_input_grad", "_weight_grad"))
    assert names(False, False, False, False) == [forward]
    assert names(True, True, True, True) == [forward, by_x, by_weight]
    assert names(False, False, True, False) == [forward, by_x]
    assert names(False, True, False, False) == [forward, by_weight]


@needs_native
@pytest.mark.native
@pytest.mark.parametrize("layout", ["NCHW", "channels_last"])
def test_the_same_bits_on_any_number_of_threads(layout: str) -> None:
    for partition, kernel in (
        (Partition.random(96, 96, 4, seed=0), 1),
        (Partition.random(96, 96, 4, seed=0), 3),
        (Partition.contiguous(96, 96, 96), 3),
    ):
        for dtype in DTYPES:
            x = LAYOUTS[layout](torch.randn(9, 96, 15, 29, dtype=dtype)).requires_grad_()
            weight = torch.randn(partition.entries, kernel, kernel, dtype=dtype)
            given = [x, weight.requires_grad_(), *(n.requires_grad_() for n in numbers(96, dtype))]
            upstream = torch.randn(9, 96, 15, 29, dtype=dtype)

            def run(
                count: int,
                partition: Partition = partition,
                kernel: int = kernel,
                given: list[torch.Tensor] = given,
                upstream: torch.Tensor = upstream,
            ) -> list[torch.Tensor]:
                before = torch.get_num_threads()
                torch.set_num_threads(count)
                try:
                    prologue = Prologue(*given[2:], "relu")
                    y = gc.conv2d(
                        *given[:2], partition=partition, padding=kernel // 2, prologue=prologue
                    )
                    return [y.detach(), *torch.autograd.grad(y, given, upstream)]
                finally:
                    torch.set_num_threads(before)

            alone = run(1)
            assert all(map(torch.equal, run(3), alone))


# ---- from a batch normalisation -----------------------------------------------------------------


@pytest.mark.parametrize("affine", [True, False])
def test_of_a_batch_normalisation(affine: bool) -> None:
    norm = normalisation(6) if affine else nn.BatchNorm2d(6, affine=False).eval()
    x = torch.randn(2, 6, 3, 3)
    torch.testing.assert_close(Prologue.from_batch_norm(norm, None).apply(x), norm(x))
    torch.testing.assert_close(Prologue.from_batch_norm(norm).apply(x), norm(x).relu())


def test_trains_the_parameters_of_a_normalisation() -> None:
    norm, layer = normalisation(9), gc.nn.PartitionedConv2d(9, 7, 3, partition=RAGGED)
    x = torch.randn(2, 9, 6, 6)
    parameters = [*norm.parameters(), *layer.parameters()]
    fused = layer(x, prologue=Prologue.from_batch_norm(norm)).square().sum()
    apart = layer(norm(x).relu()).square().sum()
    torch.testing.assert_close(
        torch.autograd.grad(fused, parameters), torch.autograd.grad(apart, parameters)
    )


@pytest.mark.parametrize(
    ("norm", "error", "message"),
    [
        (nn.BatchNorm2d(6), ValueError, r"BatchNorm2d\(6.* statistics of each batch.*eval\(\)"),
        (nn.BatchNorm2d(6, track_running_stats=False).eval(), ValueError, "each batch"),
        (nn.GroupNorm(2, 6), TypeError, r"norm is GroupNorm.*expected a batch normalisation"),
        (None, TypeError, "norm is None"),
    ],
)
def test_no_such_normalisation(norm: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Prologue.from_batch_norm(norm)


# ---- layers -------------------------------------------------------------------------------------


@pytest.mark.parametrize("padding_mode", ["zeros", "reflect", "replicate", "circular"])
def test_layers_pad_what_the_prologue_makes(padding_mode: str) -> None:
    prologue = Prologue(*numbers(9), "relu")
    x = torch.randn(2, 9, 7, 8)
    options: dict[str, Any] = {"padding": 1, "padding_mode": padding_mode, "partition": RAGGED}
    layer = gc.nn.PartitionedConv2d(9, 7, 3, **options)
    torch.testing.assert_close(layer(x, prologue=prologue), layer(prologue.apply(x)))
    layer = gc.nn.PartitionedConv1d(9, 7, 3, **options)
    line = x[:, :, 0]
    torch.testing.assert_close(
        layer(line, prologue=prologue), layer(prologue.apply(x)[:, :, 0]), rtol=1e-5, atol=1e-5
    )


def test_a_condensed_layer_and_what_it_deploys_to() -> None:
    """CondenseNet's index, normalisation, ReLU, group convolution: lists of inputs that overlap."""
    norm, layer = normalisation(12), gc.nn.CondenseConv2d(12, 8, 3, padding=1, groups=4)
    x, prologue = torch.randn(2, 12, 7, 6), Prologue.from_batch_norm(norm)
    for progress in (0, 0.25, 1):
        layer.condense(progress)
        expected = layer(norm(x).relu())
        torch.testing.assert_close(layer(x, prologue=prologue), expected)
        torch.testing.assert_close(layer.deployed()(x, prologue=prologue), expected)


def test_unbatched() -> None:
    prologue = Prologue(*numbers(9), "relu")
    x, weight, _ = tensors(RAGGED, GEOMETRIES["3×3"], dtype=torch.float32)
    batched = gc.conv2d(x[:1], weight, partition=RAGGED, prologue=prologue)
    torch.testing.assert_close(
        gc.conv2d(x[0], weight, partition=RAGGED, prologue=prologue), batched[0]
    )


# ---- compilers, transforms, modes ---------------------------------------------------------------


class PreActivated(nn.Module):
    """Normalisation, ReLU and convolution in one call, as a dense block has them."""

    def __init__(self, backend: str = "auto") -> None:
        super().__init__()
        self.norm = normalisation(9)
        self.conv = gc.nn.PartitionedConv2d(9, 7, 3, padding=1, partition=RAGGED, backend=backend)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x, prologue=Prologue.from_batch_norm(self.norm))


def results(function: Callable[[torch.Tensor], torch.Tensor], network: nn.Module) -> Any:
    x = torch.linspace(-2, 2, 2 * 9 * 30).view(2, 9, 5, 6).requires_grad_()
    y = function(x)
    return [y.detach(), *torch.autograd.grad(y.square().sum(), (x, *network.parameters()))]


@each_backend
def test_compiles_into_one_graph(backend: str) -> None:
    torch._dynamo.reset()
    network = PreActivated(backend)
    compiled = torch.compile(network, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(results(compiled, network), results(network, network))


@needs_native
def test_export_with_any_batch() -> None:
    network = PreActivated()
    shapes = [{0: torch.export.Dim("batch")}]
    program = torch.export.export(network, (torch.randn(2, 9, 5, 6),), dynamic_shapes=shapes)
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    x = torch.randn(5, 9, 5, 6)
    assert torch.equal(torch.export.load(file).module()(x), network(x))


@needs_native
@pytest.mark.parametrize("layout", ["NCHW", "channels_last", "columns sliced"])
def test_opcheck(layout: str) -> None:
    geometry = GEOMETRIES["strided"]
    x, weight, bias = tensors(RAGGED, geometry, dtype=torch.float32)
    table, window, ops = RAGGED.cpu_table, window_of(geometry), torch.ops.groupconv
    x, (scale, shift) = LAYOUTS[layout](x), numbers(9)
    y = ops.prologue_conv2d(x, weight, bias, None, scale, shift, True, table, 7, *window, 0)
    given = (x, weight, bias, y, scale, None, True, table, 7, *window, 1)
    opcheck(ops.prologue_conv2d.default, given)
    given = (y, weight, x, scale, shift, True, table, *window)
    opcheck(ops.prologue_conv2d_input_grad.default, given)
    entries, kernel = RAGGED.entries, geometry.kernel_size
    given = (y, x, None, shift, False, table, entries, *kernel, *window)
    opcheck(ops.prologue_conv2d_weight_grad.default, given)


@needs_native
@pytest.mark.parametrize("in_dims", [(0, None, None), (None, 0, None), (1, None, 0), (1, 1, 0)])
def test_vmap(in_dims: tuple[int | None, ...]) -> None:
    def convolve(x: torch.Tensor, scale: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return gc.conv2d(x, weight, partition=RAGGED, prologue=Prologue(scale, None, "relu"))

    single = (torch.randn(2, 9, 5, 6), torch.randn(9), torch.randn(RAGGED.entries, 3, 3))
    batches = [torch.stack([(i + 1) * t for i in range(3)]) for t in single]
    given = [
        one if dim is None else many.movedim(0, dim)
        for one, many, dim in zip(single, batches, in_dims, strict=True)
    ]
    actual = vmap(convolve, in_dims)(*given)
    for n in range(3):
        each = [
            one if dim is None else many[n]
            for one, many, dim in zip(single, batches, in_dims, strict=True)
        ]
        torch.testing.assert_close(actual[n], convolve(*each))


@each_backend
def test_gradients_of_every_sample(backend: str) -> None:
    network = PreActivated(backend)
    x = torch.randn(3, 9, 5, 4)

    def loss(parameters: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        return functional_call(network, parameters, x[None]).square().sum()

    parameters = dict(network.named_parameters())
    actual = vmap(grad(loss), (None, 0))(parameters, x)
    for n in range(3):
        for name, value in grad(loss)(parameters, x[n]).items():
            torch.testing.assert_close(actual[name][n], value)


@each_backend
def test_autocast(backend: str) -> None:
    """As for a batch normalisation: x in the lower precision, its parameters as they are."""
    network = PreActivated(backend)
    x = torch.randn(2, 9, 5, 6)
    with torch.autocast("cpu", torch.bfloat16):
        y = network(x)
        if backends.explain("cpu", torch.float64)[backend] is None:
            assert PreActivated(backend).double()(x.double()).dtype == torch.float64
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in network.parameters())
    torch.testing.assert_close(y.float(), network(x), rtol=0.02, atol=0.1)


@needs_native
def test_forward_mode_is_left_to_others() -> None:
    x, weight = torch.randn(1, 9, 2, 2), torch.randn(RAGGED.entries, 1, 1)
    prologue = Prologue(*numbers(9), "relu")

    def run(backend: str) -> list[torch.Tensor]:
        def convolve(x: torch.Tensor) -> torch.Tensor:
            return gc.conv2d(x, weight, partition=RAGGED, prologue=prologue, backend=backend)

        return list(jvp(convolve, (x,), (torch.ones_like(x),)))

    torch.testing.assert_close(run("auto"), run("reference"))


# ---- bad input ----------------------------------------------------------------------------------


ONES = torch.ones(9)
WRONG: list[tuple[Any, type[Exception], str]] = [
    (ONES, TypeError, r"prologue is tensor.*; expected a groupconv_ext\.Prologue"),
    ((ONES, ONES, None), TypeError, "expected a groupconv_ext.Prologue"),
    (Prologue(2.0), TypeError, r"prologue\.scale is 2\.0; expected a tensor or None"),  # type: ignore[arg-type]
    (Prologue(ONES, ONES, "relu6"), ValueError, r"prologue\.activation is 'relu6'; expected .*rel"),
    (Prologue(ONES[:8]), ValueError, r"prologue\.scale has shape \[8\]; expected \[9\]"),
    (Prologue(None, ONES[None]), ValueError, r"prologue\.shift has shape \[1, 9\]; expected \[9"),
    (Prologue(ONES.double()), TypeError, r"prologue\.scale is .*float64 and x is .*float32"),
    (Prologue(ONES.bfloat16()), TypeError, r"prologue\.scale is .*bfloat16 and x is .*float32"),
    (Prologue(ONES, ONES.to("meta")), ValueError, r"prologue\.shift is on meta and x is on cpu"),
]


@pytest.mark.parametrize(("prologue", "error", "message"), WRONG)
@each_backend
def test_refused(prologue: Any, error: type[Exception], message: str, backend: str) -> None:
    x, weight, _ = tensors(RAGGED, GEOMETRIES["3×3"], dtype=torch.float32)
    call: dict[str, Any] = {"partition": RAGGED, "padding": 1, "backend": backend}
    gc.conv2d(x, weight, prologue=Prologue(ONES, ONES, "relu"), **call)
    with pytest.raises(error, match=message):
        gc.conv2d(x, weight, prologue=prologue, **call)
    with torch.no_grad(), pytest.raises(error, match=message):
        gc.conv2d(x, weight, prologue=prologue, **call)


def shrunk(tensor: torch.Tensor) -> torch.Tensor:
    tensor = tensor.clone()
    tensor.untyped_storage().resize_(tensor.untyped_storage().nbytes() - 4)
    return tensor


@needs_native
@pytest.mark.native
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scale": ONES[:8]}, r"scale must have sizes \[9\], got \[8\]"),
        ({"shift": ONES[:, None]}, r"shift must have sizes \[9\], got \[9, 1\]"),
        ({"scale": ONES.double()}, "scale has neither input's dtype nor the one"),
        ({"shift": shrunk(ONES)}, "shift of sizes .* shrunk to 32 bytes"),
        ({"scale": ONES.to("meta")}, "on .*'cpu', 'meta'.*; expected one device"),
        ({"input": torch.ones(2, 8, 5, 6)}, r"sizes \[8\], got \[9\]|the operands have 8 and 7"),
        ({"input": torch.ones(3, 9, 5, 6)}, "expected as many images as input, 3|expected .3, 7"),
        ({"input": torch.ones(2, 9, 4, 6)}, r"grad has sizes .*, expected \[2, 7, 4, 6\]"),
        ({"grad": torch.ones(2, 7, 5, 6).double()}, "grad has another dtype than input"),
        ({"table": torch.zeros(5, dtype=torch.int32)}, "partition table"),
    ],
)
@pytest.mark.parametrize("name", ["prologue_conv2d_input_grad", "prologue_conv2d_weight_grad"])
def test_raw_gradients_refuse(name: str, change: dict[str, Any], message: str) -> None:
    window = dict(zip(("stride_h", "stride_w", "dilation_h", "dilation_w"), (1,) * 4, strict=True))
    window |= dict.fromkeys(("pad_top", "pad_bottom", "pad_left", "pad_right"), 1)
    given = {"grad": torch.ones(2, 7, 5, 6), "input": torch.ones(2, 9, 5, 6), "scale": ONES}
    given |= {"shift": ONES, "relu": True, "table": RAGGED.cpu_table, **window}
    if name.endswith("input_grad"):
        given |= {"weight": torch.ones(19, 3, 3)}
    else:
        given |= {"entries": 19, "kernel_h": 3, "kernel_w": 3}
    operation = getattr(torch.ops.groupconv, name)
    operation(**given)
    with pytest.raises(RuntimeError, match=message):
        operation(**(given | change))


@needs_native
@pytest.mark.native
def test_nothing_to_do() -> None:
    """No images, no channels that are read, no pixels."""
    nothing = PARTITIONS["no connection"]
    for batch, side in ((0, 3), (2, 3)):
        x = torch.randn(batch, 2, side, side, requires_grad=True)
        weight = torch.randn(0, 3, 3)
        scale, shift = (n.requires_grad_() for n in numbers(2))
        prologue = Prologue(scale, shift, "relu")
        y = gc.conv2d(x, weight, partition=nothing, padding=1, prologue=prologue, backend="native")
        assert torch.equal(y, torch.zeros(batch, 2, side, side))
        for g in torch.autograd.grad(y.sum(), (x, scale, shift)):
            assert torch.equal(g, torch.zeros_like(g))


def test_operands_are_left_as_they_were() -> None:
    x, weight, _ = tensors(RAGGED, GEOMETRIES["3×3"])
    given = [x, weight, *numbers(9, torch.float64)]
    before = [t.clone() for t in given]
    for t in given:
        t.requires_grad_()
    y = gc.conv2d(x, weight, partition=RAGGED, prologue=Prologue(*given[2:], "relu"))
    y.sum().backward()
    assert all(map(torch.equal, given, before))
    assert reference.prologue(x, *given[2:], "relu").shape == x.shape
