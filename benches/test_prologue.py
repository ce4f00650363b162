"""Normalisation, ReLU and convolution: with a prologue in one call, and one after another."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

import groupconv_ext as gc

LAYERS = {
    "1×1 256 56² G8": (256, 56, 8, 1),
    "1×1 512 28² G8": (512, 28, 8, 1),
    "3×3 128 28² G4": (128, 28, 4, 3),
    "3×3 256 28² G256": (256, 28, 256, 3),
}
FORMATS = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}
CONTENDERS = ("convolution alone", "one after another", "prologue")


def contender(name: str, layer: str, layout: str, trains: bool) -> Callable[[], object]:
    channels, side, groups, kernel = LAYERS[layer]
    partition = gc.Partition.random(channels, channels, groups, seed=0)
    convolution = gc.nn.PartitionedConv2d(
        channels, channels, kernel, padding=kernel // 2, bias=False, partition=partition
    )
    norm = torch.nn.BatchNorm2d(channels).eval()
    x = torch.randn(8 if trains else 1, channels, side, side)
    x = x.contiguous(memory_format=FORMATS[layout]).requires_grad_(trains)

    def forward() -> torch.Tensor:
        if name == "convolution alone":
            return convolution(x)
        if name == "prologue":
            return convolution(x, prologue=gc.Prologue.from_batch_norm(norm))
        return convolution(norm(x).relu_())

    if not trains:
        return torch.inference_mode()(forward)
    grad = torch.randn_like(forward())
    parameters = [x, convolution.weight]
    if name != "convolution alone":
        parameters += norm.parameters()
    return lambda: torch.autograd.grad(forward(), parameters, grad)


@pytest.mark.benchmark(max_time=0.5, min_rounds=5, warmup=True, warmup_iterations=1)
@pytest.mark.parametrize("name", CONTENDERS)
@pytest.mark.parametrize("trains", [False, True], ids=["forward", "training"])
@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("layer", LAYERS)
def test_prologue(
    benchmark: BenchmarkFixture, layer: str, layout: str, trains: bool, name: str
) -> None:
    benchmark.group = f"{layer} {layout} {'training, 8 images' if trains else 'forward, 1 image'}"
    benchmark(contender(name, layer, layout, trains))
