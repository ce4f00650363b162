"""The backward pass as one operation: what it gives is what the single gradients give.

Those are held to the reference elsewhere; here the clamp that is undone, the bias, every layout
the gradient may come in, and the pass that makes all three gradients of a pointwise convolution.
"""

import itertools
from typing import NamedTuple

import pytest
import torch
from helpers import (
    DTYPES,
    ISAS,
    LAYOUTS,
    MIXED,
    PARTITIONS,
    Exact,
    Geometry,
    Layout,
    assert_within_rounding,
    exact,
    forced_isa,
    needs_native,
)

from groupconv_ext import Partition, _ops, reference
from groupconv_ext.autograd import ACTIVATIONS

pytestmark = [needs_native, pytest.mark.native]

FORMATS = ("NCHW", "channels_last")
CLAMPS = ("none", "relu", "relu6")
POINTWISE = Geometry((24, 23))  # more pixels than below which the gradients are made one by one
WINDOWED = Geometry((6, 5), (3, 2), stride=(1, 2), padding=(1, 1, 1, 0))

ONE_OF_THREE = [(True, False, False), (False, True, False), (False, False, True)]

each_clamp = pytest.mark.parametrize("clamp", CLAMPS)
each_layout = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
each_format = pytest.mark.parametrize("layout", [LAYOUTS[name] for name in FORMATS], ids=FORMATS)


