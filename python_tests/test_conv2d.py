"""The native convolution against the oracle: every ISA, dtype, layout, window and partition."""

import itertools
import math
import mmap
from collections.abc import Iterator

import pytest
import torch
from helpers import (
    DTYPES,
    GEOMETRIES,
    ISAS,
    LAYOUTS,
    MIXED,
    PARTITIONS,
    Geometry,
    Layout,
    assert_within_rounding,
    check_convolution,
    exact,
    forced_isa,
    geometries,
    needs_native,
    partitions,
    tensors,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

import groupconv_ext as gc
from groupconv_ext import Partition, reference
from groupconv_ext.autograd import ACTIVATIONS

pytestmark = [needs_native, pytest.mark.native]

each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
each_layout = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
each_partition = pytest.mark.parametrize("partition", PARTITIONS.values(), ids=PARTITIONS.keys())
each_geometry = pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES.keys())


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    with forced_isa(request.param):
        yield request.param


# ---- the grid -----------------------------------------------------------------------------------


@each_partition
@each_dtype
def test_every_partition(isa: str, dtype: torch.dtype, partition: Partition) -> None:
    for geometry in GEOMETRIES.values():
        check_convolution(partition, geometry, *tensors(partition, geometry, dtype=dtype))


@each_layout
@each_dtype
def test_every_layout(isa: str, dtype: torch.dtype, layout: Layout) -> None:
    for geometry in GEOMETRIES.values():
        x, weight, bias = tensors(MIXED, geometry, dtype=dtype)
        check_convolution(MIXED, geometry, layout(x), weight, bias, grad_layout=layout)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@each_dtype
def test_every_epilogue(isa: str, dtype: torch.dtype, activation: str) -> None:
    geometries = (Geometry((7, 5)), GEOMETRIES["strided"], GEOMETRIES["3×3"])
    layouts = ("NCHW", "channels_last", "columns sliced")
    for geometry, layout in itertools.product(geometries, layouts):
        x, weight, bias = tensors(MIXED, geometry, dtype=dtype)
        y = reference.conv2d(x, weight, bias, MIXED, *geometry.window)
        residuals = (None, 3 * torch.randn_like(y), LAYOUTS["rows sliced"](torch.randn_like(y)))
        for added, residual in itertools.product((None, bias), residuals):
            check_convolution(
                MIXED, geometry, LAYOUTS[layout](x), weight, added, residual, activation
            )


AROUND = (1, 1, 1, 1)

