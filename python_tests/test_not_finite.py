"""NaN and infinity reach what has a product with them and nothing else, on every ISA."""

import itertools
from collections.abc import Iterator

import pytest
import torch
from helpers import (
    DTYPES,
    GEOMETRIES,
    ISAS,
    LAYOUTS,
    MIXED,
    Geometry,
    forced_isa,
    needs_native,
    tensors,
    window_of,
)

import groupconv_ext as gc
from groupconv_ext import Partition, reference
from groupconv_ext.autograd import ACTIVATIONS
from groupconv_ext.backends.native import NATIVE

pytestmark = [needs_native, pytest.mark.native]

each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
each_geometry = pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES.keys())


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    with forced_isa(request.param):
        yield request.param


def all_passes(
    operands: dict[str, torch.Tensor], partition: Partition, geometry: Geometry
) -> dict[str, torch.Tensor]:
    x, weight, grad = (operands[name] for name in ("x", "weight", "grad"))
    window, size, kernel = geometry.window, geometry.input_size, geometry.kernel_size
    return {
        "y": reference.conv2d(x, weight, None, partition, *window),
        "∂x": reference.conv2d_input_grad(grad, weight, partition, size, *window),
        "∂weight": reference.conv2d_weight_grad(grad, x, partition, kernel, *window),
    }


SPOILED = {"x": (1, 3, -1, -1), "grad": (0, 4, 0, -1), "weight": (0, 0, 0)}


@pytest.mark.parametrize("spoiled", SPOILED)
@pytest.mark.parametrize(
    "partition",
    [MIXED, Partition.contiguous(21, 21, 21), Partition.random(8, 32, 2, seed=0)],
    ids=["mixed", "depthwise", "full lanes"],
)
@each_geometry
@each_dtype
def test_nan_and_inf_stay_where_they_belong(
    isa: str, dtype: torch.dtype, geometry: Geometry, partition: Partition, spoiled: str
) -> None:
    """In the outputs and gradients that have a product with them; all others are what they were.

    Padding makes no products. Only an infinite weight may meet it, in an output.
    """
    x, weight, _ = (t.abs() + 0.1 for t in tensors(partition, geometry, dtype=dtype))
    grad = torch.ones_like(reference.conv2d(x, weight, None, partition, *geometry.window))
    operands = {"x": x, "weight": weight, "grad": grad}

    # One operand is zero but for one element, the other positive: zero where there is no product.
    seen = {name: torch.ones_like(t, dtype=torch.float64) for name, t in operands.items()}
    seen[spoiled].zero_()[SPOILED[spoiled]] = 1
    reached = all_passes(seen, partition, geometry)
    expected = all_passes({name: t.double() for name, t in operands.items()}, partition, geometry)
    tolerance = {"rtol": 32 * torch.finfo(dtype).eps, "atol": 0.0}
    not_a_factor = {"x": "∂x", "weight": "∂weight", "grad": "y"}
    reached[not_a_factor[spoiled]].zero_()

    for bad, layout in itertools.product((torch.nan, torch.inf), ("NCHW", "channels_last")):
        given = {name: t.clone() for name, t in operands.items()}
        given[spoiled][SPOILED[spoiled]] = bad
        inputs = (LAYOUTS[layout](given["x"]).requires_grad_(), given["weight"].requires_grad_())
        y = NATIVE.convolve(*inputs, None, None, partition, window_of(geometry), "none")
        grads = torch.autograd.grad(y, inputs, LAYOUTS[layout](given["grad"]))
        for name, actual in zip(("y", "∂x", "∂weight"), (y, *grads), strict=True):
            if (spoiled, name) != ("weight", "y"):
                sound = reached[name] == 0
                assert torch.equal(actual.isfinite(), sound), (name, bad, layout)
                torch.testing.assert_close(
                    actual[sound].double(), expected[name][sound], **tolerance
                )


