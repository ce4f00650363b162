"""The weight gradient of bfloat16 in pairs of pixels, by vectors (vdpbf16ps) and by matrix
registers (tdpbf16ps): where its rows of pixels can go wrong.

Every partition, window and layout of the other tests runs in these instruction sets too, mostly on
images that are too small for them.
"""

import itertools
from collections.abc import Iterator

import pytest
import torch
from helpers import (
    ISAS,
    LAYOUTS,
    Geometry,
    assert_within_rounding,
    exact,
    forced_isa,
    needs_native,
    split,
)

from groupconv_ext import Partition, _ops, reference

PAIRED = [isa for isa in ("avx512_bf16", "avx512_amx") if isa in ISAS]

pytestmark = [
    needs_native,
    pytest.mark.native,
    pytest.mark.skipif(not PAIRED, reason="neither vdpbf16ps nor tdpbf16ps here"),
]

AROUND = (1, 1, 1, 1)
TINY = 1e-39  # a denormal, in bfloat16 too


@pytest.fixture(autouse=True, params=PAIRED)
def paired(request: pytest.FixtureRequest) -> Iterator[None]:
    with forced_isa(request.param):
        yield


PARTITIONS = {
    "odd counts": Partition(118, 75, split(118, 33, 31, 7, 47), split(75, 17, 16, 31, 11)),
    "a group without inputs": Partition(48, 48, split(48, 30, 0, 18), split(48, 16, 16, 16)),
    "overlapping": Partition(
        40, 48, [range(27), range(20, 40), range(1, 40, 2)], split(48, 16, 16, 16)
    ),
    "dense": Partition.contiguous(40, 72, 1),
}

GEOMETRIES = {
    "1×1": Geometry((8, 12)),
    "1×1, odd images": Geometry((7, 7)),
    "1×1 stride 2": Geometry((9, 13), stride=(2, 2)),
    "3×3, even rows": Geometry((6, 14), (3, 3), padding=AROUND),
    "3×3, odd rows": Geometry((7, 7), (3, 3), padding=AROUND),
    "3×3 without padding": Geometry((8, 9), (3, 3)),
    "3×3 stride 2": Geometry((9, 12), (3, 3), (2, 2), AROUND),
    "dilated": Geometry((11, 10), (3, 3), padding=(2, 2, 2, 2), dilation=(2, 2)),
    "far taps": Geometry((14, 13), (3, 3), padding=(4, 4, 4, 4), dilation=(4, 4)),
    "more padding than image": Geometry((1, 1), (3, 3), padding=(1, 4, 1, 4)),
    "uneven": Geometry((9, 8), (3, 2), (1, 2), (0, 2, 1, 0)),
}


def weight_grad(
    grad: torch.Tensor, x: torch.Tensor, partition: Partition, geometry: Geometry
) -> torch.Tensor:
    stride, padding, dilation = geometry.window
    window = (*geometry.kernel_size, *stride, *padding, *dilation)
    return _ops.conv2d_weight_grad(grad, x, partition.cpu_table, partition.entries, *window)


def operands(
    partition: Partition, geometry: Geometry, batch: int
) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(batch)
    x = torch.randn(batch, partition.in_channels, *geometry.input_size, dtype=torch.bfloat16)
    weight = torch.zeros(partition.entries, *geometry.kernel_size, dtype=torch.bfloat16)
    y = reference.conv2d(x, weight, None, partition, *geometry.window)
    return torch.randn_like(y), x


def check(
    grad: torch.Tensor, x: torch.Tensor, partition: Partition, geometry: Geometry
) -> torch.Tensor:
    def of_reference(grad: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        kernel = geometry.kernel_size
        return reference.conv2d_weight_grad(grad, x, partition, kernel, *geometry.window)

    made = weight_grad(grad, x, partition, geometry)
    assert_within_rounding(made, exact(of_reference, grad, x))
    return made


@pytest.mark.parametrize(
    "layouts", list(itertools.product(("NCHW", "channels_last"), repeat=2)), ids=str
)
@pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES.keys())
@pytest.mark.parametrize("partition", PARTITIONS.values(), ids=PARTITIONS.keys())
def test_rows_of_pixels(partition: Partition, geometry: Geometry, layouts: tuple[str, str]) -> None:
    grad, x = operands(partition, geometry, 5)
    check(LAYOUTS[layouts[0]](grad), LAYOUTS[layouts[1]](x), partition, geometry)


@pytest.mark.parametrize("layout", ["NCHW", "channels_last"])
@pytest.mark.parametrize(
    "geometry",
    [Geometry((90, 100)), Geometry((70, 40), (3, 3), padding=AROUND), Geometry((2, 1500), (1, 3))],
    ids=str,
)
def test_images_cut_into_tiles(geometry: Geometry, layout: str) -> None:
    partition = Partition.random(96, 80, 2, seed=0)
    grad, x = operands(partition, geometry, 2)
    check(LAYOUTS[layout](grad), LAYOUTS[layout](x), partition, geometry)


@pytest.mark.parametrize("layout", ["NCHW", "channels_last"])
@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("geometry", [GEOMETRIES["1×1"], GEOMETRIES["3×3, even rows"]], ids=str)
def test_the_same_bits_on_any_number_of_threads(
    geometry: Geometry, groups: int, layout: str
) -> None:
    partition = Partition.random(150, 144, groups, seed=0)
    grad, x = (LAYOUTS[layout](t) for t in operands(partition, geometry, 12))
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(weight_grad(grad, x, partition, geometry))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(results[0], other) for other in results[1:])


@pytest.mark.parametrize("layout", ["NCHW", "channels_last"])
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
@pytest.mark.parametrize("where", [(0, 0), (3, 6), (7, 13)])
@pytest.mark.parametrize("padding", [(0, 0, 0, 0), AROUND])
def test_a_number_that_is_not_finite_reaches_no_other_entry(
    padding: tuple[int, int, int, int], where: tuple[int, int], value: float, layout: str
) -> None:
    """Between rows and images the gradient is zero, and what it meets there is not asked for."""
    partition, geometry = (
        PARTITIONS["overlapping"],
        Geometry((8, 14), (3, 3), (1, 1), padding),
    )
    grad, x = operands(partition, geometry, 3)
    for operand in (x, grad):
        row, col = (min(at, size - 1) for at, size in zip(where, operand.shape[2:], strict=True))
        spoilt = operand.clone()
        spoilt[1, 21, row, col] = value
        both = (grad, spoilt) if operand is x else (spoilt, x)
        made = weight_grad(*(LAYOUTS[layout](t) for t in both), partition, geometry)
        with forced_isa("avx512"):
            expected = weight_grad(*both, partition, geometry)
        assert not expected.isfinite().all()
        assert expected.isfinite().any()
        torch.testing.assert_close(made, expected, rtol=2e-2, atol=0.1, equal_nan=True)


@pytest.mark.parametrize("layout", ["NCHW", "channels_last"])
@pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES.keys())
def test_a_denormal_counts_as_zero(geometry: Geometry, layout: str) -> None:
    """Which also shows that pairs are multiplied: widened kernels keep denormals."""
    partition = Partition.random(32, 32, 2, seed=0)
    grad, x = (LAYOUTS[layout](t) for t in operands(partition, geometry, 3))
    x.fill_(TINY)
    grad.fill_(2.0**20)
    assert (weight_grad(grad, x, partition, geometry) == 0).all()
    with forced_isa("avx512_vnni"):
        assert (weight_grad(grad, x, partition, geometry) > 0).any()
