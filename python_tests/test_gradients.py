"""The derivatives of gc.conv2d: exact, repeatable bit for bit, and no more than are asked for.

What they are in every dtype, on every instruction set, is checked beside the forward pass, in
test_conv2d.py; here is what autograd makes of them.
"""

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from helpers import (
    DTYPES,
    LAYOUTS,
    PARTITIONS,
    Geometry,
    assert_within_rounding,
    exact,
    needs_native,
    tensors,
)
from torch.autograd import gradcheck, gradgradcheck
from torch.utils._python_dispatch import TorchDispatchMode

import groupconv_ext as gc
from groupconv_ext import Partition
from groupconv_ext.autograd import ACTIVATIONS, apply

pytestmark = needs_native

each_partition = pytest.mark.parametrize("partition", PARTITIONS.values(), ids=PARTITIONS.keys())
each_activation = pytest.mark.parametrize("activation", ACTIVATIONS)

GEOMETRIES = (
    Geometry((3, 4)),
    Geometry((4, 3), stride=(2, 2)),
    Geometry((3, 4), (2, 3), stride=(1, 2), padding=(1, 1, 2, 2)),
    Geometry((5, 3), (2, 1), dilation=(3, 2)),
)
OVERLAPPING = PARTITIONS["overlapping, unread"]


def function(
    partition: Partition, geometry: Geometry, activation: str | None = None
) -> Callable[..., torch.Tensor]:
    top, _, left, _ = geometry.padding

    def convolve(
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None = None,
        residual: torch.Tensor | None = None,
    ) -> torch.Tensor:
        return gc.conv2d(
            x,
            weight,
            bias,
            partition=partition,
            stride=geometry.stride,
            padding=(top, left),
            dilation=geometry.dilation,
            activation=activation,
            residual=residual,
            backend="native",
        )

    return convolve


def operands(
    partition: Partition, geometry: Geometry, dtype: torch.dtype = torch.float64
) -> list[torch.Tensor]:
    """Input, weight, bias and residual, all of which want gradients."""
    x, weight, bias = tensors(partition, geometry, dtype=dtype)
    residual = torch.randn_like(function(partition, geometry)(x, weight))
    return [t.requires_grad_() for t in (x, weight, bias, residual)]


# ---- right --------------------------------------------------------------------------------------


@each_partition
def test_first_and_second_derivatives(partition: Partition) -> None:
    for geometry in GEOMETRIES:
        inputs = operands(partition, geometry)
        assert gradcheck(function(partition, geometry), inputs, fast_mode=True)
        assert gradgradcheck(function(partition, geometry), inputs, fast_mode=True)


@each_activation
def test_derivatives_through_activations(activation: str) -> None:
    geometry = GEOMETRIES[2]
    inputs = operands(OVERLAPPING, geometry)
    convolve = function(OVERLAPPING, geometry, activation)
    kinks = torch.tensor([-3.0, 0.0, 3.0, 6.0])
    bare = function(OVERLAPPING, geometry)(*inputs)
    assert (bare[..., None] - kinks).abs().min() > 1e-4, "a kink would spoil the finite differences"
    assert gradcheck(convolve, inputs)
    assert gradgradcheck(convolve, inputs)