# Where vectors, register tiles and cache tiles end, and beyond the ends of the special cases.
EDGES: dict[str, tuple[Partition, Geometry, int]] = {
    "one pixel beyond the vectors": (Partition.random(40, 33, 1, seed=0), Geometry((7, 7)), 2),
    "two groups, one long row": (Partition.random(66, 70, 2, seed=0), Geometry((1, 35)), 1),
    "tiles of one long row": (Partition.random(128, 8, 1, seed=0), Geometry((70, 71)), 1),
    "tiles of rows": (
        Partition.random(64, 64, 4, seed=0),
        Geometry((56, 56), (3, 3), padding=AROUND),
        1,
    ),
    "tiles of parts of a row": (
        Partition.random(33, 9, 1, seed=0),
        Geometry((3, 3001), (3, 3), padding=AROUND),
        1,
    ),
    "many images": (
        Partition.random(16, 24, 8, seed=0),
        Geometry((6, 5), (3, 3), padding=AROUND),
        11,
    ),
    "rows of seven, four at a time": (
        Partition.random(24, 48, 3, seed=0),
        Geometry((7, 7), (3, 3), padding=AROUND),
        2,
    ),
    "rows of eight, lanes left over": (
        Partition.random(41, 69, 2, seed=0, uneven=True),
        Geometry((10, 8), (3, 3), padding=AROUND),
        2,
    ),
    "lanes, rows for what is left, and their last pixels one by one": (
        Partition.random(70, 40, 2, seed=0),
        Geometry((7, 8), (3, 3), padding=AROUND),
        2,
    ),
    "lanes and rows, among them groups of rows alone and without inputs": (
        Partition(
            60,
            80,
            [range(30), range(30, 55), [], range(55, 60), [3, 8, 57]],
            [range(19), range(19, 43), range(43, 62), range(62, 67), range(67, 80)],
        ),
        Geometry((28, 14), (3, 3), padding=AROUND),
        2,
    ),
    "lanes and rows, taps one by one": (
        Partition.random(36, 68, 2, seed=0),
        Geometry((7, 7), (5, 5), padding=(2, 2, 2, 2)),
        1,
    ),
    "rows of fourteen, a window of their own": (
        Partition.random(20, 30, 2, seed=0),
        Geometry((5, 15), (5, 4), padding=(2, 2, 1, 1)),
        3,
    ),
    "rows without gaps: padding as wide as the halo": (
        Partition.random(19, 17, 2, seed=0, uneven=True),
        Geometry((9, 10), (3, 3), padding=(2, 2, 2, 2)),
        2,
    ),
    "rows that share some of their padding": (
        Partition.random(19, 17, 2, seed=0, uneven=True),
        Geometry((9, 20), (3, 6), padding=(1, 1, 1, 3)),
        2,
    ),
    "one tap, padded": (
        Partition.random(19, 17, 2, seed=0, uneven=True),
        Geometry((9, 10), padding=(1, 2, 2, 1)),
        2,
    ),
    "every other pixel, padded": (
        Partition.random(19, 17, 2, seed=0, uneven=True),
        Geometry((9, 10), (5, 7), (2, 2), (2, 2, 4, 4)),
        2,
    ),
    "rows of seven, some of them padding only": (
        Partition.random(24, 48, 3, seed=0),
        Geometry((3, 5), (3, 3), padding=(4, 3, 2, 2)),
        2,
    ),
    "rows of seven of a high window": (
        Partition.random(24, 48, 3, seed=0),
        Geometry((9, 7), (7, 3), padding=(3, 3, 1, 1)),
        2,
    ),
    "pixels of channels, every other one": (
        Partition.random(22, 48, 2, seed=0),
        Geometry((17, 40), (3, 3), (2, 2), (1, 0, 1, 2)),
        2,
    ),
    "pixels of channels, far between": (
        Partition.random(13, 32, 1, seed=0),
        Geometry((33, 31), (3, 2), padding=(2, 2, 1, 1), dilation=(2, 3)),
        1,
    ),
    "a group of lanes without inputs": (
        Partition(9, 48, [range(9), [], [8, 1, 5]], [range(16), range(16, 32), range(32, 48)]),
        Geometry((7, 7), (3, 3), padding=AROUND),
        1,
    ),
    "taps in planes of their own": (
        Partition.random(40, 24, 2, seed=0),
        Geometry((37, 41), (3, 3), padding=(17, 15, 18, 18), dilation=(16, 18)),
        2,
    ),
    "such planes, strided, down only": (
        Partition.random(200, 16, 1, seed=0),
        Geometry((29, 13), (3, 2), (2, 3), (9, 9, 0, 4), (9, 3)),
        1,
    ),
    "as many planes as taps": (
        Partition.random(5, 4, 1, seed=0),
        Geometry((40, 35), (17, 16), (17, 16)),
        1,
    ),
    "a window whose middle tap alone meets the image": (
        Partition.random(64, 32, 4, seed=0),
        Geometry((14, 14), (3, 3), padding=(18, 18, 18, 18), dilation=(18, 18)),
        2,
    ),
    "copied tiles": (Partition.random(139, 150, 1, seed=0), Geometry((14, 14)), 2),
    "copied tiles, two groups": (Partition.random(270, 262, 2, seed=0), Geometry((7, 7)), 2),
    "copied tiles, masked": (Partition.random(133, 129, 1, seed=0), Geometry((7, 10)), 1),
    "depthwise, far taps": (
        Partition.contiguous(3, 3, 3),
        Geometry((60, 310), (3, 3), padding=(40, 40, 9, 9), dilation=(40, 9)),
        1,
    ),
    "depthwise": (
        Partition.contiguous(67, 67, 67),
        Geometry((28, 29), (3, 3), padding=AROUND),
        2,
    ),
    "depthwise, strided": (
        Partition.contiguous(40, 40, 40),
        Geometry((30, 17), (5, 5), (2, 2), (2, 2, 2, 2)),
        1,
    ),
    "depthwise, permuted": (
        Partition.random(256, 256, 256, seed=0),
        Geometry((5, 5), (3, 3), padding=AROUND),
        1,
    ),
}


