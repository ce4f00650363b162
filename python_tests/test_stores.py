"""An output beyond a core's caches is stored in other ways, with the same numbers in it."""

import pytest
import torch
from helpers import ISAS, forced_isa, needs_native

import groupconv_ext as gc

pytestmark = [needs_native, pytest.mark.native]

CHANNELS = 64
IMAGES = 32  # 6 MB together, while each alone fits


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("size", [28, 27], ids=["rows of whole lines", "rows that begin anywhere"])
@pytest.mark.parametrize("groups", [2, 8], ids=["deep", "shallow"])
def test_a_large_batch_is_its_images_one_by_one(isa: str, size: int, groups: int) -> None:
    partition = gc.Partition.random(CHANNELS, CHANNELS, groups, seed=0)
    weight = torch.randn(partition.entries, 1, 1, requires_grad=True)
    x = torch.randn(IMAGES, CHANNELS, size, size, requires_grad=True)
    grad = torch.randn(IMAGES, CHANNELS, size, size)

    def both_passes(images: slice) -> tuple[torch.Tensor, torch.Tensor]:
        y = gc.conv2d(x[images], weight, partition=partition, backend="native")
        # Together with the weight's gradient, in one pass, where the map is large enough.
        return y, torch.autograd.grad(y, (x, weight), grad[images])[0][images]

    with forced_isa(isa):
        y, x_grad = both_passes(slice(None))
        for n in range(IMAGES):
            one_y, one_x_grad = both_passes(slice(n, n + 1))
            assert torch.equal(y[n : n + 1], one_y)
            assert torch.equal(x_grad[n : n + 1], one_x_grad)