@pytest.mark.parametrize("layout", ["channels_last", "columns sliced", "one pixel expanded"])
def test_derivatives_in_other_layouts(layout: str) -> None:
    geometry = GEOMETRIES[2]
    _, weight, bias, _ = operands(OVERLAPPING, geometry)
    x = torch.randn(2, 6, 3, 4, dtype=torch.float64, requires_grad=True)
    convolve = function(OVERLAPPING, geometry)

    def of_a_view(x: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
        return convolve(LAYOUTS[layout](x), *rest)

    assert gradcheck(of_a_view, (x, weight, bias))
    assert gradgradcheck(of_a_view, (x, weight, bias))


def test_third_derivatives() -> None:
    x, weight, *_ = operands(OVERLAPPING, GEOMETRIES[1])
    convolve = function(OVERLAPPING, GEOMETRIES[1])

    def squared_gradient(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        y = convolve(x, weight).pow(3).sum()
        x_grad, weight_grad = torch.autograd.grad(y, (x, weight), create_graph=True)
        return x_grad.square().sum() + weight_grad.square().sum()

    assert gradgradcheck(squared_gradient, (x, weight), fast_mode=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradient_of_the_bias(dtype: torch.dtype) -> None:
    geometry = Geometry((9, 31), (3, 3))
    x, weight, bias, residual = operands(OVERLAPPING, geometry, dtype)
    y = function(OVERLAPPING, geometry)(x, weight, bias, residual)
    grad = torch.randn_like(y)
    of_bias, of_residual = torch.autograd.grad(y, (bias, residual), grad)
    assert_within_rounding(of_bias, exact(lambda g: g.sum((0, 2, 3)), grad))
    assert torch.equal(of_residual, grad)


# ---- repeatable ---------------------------------------------------------------------------------


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


# Large enough to be shared between threads; the first with channels that several groups add to.
SHARED = [
    (
        Partition(
            64,
            60,
            [range(40), range(30, 64), range(0, 64, 3)],
            [[*range(g, 60, 3)] for g in range(3)],
        ),
        Geometry((29, 30), (3, 3), stride=(2, 1), padding=(1, 1, 1, 1)),
    ),
    (Partition.random(200, 200, 2, seed=0), Geometry((22, 6), stride=(2, 2))),
    (Partition.random(64, 64, 1, seed=0), Geometry((7, 7))),
    (Partition.random(96, 96, 4, seed=0), Geometry((28, 31), (3, 3), padding=(1, 1, 1, 1))),
]


@pytest.mark.parametrize("layout", ["NCHW", "channels_last", "rows and columns swapped"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("partition", "geometry"), SHARED, ids=["overlapping", "strided", "few pixels", "3×3"]
)
def test_the_same_bits_every_time_on_any_number_of_threads(
    partition: Partition, geometry: Geometry, dtype: torch.dtype, layout: str
) -> None:
    x, weight, bias, residual = operands(partition, geometry, dtype)
    grad = LAYOUTS[layout](torch.randn_like(residual))

    def run(count: int) -> list[torch.Tensor]:
        with threads(count):
            y = function(partition, geometry, "relu")(LAYOUTS[layout](x), weight, bias)
            return [y.detach(), *torch.autograd.grad(y, (x, weight, bias), grad)]

    expected = run(1)
    for count in (1, 2, 2, 3):
        for name, found, wanted in zip(("y", "∂x", "∂w", "∂b"), run(count), expected, strict=True):
            assert torch.equal(found, wanted), f"{name} on {count} threads"


# ---- and no more than are asked for -------------------------------------------------------------


class Calls(TorchDispatchMode):
    """The library's operations that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.results: list[Any] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.namespace == "groupconv":
            self.names.append(func._opname)
            self.results.append(result)
        return result


@pytest.mark.parametrize("wanted", [*itertools.product([False, True], repeat=4)], ids=str)
def test_only_gradients_that_are_asked_for_are_computed(wanted: tuple[bool, ...]) -> None:
    inputs = [
        t.detach().requires_grad_(want)
        for t, want in zip(operands(OVERLAPPING, GEOMETRIES[0]), wanted, strict=True)
    ]
    with Calls() as calls:
        y = function(OVERLAPPING, GEOMETRIES[0])(*inputs)
        assert y.requires_grad == any(wanted)
        if any(wanted):
            y.sum().backward()
    assert calls.names == ["conv2d", *["conv2d_backward"] * any(wanted[:3])]
    if any(wanted[:3]):
        assert [made.numel() > 0 for made in calls.results[1]] == list(wanted[:3])
    assert [t.grad is not None for t in inputs] == list(wanted)


@pytest.mark.parametrize("wanted", [(True, False), (False, True), (True, True)], ids=str)
def test_only_gradients_that_are_asked_for_are_computed_in_a_graph(
    wanted: tuple[bool, bool],
) -> None:
    x, weight, *_ = operands(OVERLAPPING, GEOMETRIES[0])
    inputs = [t.detach().requires_grad_(w) for t, w in zip((x, weight), wanted, strict=True)]
    with Calls() as calls:
        y = function(OVERLAPPING, GEOMETRIES[0])(*inputs)
        torch.autograd.grad(y.sum(), [t for t in inputs if t.requires_grad], create_graph=True)
    expected = ["conv2d_input_grad"] * wanted[0] + ["conv2d_weight_grad"] * wanted[1]
    assert calls.names == ["conv2d", *expected]


def test_no_graph_where_gradients_are_off() -> None:
    inputs = operands(OVERLAPPING, GEOMETRIES[0])
    convolve = function(OVERLAPPING, GEOMETRIES[0], "silu")
    with torch.no_grad():
        assert not convolve(*inputs).requires_grad
    with torch.inference_mode(), Calls() as calls:
        y = convolve(*inputs)
    assert y.is_inference()
    assert calls.names == ["conv2d"], "the activation is part of it"


def test_applying_is_what_torch_does() -> None:
    class Scaled(torch.autograd.Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(a: torch.Tensor, scale: float) -> torch.Tensor:
            return a * scale

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
            ctx.scale = inputs[1]

        @staticmethod
        def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
            return apply(Scaled, grad, ctx.scale), None

    def scaled(a: torch.Tensor) -> torch.Tensor:
        product: torch.Tensor = apply(Scaled, a, 3.0)
        return product

    a = torch.ones(2, requires_grad=True)
    y = scaled(a)
    assert type(y.grad_fn).__name__ == "ScaledBackward"
    (by_a,) = torch.autograd.grad(y.sum(), a)
    assert by_a.tolist() == [3.0, 3.0]
    assert torch.func.grad(lambda a: scaled(a).sum())(a).tolist() == [3.0, 3.0]
    assert torch.func.vmap(scaled)(torch.ones(2, 2)).tolist() == [[3.0, 3.0]] * 2
    # The function that vjp returns runs when its transform is over.
    _, pull = torch.func.vjp(scaled, a)
    assert pull(torch.ones(2))[0].tolist() == [3.0, 3.0]

    leaked = []

    def leaks(a: torch.Tensor) -> torch.Tensor:
        leaked.append(a)
        return scaled(a).sum()

    torch.func.grad(leaks)(a)
    assert scaled(leaked[0]).tolist() == [3.0, 3.0]