@pytest.mark.parametrize(("partition", "geometry", "batch"), EDGES.values(), ids=EDGES.keys())
@pytest.mark.parametrize("layout", ["NCHW", "channels_last"])
@each_dtype
def test_ends_of_tiles(
    isa: str,
    dtype: torch.dtype,
    layout: str,
    partition: Partition,
    geometry: Geometry,
    batch: int,
) -> None:
    x, weight, bias = tensors(partition, geometry, batch, dtype)
    check_convolution(partition, geometry, LAYOUTS[layout](x), weight, bias, None, "relu")


# Lanes over the inputs: in channels_last in both passes' ways, in either layout in the weight
# gradient.
FEW_OF_MANY: dict[str, tuple[Partition, Geometry]] = {
    "few outputs": (Partition.random(150, 9, 1, seed=0), Geometry((9, 11))),
    "few outputs of very many": (Partition.contiguous(310, 9, 1), Geometry((9, 11))),
    "few outputs, 3×3": (
        Partition(137, 10, [range(69, 0, -1), range(70, 136)], [[3, 1, 0, 9, 4], [2, 5, 6, 7, 8]]),
        Geometry((9, 10), (3, 3), padding=AROUND),
    ),
    "few outputs, neighbours, strided": (
        Partition.contiguous(210, 6, 3),
        Geometry((21, 19), (3, 3), (2, 2), AROUND),
    ),
    "few outputs, uneven, 5×5": (
        Partition.random(170, 38, 3, seed=1, uneven=True),
        Geometry((7, 7), (5, 5), padding=(2, 2, 2, 2)),
    ),
    "few inputs": (Partition.random(6, 150, 2, seed=0), Geometry((9, 11))),
    "few inputs, 3×3": (
        Partition.contiguous(7, 133, 1),
        Geometry((9, 10), (3, 3), padding=AROUND),
    ),
}


@pytest.mark.parametrize(("partition", "geometry"), FEW_OF_MANY.values(), ids=FEW_OF_MANY.keys())
@pytest.mark.parametrize("activation", ["none", "relu", "silu"])
@pytest.mark.parametrize("layout", ["NCHW", "channels_last"])
@each_dtype
def test_few_channels_of_many(
    isa: str,
    dtype: torch.dtype,
    layout: str,
    activation: str,
    partition: Partition,
    geometry: Geometry,
) -> None:
    x, weight, bias = tensors(partition, geometry, 2, dtype)
    place = LAYOUTS[layout]
    residual = torch.randn_like(reference.conv2d(x, weight, bias, partition, *geometry.window))
    for added, after in ((bias, None), (None, place(residual)), (bias, place(residual))):
        check_convolution(partition, geometry, place(x), weight, added, after, activation, place)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@each_dtype
def test_every_epilogue_of_whole_maps(isa: str, dtype: torch.dtype, activation: str) -> None:
    # Lanes over channels, and over pixels with the gaps between rows taken out: rows that are parts
    # of vectors, and one pixel beyond them.
    partitions = (Partition.random(20, 32, 2, seed=0), Partition.random(18, 10, 2, seed=0))
    for partition, size in itertools.product(partitions, ((6, 14), (5, 12), (7, 3), (3, 31))):
        geometry = Geometry(size, (3, 3), padding=AROUND)
        x, weight, bias = tensors(partition, geometry, dtype=dtype)
        residual = 3 * torch.randn(2, partition.out_channels, *size, dtype=dtype)
        for added in (None, residual, LAYOUTS["rows sliced"](residual)):
            check_convolution(partition, geometry, x, weight, bias, added, activation)


