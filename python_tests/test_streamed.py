"""channels_last with weights that do not stay in cache: a block is packed once for all pixels."""

import pytest
import torch
from helpers import (
    DTYPES,
    ISAS,
    LAYOUTS,
    Geometry,
    check_convolution,
    check_same_bits,
    forced_isa,
    needs_native,
    tensors,
)

from groupconv_ext import Partition

pytestmark = [needs_native, pytest.mark.native]

WINDOW = Geometry((7, 6), (3, 3), padding=(1, 1, 1, 1))
CASES = {
    "3×3": (Partition.random(256, 256, 2, seed=0), WINDOW),
    "3×3 in order": (Partition.contiguous(256, 256, 2), WINDOW),
    "3×3 stride 2": (
        Partition.random(256, 256, 2, seed=0),
        Geometry((9, 8), (3, 3), (2, 2), (1, 1, 1, 1)),
    ),
    "3×3 uneven": (Partition.random(300, 330, 3, seed=1, uneven=True), WINDOW),
    "2×2 dilated": (
        Partition.random(512, 256, 1, seed=0),
        Geometry((8, 7), (2, 2), padding=(1, 1, 1, 1), dilation=(2, 1)),
    ),
    "1×1 dense": (Partition.contiguous(512, 1024, 1), Geometry((7, 7))),
    "1×1 stride 2": (Partition.random(1024, 1024, 2, seed=0), Geometry((11, 13), stride=(2, 2))),
}
channels_last = LAYOUTS["channels_last"]


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_all_passes(case: str, dtype: torch.dtype, isa: str) -> None:
    partition, geometry = CASES[case]
    x, weight, bias = tensors(partition, geometry, dtype=dtype)
    with forced_isa(isa):
        check_convolution(
            partition, geometry, channels_last(x), weight, bias, grad_layout=channels_last
        )


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("case", "images"), [("3×3", 2), ("3×3", 11), ("3×3 in order", 2)])
def test_epilogue(case: str, images: int, dtype: torch.dtype, isa: str) -> None:
    """Eleven images take more memory than the weights, so they come in two rounds."""
    partition, geometry = CASES[case]
    x, weight, bias = tensors(partition, geometry, images, dtype)
    residual = torch.randn(images, partition.out_channels, *geometry.input_size).to(dtype)
    residual = channels_last(residual)
    with forced_isa(isa):
        check_convolution(
            partition, geometry, channels_last(x), weight, bias, residual, "relu", channels_last
        )


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("case", CASES)
def test_the_same_bits_on_any_threads_and_in_any_batch(case: str, isa: str) -> None:
    partition, geometry = CASES[case]
    x, weight, bias = tensors(partition, geometry, batch=5, dtype=torch.float32)
    with forced_isa(isa):
        check_same_bits(partition, geometry, channels_last(x), weight, bias)
