"""A training step of layers that learn their groups, beside the masked dense step in PyTorch."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch.nn import functional

import groupconv_ext as gc

Step = Callable[[], object]

LAYERS = {"256 28² G8": (256, 28), "512 14² G8": (512, 14)}
"""1×1 layers of as many outputs as inputs; 16 images."""


def masked_dense(layer: gc.nn.FLGConv2d, x: torch.Tensor) -> torch.Tensor:
    """What people write: one-hot rows, straight through, a dense mask, a dense convolution."""

    def assignments(logits: torch.Tensor) -> torch.Tensor:
        soft = logits.softmax(1)
        hard = functional.one_hot(logits.argmax(1), logits.shape[1]).to(soft.dtype)
        return hard + soft - soft.detach()

    mask = assignments(layer.output_logits) @ assignments(layer.input_logits).T
    return functional.conv2d(x, layer.weight * mask[:, :, None, None])


def step(forward: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor, *parameters) -> Step:
    grad = torch.randn_like(x)
    return lambda: torch.autograd.grad(forward(x), [x, *parameters], grad)


def contenders(channels: int, size: int) -> dict[str, Step]:
    x = torch.randn(16, channels, size, size, requires_grad=True)
    options = {"bias": False, "partition": gc.Partition.random(channels, channels, 8, seed=0)}
    layer, frozen = (gc.nn.FLGConv2d(channels, channels, 1, **options) for _ in range(2))
    frozen.freeze_structure()
    learned = layer.weight, layer.input_logits, layer.output_logits
    gates = [0, 0, 0] + [1] * (channels.bit_length() - 4)
    dgconv = gc.nn.DGConv2d(channels, channels, 1, bias=False, gates=gates)

    def dense_dgconv(x: torch.Tensor) -> torch.Tensor:
        return functional.conv2d(x, gc.reference.dgconv_weight(dgconv.weight, dgconv.gates))

    return {
        "masked dense": step(lambda x: masked_dense(layer, x), x, *learned),
        "FLGConv2d": step(layer, x, *learned),
        "FLGConv2d, frozen": step(frozen, x, frozen.weight),
        "masked dense DGConv": step(dense_dgconv, x, dgconv.weight, dgconv.gates),
        "DGConv2d": step(dgconv, x, dgconv.weight, dgconv.gates),
    }


@pytest.mark.benchmark(max_time=0.5, min_rounds=5, warmup=True, warmup_iterations=1)
@pytest.mark.parametrize("name", contenders(16, 2))
@pytest.mark.parametrize("layer", LAYERS)
def test_training_step(benchmark: BenchmarkFixture, layer: str, name: str) -> None:
    benchmark.group = layer
    benchmark(contenders(*LAYERS[layer])[name])


def products(channels: int) -> dict[str, Step]:
    weight = torch.randn(channels, channels, 1, 1, requires_grad=True)
    ins, outs = (torch.randn(channels, 8, requires_grad=True) for _ in range(2))
    gates = torch.randn(channels.bit_length() - 1, requires_grad=True)
    grad = torch.randn_like(weight)

    def pair(function: Callable[..., torch.Tensor], *operands: torch.Tensor) -> Step:
        return lambda: torch.autograd.grad(function(*operands), operands, grad)

    return {
        "copy": grad.clone,
        "FLGC": pair(gc.flgc_weight, weight, ins, outs),
        "FLGC in PyTorch": pair(gc.reference.flgc_weight, weight, ins, outs),
        "DGConv": pair(gc.dgconv_weight, weight, gates),
        "DGConv in PyTorch": pair(gc.reference.dgconv_weight, weight, gates),
    }


@pytest.mark.benchmark(max_time=0.5, min_rounds=5, warmup=True, warmup_iterations=1)
@pytest.mark.parametrize("name", products(16))
@pytest.mark.parametrize("channels", [256, 1024])
def test_mask_product(benchmark: BenchmarkFixture, channels: int, name: str) -> None:
    benchmark.group = f"W ⊙ M forward + backward, {channels} × {channels}"
    benchmark(products(channels)[name])