@pytest.mark.parametrize("layout", ["NCHW", "channels_last"])
@pytest.mark.parametrize("window", [1, 3])
@pytest.mark.parametrize(
    ("ins", "outs"),
    [(1, 1), (3, 5), (8, 8), (9, 7), (41, 1), (70, 3), (3, 40), (33, 18)],
)
@each_dtype
def test_groups_do_not_meet(
    isa: str, dtype: torch.dtype, ins: int, outs: int, window: int, layout: str
) -> None:
    """What is next to a group's channels, or shares a vector with them, is another group's."""
    place = LAYOUTS[layout]

    def passes(
        x: torch.Tensor, weight: torch.Tensor, partition: Partition, *grads: torch.Tensor
    ) -> list[torch.Tensor]:
        """y, ∂weight by the first gradient, ∂x by the second."""
        inputs = (place(x.clone()).requires_grad_(), weight.clone().requires_grad_())
        y = gc.conv2d(*inputs, partition=partition, padding=window // 2, backend="native")
        back = (
            torch.autograd.grad(y, inputs[1 - i], place(grads[i]), retain_graph=True)[0]
            for i in range(2)
        )
        return [y.detach(), *back]

    ends = [0, ins, 2 * ins + 2, 3 * ins + 3]
    out_ends = [0, outs, 2 * outs + 1, 3 * outs + 1]
    for spoiled, partition in (
        (1, Partition.contiguous(3 * ins, 3 * outs, 3)),
        (1, Partition.random(3 * ins, 3 * outs, 3, seed=0)),
        # Behind the end of a small group a vector has what is first in it.
        (
            0,
            Partition(
                ends[-1],
                out_ends[-1],
                list(itertools.starmap(range, itertools.pairwise(ends))),
                list(itertools.starmap(range, itertools.pairwise(out_ends))),
            ),
        ),
    ):
        x, weight, _ = tensors(partition, Geometry((9, 10), (window, window)), dtype=dtype)
        grad = torch.randn(2, partition.out_channels, 9, 10, dtype=dtype)
        expected = passes(x, weight, partition, grad, grad)
        grad_of_x = grad.clone()
        grad_of_x[:, partition.outputs[spoiled]] = torch.nan
        x[:, partition.inputs[spoiled]] = torch.nan
        found = passes(x, weight, partition, grad, grad_of_x)
        blocks = torch.arange(partition.entries).split([n * c for n, c in partition.sizes])
        lists = (partition.outputs, blocks, partition.inputs)
        for name, actual, sound, of in zip(
            ("y", "∂weight", "∂x"), found, expected, lists, strict=True
        ):
            axis = 0 if name == "∂weight" else 1
            for group in range(3):
                channels = torch.as_tensor(of[group])
                mine, wanted = (t.index_select(axis, channels) for t in (actual, sound))
                wanted = wanted.fill_(torch.nan) if group == spoiled else wanted
                close = {"rtol": 2 * torch.finfo(dtype).eps, "atol": 1e-3}
                torch.testing.assert_close(mine, wanted, **close, equal_nan=True, msg=name)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@each_dtype
def test_nan_and_inf_pass_through_activations(
    isa: str, dtype: torch.dtype, activation: str
) -> None:
    for geometry, layout in itertools.product(
        (Geometry((7, 9)), GEOMETRIES["3×3"]), ("NCHW", "channels_last")
    ):
        x, weight, bias = (t.abs() + 0.1 for t in tensors(MIXED, geometry, dtype=dtype))
        x[0, 3, 0, 0], x[0, 3, 2, 3], x[1, 3, 1, 1] = torch.nan, torch.inf, -torch.inf
        wide = (t.double() for t in (x, weight, bias))
        expected = reference.conv2d(*wide, MIXED, *geometry.window, activation)
        x, window = LAYOUTS[layout](x), window_of(geometry)
        y = NATIVE.convolve(x, weight, bias, None, MIXED, window, activation)
        assert expected.isnan().any()
        for special in (torch.isnan, torch.isposinf, torch.isneginf):
            assert torch.equal(special(y), special(expected)), (special, layout, geometry)