@each_dtype
def test_every_width_of_a_map(isa: str, dtype: torch.dtype) -> None:
    # Tiles of every width of lanes over channels, destinations behind them by rows, and gaps
    # behind every lane of a vector. What is stored too much, to be written over, stays nowhere.
    partition = Partition.random(20, 26, 2, seed=0)
    for width in range(2, 34):
        for geometry in (
            Geometry((5, width), (3, 3), padding=AROUND),
            Geometry((5, width), (5, 2), padding=(2, 2, 1, 0)),
        ):
            x, weight, bias = tensors(partition, geometry, dtype=dtype)
            residual = torch.randn(2, partition.out_channels, 5, width, dtype=dtype)
            check_convolution(partition, geometry, x, weight, bias, residual, "relu")


@pytest.mark.parametrize("layout", ["NCHW", "channels_last"])
@each_dtype
def test_every_number_of_pixels_and_rows(isa: str, dtype: torch.dtype, layout: str) -> None:
    for count in range(1, 68):
        partition = Partition.contiguous(2, count % 18 + 1, 1)
        geometry = Geometry((1, count))
        x, weight, bias = tensors(partition, geometry, 1, dtype)
        check_convolution(partition, geometry, LAYOUTS[layout](x), weight, bias)


@each_dtype
def test_every_run_of_pixels_for_a_vector_of_outputs(isa: str, dtype: torch.dtype) -> None:
    # Inputs that lie side by side, and that begin and end as if they did.
    place = LAYOUTS["channels_last"]
    for count in range(1, 18):
        ins, outs = 5 * count, 4 + count % 13
        middle = [*range(2, ins - 2)][::-1]
        for order in (range(ins), [0, 1, *middle, ins - 2, ins - 1]):
            partition = Partition(ins, outs, [order], [range(outs)])
            geometry = Geometry((1, count))
            x, weight, bias = tensors(partition, geometry, 64 // count + 1, dtype)
            residual = torch.randn_like(reference.conv2d(x, weight, bias, partition))
            check_convolution(
                partition, geometry, place(x), weight, bias, place(residual), "relu", place
            )


@each_dtype
def test_every_number_of_channels_to_transpose(isa: str, dtype: torch.dtype) -> None:
    # Too few pixels for lanes over channels: all channels of a pixel become rows, and sums pixels.
    place = LAYOUTS["channels_last"]
    for count in range(1, 42):
        partition = Partition.random(count, 43 - count, 1, seed=count)
        geometry = Geometry((1, 7 * count % 20 + 1))
        x, weight, bias = tensors(partition, geometry, 1, dtype)
        residual = torch.randn_like(reference.conv2d(x, weight, bias, partition))
        check_convolution(
            partition, geometry, place(x), weight, bias, place(residual), "relu", place
        )


# Destinations that fill vectors and leave some of the last; windows visited in order, backwards, in
# part (strides) and of more positions than a table holds.
@pytest.mark.parametrize(
    "geometry",
    [
        Geometry((8, 9)),
        Geometry((7, 14), (3, 3), padding=AROUND),
        Geometry((8, 14), (3, 3), (2, 2), AROUND),
        Geometry((10, 8), (5, 2), padding=(2, 0, 2, 1)),
        Geometry((9, 8), (9, 9), padding=(4, 4, 4, 4)),
    ],
    ids=str,
)
@pytest.mark.parametrize("layout", ["NCHW", "channels_last"])
@each_dtype
def test_weights_in_lanes(isa: str, dtype: torch.dtype, layout: str, geometry: Geometry) -> None:
    place = LAYOUTS[layout]
    partition = Partition.random(58, 60, 2, seed=0)
    x, weight, bias = tensors(partition, geometry, 2, dtype)
    residual = torch.randn_like(reference.conv2d(x, weight, bias, partition, *geometry.window))
    check_convolution(partition, geometry, place(x), weight, bias, place(residual), "relu6")


@each_dtype
def test_every_number_of_destinations_in_slots(isa: str, dtype: torch.dtype) -> None:
    # Small groups share vectors: one, two, … of them to a vector, or a group in several slots.
    place = LAYOUTS["channels_last"]
    geometry = Geometry((8, 9), (3, 3), padding=AROUND)
    for count in range(1, 19):
        for partition in (
            Partition.random(15, 5 * count, 5, seed=count),
            Partition.contiguous(6 * (count % 4 + 1), 6 * count, 6),
            Partition.random(23, 6 * count, 6, seed=count, uneven=True),
        ):
            x, weight, bias = tensors(partition, geometry, 1, dtype)
            residual = torch.randn_like(
                reference.conv2d(x, weight, bias, partition, *geometry.window)
            )
            check_convolution(
                partition, geometry, place(x), weight, bias, place(residual), "relu", place
            )


@pytest.mark.parametrize(
    ("channels", "groups"), [(23, 1), (250, 5), (250, 250), (2112, 132), (2112, 2112)]
)
@each_dtype
def test_channels_in_any_order(isa: str, dtype: torch.dtype, channels: int, groups: int) -> None:
    # Of rows that end within four pixels, and of more channels than are transposed to be ordered.
    place = LAYOUTS["channels_last"]
    geometry = Geometry((7, 9), (3, 3), padding=AROUND)
    partition = Partition.random(channels, channels, groups, seed=0)
    x, weight, bias = tensors(partition, geometry, 2, dtype)
    residual = torch.randn_like(reference.conv2d(x, weight, bias, partition, *geometry.window))
    check_convolution(partition, geometry, place(x), weight, bias, place(residual), "relu6", place)


# ---- at random ----------------------------------------------------------------------------------


@settings(max_examples=200)
@given(
    partitions(max_channels=20),
    geometries(max_size=12),
    st.integers(0, 3),
    st.sampled_from(DTYPES),
    st.sampled_from(sorted(LAYOUTS)),
    st.sampled_from(sorted(LAYOUTS)),
    st.sampled_from(ISAS or [""]),
)
def test_anything(
    partition: Partition,
    geometry: Geometry,
    batch: int,
    dtype: torch.dtype,
    layout: str,
    grad_layout: str,
    isa: str,
) -> None:
    x, weight, bias = tensors(partition, geometry, batch, dtype)
    with forced_isa(isa):
        x = LAYOUTS[layout](x)
        check_convolution(partition, geometry, x, weight, bias, grad_layout=LAYOUTS[grad_layout])


# ---- the sizes at which things end --------------------------------------------------------------


@each_partition
@each_dtype
def test_empty_batch(isa: str, dtype: torch.dtype, partition: Partition) -> None:
    geometry = GEOMETRIES["strided"]
    x, weight, bias = tensors(partition, geometry, 0, dtype)
    check_convolution(partition, geometry, x, weight, bias)


@pytest.mark.parametrize(
    "geometry",
    [
        Geometry((0, 3), (2, 1), padding=(1, 1, 0, 0)),
        Geometry((3, 0), (1, 2), padding=(0, 0, 2, 0)),
        Geometry((0, 0), (1, 1), padding=(0, 1, 1, 0)),
        Geometry((1, 1)),
        Geometry((1, 1), (3, 3), padding=(1, 1, 1, 1)),
        Geometry((1, 1), stride=(5, 7)),
        Geometry((4, 4), (1, 1), padding=(5, 5, 5, 5), stride=(6, 6)),
    ],
    ids=str,
)
@pytest.mark.parametrize("layout", ["NCHW", "channels_last"])
def test_images_of_no_or_one_pixel(isa: str, layout: str, geometry: Geometry) -> None:
    for partition in (MIXED, PARTITIONS["depthwise"], Partition.contiguous(1, 1, 1)):
        x, weight, bias = tensors(partition, geometry, dtype=torch.float32)
        check_convolution(partition, geometry, LAYOUTS[layout](x), weight, bias)


def test_an_image_of_no_pixels_has_no_window() -> None:
    one = Partition.contiguous(2, 1, 1)
    with pytest.raises(ValueError, match=r"the kernel spans 1×1 pixels but .* only 0×4"):
        gc.conv2d(torch.ones(1, 2, 0, 4), torch.ones(2, 1, 1), partition=one)


@pytest.mark.parametrize("layout", ["NCHW", "channels_last"])
def test_more_than_two_billion_elements(isa: str, layout: str) -> None:
    # Memory that exists only where it is touched; a wide stride touches its four corners.
    far = 2**15
    shape = (2, 2, far, far // 2 + 1) if layout == "NCHW" else (2, far, far // 2 + 1, 2)
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    memory = mmap.mmap(-1, math.prod(shape) * 2, flags)
    x = torch.frombuffer(memory, dtype=torch.bfloat16).view(shape)
    x = x if layout == "NCHW" else x.movedim(-1, 1)
    assert x.numel() > 2**31
    x[1, 1, -1, -1] = 5
    weight = torch.tensor([2.0, 3.0]).view(2, 1, 1).bfloat16().requires_grad_()
    two = Partition.contiguous(2, 2, 2)
    y = gc.conv2d(x, weight, partition=two, stride=(far - 1, far // 2), backend="native")
    assert y.nonzero().tolist() == [[1, 1, 1, 1]]
    assert y[1, 1, 1, 1] == 15
    assert torch.autograd.grad(y.sum(), weight)[0].flatten().tolist() == [0, 5]


# ---- the public function ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kernel", "options"),
    [
        ((1, 1), {}),
        ((1, 1), {"stride": 2}),
        ((1, 1), {"padding": 1}),
        ((3, 3), {"padding": 1}),
        ((3, 3), {"padding": 1, "stride": 2}),
        ((3, 3), {"padding": (0, 1), "stride": (3, 1)}),
        ((5, 1), {"padding": (2, 0)}),
        ((2, 4), {"padding": "same"}),
        ((4, 3), {"padding": "same", "dilation": (1, 2)}),
        ((2, 2), {"padding": "valid", "stride": [2, 3]}),
        ((3, 3), {"padding": [2], "dilation": 2}),
        ((6, 7), {}),
    ],
)
@pytest.mark.parametrize("layout", ["NCHW", "channels_last"])
def test_takes_what_conv2d_takes(kernel: tuple[int, int], options: dict, layout: str) -> None:
    partition = PARTITIONS["permuted"]
    x, weight, bias = tensors(partition, Geometry((6, 7), kernel))
    x = LAYOUTS[layout](x)

    def masked(
        x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        return functional.conv2d(x, partition.unpack(weight), bias, **options)

    even = weight.view(8, 6, *kernel)
    for w in (weight, even):
        y = gc.conv2d(x, w, bias, partition=partition, **options)
        assert_within_rounding(y, exact(masked, x, weight, bias))
        one = gc.conv2d(x[0], w, partition=partition, **options)
        assert_within_rounding(one, exact(masked, x[0], weight))


def test_numbers_of_other_libraries() -> None:
    numpy = pytest.importorskip("numpy")
    x, weight, _ = tensors(MIXED, GEOMETRIES["3×3"])
    expected = gc.conv2d(x, weight, partition=MIXED, stride=2, padding=(1, 2), dilation=1)
    two, one = numpy.int64(2), numpy.int32(1)
    actual = gc.conv2d(x, weight, partition=MIXED, stride=two, padding=(one, two), dilation=one)
    assert torch.equal(actual, expected)


def test_a_view_with_pending_negation() -> None:
    x = torch.randn(2, 19, 4, 4, dtype=torch.complex64).conj().imag
    assert x.is_neg()
    weight = torch.randn(MIXED.entries, 1, 1)
    actual = gc.conv2d(x, weight, partition=MIXED, backend="native")
    assert torch.equal(actual, gc.conv2d(x.clone(), weight, partition=MIXED, backend="native"))


@each_layout
@each_dtype
def test_output_lies_in_memory_as_conv2ds(dtype: torch.dtype, layout: Layout) -> None:
    dense = Partition.contiguous(4, 6, 1)
    weight = torch.randn(6, 4, 3, 3, dtype=dtype)
    for shape in ((2, 4, 5, 6), (1, 4, 5, 6), (2, 4, 1, 6), (2, 4, 5, 1), (1, 4, 1, 1)):
        x = layout(torch.randn(shape, dtype=dtype)).requires_grad_()
        expected = functional.conv2d(x, weight, padding=1)
        y = gc.conv2d(x, weight, partition=dense, padding=1, backend="native")
        assert y.stride() == expected.stride(), shape
        grad = torch.ones_like(y)
        x_grad, expected_grad = (torch.autograd.grad(out, x, grad)[0] for out in (y, expected))
        assert x_grad.stride() == expected_grad.stride(), shape
