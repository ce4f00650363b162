"""The layers of the papers beside the obvious PyTorch versions: forward, and a training step."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch.nn import functional

import groupconv_ext as gc

Run = Callable[[], torch.Tensor]


class Stand(NamedTuple):
    """One layer on one input: ours, what people write, what gradients are asked of."""

    ours: Run
    theirs: Run
    leaves: list[torch.Tensor]


def two_level(batch: int, channels: int, groups: int, size: int) -> Stand:
    layer = gc.nn.TwoLevelConv2d(channels, channels, 3, padding=1, groups=groups, bias=False)
    x = torch.randn(batch, channels, size, size, requires_grad=True)

    def theirs() -> torch.Tensor:
        z = functional.conv2d(x, layer.restriction, None, 1, 1, 1, groups)
        y = functional.conv2d(x, layer.weight, None, 1, 1, 1, groups)
        return y + functional.conv2d(z, layer.coarse[:, :, None, None])

    return Stand(lambda: layer(x), theirs, [x, *layer.parameters()])


def interleaved(batch: int, primary: int, secondary: int, size: int) -> Stand:
    channels = primary * secondary
    layer = gc.nn.InterleavedConv2d(
        channels, channels, 3, padding=1, bias=False, primary_groups=primary
    )
    x = torch.randn(batch, channels, size, size, requires_grad=True)
    order = torch.arange(channels).view(primary, secondary).t().flatten()
    back = order.argsort()

    def theirs() -> torch.Tensor:
        y = functional.conv2d(x, layer.primary, None, 1, 1, 1, primary).index_select(1, order)
        return functional.conv2d(y, layer.secondary, groups=secondary).index_select(1, back)

    return Stand(lambda: layer(x), theirs, [x, *layer.parameters()])


def chain(batch: int, channels: int, sizes: tuple[int, ...], size: int) -> Stand:
    layer = gc.nn.IGCV2Conv2d(channels, channels, 3, padding=1, branch_channels=sizes)
    partitions = [p for name, p in layer.partitions.items() if name.startswith("stages")]
    weights = [weight.detach().requires_grad_() for weight in layer.stages]
    x = torch.randn(batch, channels, size, size, requires_grad=True)
    # The permutation between two stages in one gather, which is the best that people write.
    orders, before = [], torch.arange(channels)
    for partition in partitions:
        order = partition.read_order("cpu")
        orders.append(before.argsort()[order])
        before = order
    back = before.argsort()

    def theirs() -> torch.Tensor:
        y = x
        for order, weight, partition in zip(orders, weights, partitions, strict=True):
            y = functional.conv2d(y.index_select(1, order), weight, groups=partition.groups)
        return y.index_select(1, back)

    return Stand(lambda: gc.chain(x, weights, partitions=partitions), theirs, [x, *weights])


def separable(batch: int, channels: int, outputs: int, size: int, layout: str) -> Stand:
    layer = gc.nn.DepthwiseSeparableConv2d(channels, outputs, 3, padding=1, bias=False)
    x = torch.randn(batch, channels, size, size)
    if layout == "NHWC":
        x = x.contiguous(memory_format=torch.channels_last)
    x.requires_grad_()

    def theirs() -> torch.Tensor:
        y = functional.conv2d(x, layer.depthwise, padding=1, groups=channels)
        return functional.conv2d(y, layer.pointwise)

    return Stand(lambda: layer(x), theirs, [x, *layer.parameters()])


STANDS: dict[str, Callable[[], Stand]] = {
    "two-level 3×3 160 32² N=8": lambda: two_level(1, 160, 8, 32),
    "two-level 3×3 320 16² N=8, 16 images": lambda: two_level(16, 320, 8, 16),
    "IGC L24M2 32²": lambda: interleaved(1, 24, 2, 32),
    "IGC L4M8 32²": lambda: interleaved(1, 4, 8, 32),
    "IGC L16M16 16², 16 images": lambda: interleaved(16, 16, 16, 16),
    "separable 144→24 56²": lambda: separable(1, 144, 24, 56, "NCHW"),
    "separable 144→24 56² NHWC, 8 images": lambda: separable(8, 144, 24, 56, "NHWC"),
    "separable 512→512 14²": lambda: separable(1, 512, 512, 14, "NCHW"),
    "chain 256 (16, 16) 16², 16 images": lambda: chain(16, 256, (16, 16), 16),
    "chain 256 (4, 8, 8) 16², 16 images": lambda: chain(16, 256, (4, 8, 8), 16),
    "chain 1024 (32, 32) 16², 16 images": lambda: chain(16, 1024, (32, 32), 16),
    "chain 1024 (8, 8, 16) 16², 16 images": lambda: chain(16, 1024, (8, 8, 16), 16),
}


@pytest.mark.benchmark(max_time=0.5, min_rounds=5, warmup=True, warmup_iterations=1)
@pytest.mark.parametrize("whose", ["ours", "theirs"])
@pytest.mark.parametrize("trains", [False, True], ids=["forward", "training"])
@pytest.mark.parametrize("name", STANDS)
def test_layer(benchmark, name: str, trains: bool, whose: str) -> None:
    stand = STANDS[name]()
    y = stand.ours()
    torch.testing.assert_close(y, stand.theirs(), rtol=1e-3, atol=1e-3)
    run: Run = getattr(stand, whose)
    benchmark.group = f"{name}, {'training' if trains else 'forward'}"
    if trains:
        grad = torch.randn_like(y)
        benchmark(lambda: torch.autograd.grad(run(), stand.leaves, grad))
        return
    with torch.inference_mode():
        benchmark(run)
