"""uint8 in, uint8 or float32 out, beside the float32 kernel and PyTorch's quantised convolution."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

import groupconv_ext as gc
from groupconv_ext.quantization import prepare_weight, quantize_weight

LAYERS = {
    "1×1 256 56² G4": (256, 56, 4, 1),
    "1×1 256 56² G8": (256, 56, 8, 1),
    "1×1 512 28² G8": (512, 28, 8, 1),
    "1×1 1024 14² G8": (1024, 14, 8, 1),
    "3×3 256 28² G8": (256, 28, 8, 3),
    "3×3 256 28² G32": (256, 28, 32, 3),
    "3×3 128 56² G32": (128, 56, 32, 3),
}
FORMATS = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}
CONTENDERS = ("float32", "uint8", "uint8 to float32", "rounding", "PyTorch, contiguous groups")


def contender(name: str, layer: str, layout: str) -> Callable[[], object]:
    channels, side, groups, kernel = LAYERS[layer]
    partition = gc.Partition.random(channels, channels, groups, seed=0)
    x = torch.randn(1, channels, side, side).contiguous(memory_format=FORMATS[layout])
    weight, padding = torch.randn(partition.entries, kernel, kernel), kernel // 2
    read_as = gc.Quantization.from_range(float(x.min()), float(x.max()))
    if name == "float32":
        return lambda: gc.conv2d(x, weight, partition=partition, padding=padding)
    if name == "rounding":
        return lambda: read_as.quantize(x)
    if name.startswith("PyTorch"):
        conv = torch.ao.nn.quantized.Conv2d(
            channels, channels, kernel, padding=padding, groups=groups
        )
        stored = torch.quantize_per_tensor(x, *read_as, torch.quint8)
        return lambda: conv(stored)
    whole, scale = quantize_weight(weight, None, partition, read_as)
    prepared = prepare_weight(whole, scale, partition=partition, read_as=read_as)
    write_as = gc.Quantization(0.5, 128) if name == "uint8" else None
    q = read_as.quantize(x)
    return lambda: gc.quantized_conv2d(
        q, prepared, partition=partition, padding=padding, write_as=write_as
    )


@pytest.mark.benchmark(max_time=0.5, min_rounds=5, warmup=True, warmup_iterations=1)
@pytest.mark.parametrize("name", CONTENDERS)
@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("layer", LAYERS)
def test_quantized(benchmark: BenchmarkFixture, layer: str, layout: str, name: str) -> None:
    benchmark.group = f"{layer} {layout} forward, 1 image"
    benchmark(torch.inference_mode()(contender(name, layer, layout)))