class Problem(NamedTuple):
    grad: torch.Tensor
    output: torch.Tensor | None
    x: torch.Tensor
    weight: torch.Tensor
    partition: Partition
    geometry: Geometry
    clamp: str

    def run(self, *wanted: bool) -> tuple[torch.Tensor, ...]:
        stride, padding, dilation = self.geometry.window
        code = ACTIVATIONS.index(self.clamp)
        table = self.partition.cpu_table
        made = _ops.conv2d_backward(
            self.grad,
            self.output,
            self.x,
            self.weight,
            table,
            *stride,
            *padding,
            *dilation,
            code,
            *(wanted or (True, True, True)),
        )
        return tuple(made)

    def expected(self) -> tuple[Exact, ...]:
        grad = self.grad
        if self.output is not None:
            clamped = (self.output <= 0) | ((self.output >= 6) if self.clamp == "relu6" else False)
            grad = torch.where(clamped, 0.0, grad)
        partition, window = self.partition, self.geometry.window
        size, kernel = (self.x.shape[2], self.x.shape[3]), self.geometry.kernel_size

        def input_grad(g: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
            return reference.conv2d_input_grad(g, w, partition, size, *window)

        def weight_grad(g: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
            return reference.conv2d_weight_grad(g, x, partition, kernel, *window)

        return (
            exact(input_grad, grad, self.weight),
            exact(weight_grad, grad, self.x),
            exact(lambda g: g.sum((0, 2, 3)), grad),
        )


def problem(
    partition: Partition,
    geometry: Geometry,
    clamp: str,
    layout: Layout = torch.Tensor.contiguous,
    dtype: torch.dtype = torch.float32,
    batch: int = 3,
) -> Problem:
    torch.manual_seed(batch)
    x = torch.randn(batch, partition.in_channels, *geometry.input_size)
    weight = torch.randn(partition.entries, *geometry.kernel_size)
    y = reference.conv2d(x, weight, None, partition, *geometry.window)
    # Whole numbers lie on the bounds, and a NaN on neither side of them.
    output = (y * 4).round().clamp(0, 6 if clamp == "relu6" else None)
    if output.numel() > 0:
        output.view(-1)[::97] = float("nan")
    grad = torch.randn(y.shape)
    x, output, grad = (layout(t.to(dtype)) for t in (x, output, grad))
    return Problem(
        grad,
        None if clamp == "none" else output,
        x,
        weight.to(dtype),
        partition,
        geometry,
        clamp,
    )


def assert_as_expected(given: Problem) -> None:
    for made, expected in zip(given.run(), given.expected(), strict=True):
        assert made.dtype == given.x.dtype
        assert_within_rounding(made, expected)


@each_format
@each_clamp
@pytest.mark.parametrize("geometry", [POINTWISE, WINDOWED], ids=("1×1", "windowed"))
@pytest.mark.parametrize("partition", PARTITIONS.values(), ids=PARTITIONS.keys())
def test_every_partition(
    partition: Partition, geometry: Geometry, clamp: str, layout: Layout
) -> None:
    assert_as_expected(problem(partition, geometry, clamp, layout))


@each_format
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("isa", ISAS)
def test_every_instruction_set_and_type(isa: str, dtype: torch.dtype, layout: Layout) -> None:
    narrow, wide = Partition.random(40, 56, 4, seed=1), Partition.random(70, 100, 2, seed=1)
    for partition, clamp in itertools.product((narrow, wide), CLAMPS):
        with forced_isa(isa):
            assert_as_expected(problem(partition, POINTWISE, clamp, layout, dtype))


@pytest.mark.parametrize("groups", [1, 3, 16])
def test_tiles_and_slices(groups: int) -> None:
    """Images of several tiles, batches of several slices, ragged groups."""
    partition = Partition.from_labels(
        torch.arange(200) * groups // 200, torch.arange(100) * groups // 100, groups
    )
    assert_as_expected(problem(partition, Geometry((45, 51)), "relu", batch=5))


def large(partition: Partition, dtype: torch.dtype, layout: str) -> Problem:
    """Of clamped pixels in channels_last so many that they are taken in parts."""
    numbers = (7 << 20) // (dtype.itemsize * partition.out_channels)
    size = (numbers // 2 // 120, 120)
    return problem(partition, Geometry(size), "relu6", LAYOUTS[layout], dtype, batch=2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(
    "partition",
    [Partition.random(70, 100, 2, seed=1), Partition.random(24, 24, 24, seed=1), MIXED],
    ids=("wide", "channelwise", "mixed"),
)
def test_pixels_in_parts(isa: str, dtype: torch.dtype, partition: Partition) -> None:
    with forced_isa(isa):
        assert_as_expected(large(partition, dtype, "channels_last"))


def test_a_last_part_of_one_pixel() -> None:
    partition = Partition.random(64, 96, 4, seed=1)  # 1365 pixels at once, and 181² = 24 · 1365 + 1
    assert_as_expected(
        problem(partition, Geometry((181, 181)), "relu", LAYOUTS["channels_last"], batch=1)
    )


@each_format
def test_a_window_that_meets_no_image(layout: Layout) -> None:
    """Only the padding, which one pixel of every three reads."""
    geometry = Geometry((1, 8), (1, 1), stride=(3, 1), padding=(1, 1, 0, 0))
    given = problem(Partition.contiguous(64, 64, 1), geometry, "none", layout, batch=1)
    for made in given.run()[:2]:
        assert not made.any()


def test_some_channels_of_pixels_in_parts() -> None:
    given = large(Partition.random(40, 56, 4, seed=1), torch.float32, "channels_last")

    def some(t: torch.Tensor) -> torch.Tensor:
        n, channels, height, width = t.shape
        wide = LAYOUTS["channels_last"](torch.randn(n, channels + 5, height, width))
        return wide[:, 3:-2].copy_(t)

    assert given.output is not None
    assert_as_expected(
        given._replace(grad=some(given.grad), output=some(given.output), x=some(given.x))
    )


@each_layout
@each_clamp
def test_a_gradient_that_lies_otherwise_than_the_output(clamp: str, layout: Layout) -> None:
    for geometry in (POINTWISE, WINDOWED):
        given = problem(PARTITIONS["permuted"], geometry, clamp)
        assert_as_expected(given._replace(grad=layout(given.grad)))


@each_clamp
@pytest.mark.parametrize("height", [3, 600])
def test_columns_whose_pixels_are_no_neighbours(height: int, clamp: str) -> None:
    """A width of one has any stride: rows of one pixel look flat and are none."""
    given = problem(PARTITIONS["permuted"], Geometry((height, 1)), clamp)

    def apart(t: torch.Tensor) -> torch.Tensor:
        n, c, h, _ = t.shape
        wide = torch.randn(n, c, 3 * h).as_strided((n, c, h, 1), (3 * c * h, 3 * h, 3, 3))
        return wide.copy_(t)

    assert_as_expected(given._replace(grad=apart(given.grad)))
    assert_as_expected(given._replace(grad=apart(given.grad), x=apart(given.x)))


@pytest.mark.parametrize("batch", [0, 1])
@pytest.mark.parametrize("size", [(1, 1), (30, 20)], ids=str)
def test_few_images(size: tuple[int, int], batch: int) -> None:
    for clamp in CLAMPS:
        assert_as_expected(problem(PARTITIONS["ragged"], Geometry(size), clamp, batch=batch))


@each_format
@pytest.mark.parametrize("channels", [64, 160])
def test_bits_do_not_depend_on_threads(channels: int, layout: Layout) -> None:
    partition = Partition.random(channels, channels, 4, seed=2)
    before = torch.get_num_threads()
    wide, windowed = Geometry((120, 90)), Geometry((20, 20), (3, 3), padding=(1, 1, 1, 1))
    for geometry in (Geometry((40, 40)), wide, windowed):
        given = problem(partition, geometry, "relu", layout)
        try:
            torch.set_num_threads(1)
            alone = given.run()
            torch.set_num_threads(3)
            together = given.run()
        finally:
            torch.set_num_threads(before)
        assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))


@pytest.mark.parametrize(
    "wanted", [(True, False, False), (False, True, False), (False, False, True)]
)
def test_what_is_not_wanted_is_empty(wanted: tuple[bool, bool, bool]) -> None:
    given = problem(PARTITIONS["permuted"], POINTWISE, "relu")
    for made, whole, want in zip(given.run(*wanted), given.run(), wanted, strict=True):
        if want:
            torch.testing.assert_close(made, whole)
        else:
            assert made.shape == (0,)


def test_a_large_sum_keeps_its_digits() -> None:
    """In one float32 number 2²⁴ ones would be all that can be counted."""
    partition = Partition.contiguous(1, 1, 1)
    given = problem(partition, Geometry((64, 64)), "none", batch=1)
    count = 5 * 64 * 64
    large = torch.full((5, 1, 64, 64), 1.0)
    large[0, 0, 0, 0] = 2.0**26
    bias = given._replace(grad=large, x=torch.zeros(5, 1, 64, 64)).run(False, False, True)[2]
    assert abs(float(bias) - (2**26 + count - 1)) <= 64 * 64


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"clamp": "silu"}, "activation is 3; only of 0"),
        ({"output": None}, "output is needed with an activation"),
        ({"clamp": "none"}, "output is needed with an activation, and only then"),
        ({"output": torch.zeros(3, 8, 24, 22)}, r"output has sizes \[3, 8, 24, 22\]"),
        ({"output": torch.zeros(3, 8, 24, 23).double()}, "output has another dtype"),
        ({"grad": torch.zeros(3, 8, 22, 23)}, r"grad has sizes \[3, 8, 22, 23\]"),
        ({"weight": torch.zeros(5, 1, 1)}, r"sizes \[48, kh, kw\], got \[5, 1, 1\]"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused(change: dict[str, object], message: str) -> None:
    given = problem(PARTITIONS["permuted"], POINTWISE, "relu")
    with pytest.raises(RuntimeError, match=message):
        given._replace(**change).run()
