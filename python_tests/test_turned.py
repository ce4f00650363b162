"""1×1 in channels_last whose outputs are permuted: pixels are turned into rows and back."""

import pytest
import torch
from helpers import (
    ISAS,
    LAYOUTS,
    NATIVE,
    Geometry,
    Layout,
    check_convolution,
    check_same_bits,
    forced_isa,
    needs_native,
    tensors,
    window_of,
)

from groupconv_ext import Partition
from groupconv_ext.autograd import ACTIVATIONS, weight_grad

pytestmark = [needs_native, pytest.mark.native]

CASES = {
    "even": (Partition.random(64, 96, 2, seed=0), Geometry((9, 11))),
    "uneven": (Partition.random(45, 300, 5, seed=1, uneven=True), Geometry((8, 8))),
    "wide groups, several tiles": (
        Partition.random(170, 141, 3, seed=6, uneven=True),
        Geometry((19, 23)),
    ),
    "more channels than L1 has lines": (Partition.random(640, 528, 16, seed=8), Geometry((9, 11))),
    "narrow groups": (Partition.random(88, 80, 8, seed=7), Geometry((17, 13))),
    "few inputs": (Partition.random(8, 40, 4, seed=2), Geometry((10, 12))),
    "one group": (Partition.random(33, 17, 1, seed=3), Geometry((7, 7))),
    "nobody's inputs, an empty group": (
        Partition(21, 11, [range(20, 4, -2), [], [3, 1]], [[10, 2, 4, 6], [1, 8], [0, 3, 5, 7, 9]]),
        Geometry((9, 9)),
    ),
    "inputs shared": (
        Partition(12, 10, [range(12), [11, 3, 4]], [[9, 1, 2, 3, 4, 0], [5, 8, 7, 6]]),
        Geometry((9, 9)),
    ),
    "weights beyond the caches": (Partition.random(1024, 512, 1, seed=4), Geometry((6, 9))),
    "channels beyond the scratch": (Partition.random(3000, 2500, 50, seed=5), Geometry((7, 7))),
}
channels_last = LAYOUTS["channels_last"]


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(
    "layout", ["channels_last", "channels_last, channels cut", "channels_last, all sliced"]
)
def test_all_passes(case: str, layout: str, isa: str) -> None:
    partition, geometry = CASES[case]
    place: Layout = LAYOUTS[layout]
    x, weight, bias = tensors(partition, geometry, batch=3, dtype=torch.float32)
    with forced_isa(isa):
        check_convolution(partition, geometry, place(x), weight, bias, grad_layout=place)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("sliced", [False, True])
def test_epilogue(activation: str, sliced: bool, isa: str) -> None:
    partition, geometry = CASES["even"]
    x, weight, bias = tensors(partition, geometry, batch=3, dtype=torch.float32)
    place = LAYOUTS["channels_last, channels cut" if sliced else "channels_last"]
    residual = place(torch.randn(3, partition.out_channels, *geometry.input_size))
    for added in (None, bias):
        with forced_isa(isa):
            check_convolution(
                partition,
                geometry,
                channels_last(x),
                weight,
                added,
                residual,
                activation,
                channels_last,
            )


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("case", ["even", "uneven", "few inputs", "one group"])
def test_the_same_bits_on_any_threads_and_in_any_batch(case: str, isa: str) -> None:
    partition, geometry = CASES[case]
    x, weight, bias = tensors(partition, geometry, batch=7, dtype=torch.float32)
    with forced_isa(isa):
        check_same_bits(partition, geometry, channels_last(x), weight, bias)


@pytest.mark.parametrize("isa", ISAS)
def test_the_same_bits_of_a_weight_gradient_on_any_threads(isa: str) -> None:
    partition, geometry = CASES["wide groups, several tiles"]
    x, _, _ = tensors(partition, geometry, batch=5, dtype=torch.float32)
    grad = torch.randn(5, partition.out_channels, *geometry.input_size)
    x, grad = channels_last(x), channels_last(grad)

    def call() -> torch.Tensor:
        return weight_grad(grad, x, partition, window_of(geometry), (1, 1))

    threads = torch.get_num_threads()
    try:
        with forced_isa(isa):
            torch.set_num_threads(1)
            alone = call()
            for count in (2, 3):
                torch.set_num_threads(count)
                assert torch.equal(call(), alone)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("isa", ISAS)
def test_a_permutation_changes_no_bits(isa: str) -> None:
    # Sums are made in the order of a group's inputs, wherever its outputs go.
    partition, geometry = CASES["even"]
    x, weight, bias = tensors(partition, geometry, batch=2, dtype=torch.float32)
    x, order = channels_last(x), torch.randperm(partition.out_channels)

    def call(partition: Partition, bias: torch.Tensor) -> torch.Tensor:
        return NATIVE.convolve(x, weight, bias, None, partition, window_of(geometry), "relu")

    with forced_isa(isa):
        y = call(partition, bias)
        assert torch.equal(call(partition.permute_outputs(order), bias[order]), y[:, order])
