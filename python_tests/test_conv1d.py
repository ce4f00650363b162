"""gc.conv1d and its layer: conv2d over images of one row, in the words of ``nn.Conv1d``."""

from typing import Any

import pytest
import torch
from helpers import PARTITIONS, assert_within_rounding, exact
from torch import nn
from torch.nn import functional

import groupconv_ext as gc
from groupconv_ext import Partition
from groupconv_ext.nn import PartitionedConv1d

each_partition = pytest.mark.parametrize("partition", PARTITIONS.values(), ids=PARTITIONS.keys())

OPTIONS: list[tuple[int, dict[str, Any]]] = [
    (1, {}),
    (1, {"stride": 2}),
    (3, {"padding": 1}),
    (3, {"padding": "same", "dilation": 2}),
    (4, {"padding": "same"}),
    (5, {"padding": (2,), "stride": (3,), "dilation": (1,)}),
    (2, {"padding": "valid", "dilation": 3}),
]


@pytest.mark.parametrize(("kernel", "options"), OPTIONS)
@each_partition
def test_equals_the_masked_dense_convolution(
    partition: Partition, kernel: int, options: dict[str, Any]
) -> None:
    def masked(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return functional.conv1d(x, partition.unpack(weight), bias, **options)

    x = torch.randn(3, partition.in_channels, 11)
    weight, bias = torch.randn(partition.entries, kernel), torch.randn(partition.out_channels)
    y = gc.conv1d(x, weight, bias, partition=partition, **options)
    assert_within_rounding(y, exact(masked, x, weight, bias))
    one = gc.conv1d(x[1], weight, partition=partition, **options)
    assert_within_rounding(one, exact(masked, x[1], weight, None))


def test_takes_the_weight_of_conv1d() -> None:
    x, conv = torch.randn(2, 8, 9), nn.Conv1d(8, 12, 3, groups=4)
    partition = Partition.contiguous(8, 12, 4)
    y = gc.conv1d(x, conv.weight, conv.bias, partition=partition)
    torch.testing.assert_close(y, conv(x))


def test_epilogue_and_gradients() -> None:
    partition = PARTITIONS["overlapping, unread"]

    def convolve(*operands: torch.Tensor, activation: str = "silu") -> torch.Tensor:
        x, weight, bias, residual = operands
        return gc.conv1d(
            x,
            weight,
            bias,
            partition=partition,
            padding=1,
            activation=activation,
            residual=residual,
        )

    shapes = ((2, 6, 7), (partition.entries, 3), (4,), (2, 4, 7))
    operands = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    x, weight, bias, residual = operands
    dense = functional.conv1d(x, partition.unpack(weight), bias, padding=1) + residual
    torch.testing.assert_close(convolve(*operands), functional.silu(dense))
    torch.testing.assert_close(convolve(*operands, activation="relu6"), functional.relu6(dense))
    assert torch.autograd.gradcheck(convolve, operands, fast_mode=True)
    assert torch.autograd.gradgradcheck(convolve, operands, fast_mode=True)


@pytest.mark.parametrize("padding_mode", ["zeros", "reflect", "replicate", "circular"])
@pytest.mark.parametrize(("kernel", "options"), OPTIONS)
def test_layer_equals_conv1d(kernel: int, options: dict[str, Any], padding_mode: str) -> None:
    options = options | {"padding_mode": padding_mode, "dtype": torch.float64}
    conv = nn.Conv1d(8, 12, kernel, groups=4, **options)
    x = torch.randn(2, 8, 11, dtype=torch.float64)
    converted = PartitionedConv1d.from_conv1d(conv)
    torch.testing.assert_close(converted(x), conv(x))
    torch.testing.assert_close(converted(x[0]), conv(x[0]))
    loaded = PartitionedConv1d(8, 12, kernel, groups=4, **options)
    loaded.load_state_dict(conv.state_dict())
    assert torch.equal(loaded(x), converted(x))


def test_layer_over_any_partition() -> None:
    partition = PARTITIONS["ragged"]
    conv = nn.Conv1d(9, 7, 3, bias=False, dtype=torch.float64)
    layer = PartitionedConv1d.from_conv1d(conv, partition, activation="relu")
    x, residual = torch.randn(2, 9, 8).double(), torch.randn(2, 7, 6).double()
    masked = conv.weight * partition.mask()[:, :, None]
    expected = (functional.conv1d(x, masked) + residual).relu()
    torch.testing.assert_close(layer(x, residual), expected)
    copied = PartitionedConv1d(9, 7, 3, bias=False, partition=partition, dtype=torch.float64)
    copied.load_state_dict(layer.state_dict())
    assert torch.equal(copied.weight, layer.weight)
    assert repr(copied) == f"PartitionedConv1d({partition}, kernel_size=(3,), bias=False)"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kernel_size": (3, 3)}, r"kernel_size is \(3, 3\); expected an int or 1 of them"),
        ({"kernel_size": 3, "stride": (1, 2)}, r"stride is \(1, 2\); expected an int"),
        ({"kernel_size": 3, "dilation": 0}, "dilation is .*0.*; expected 1 ≤ dilation"),
    ],
)
def test_layer_refuses_at_construction(options: dict[str, Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        PartitionedConv1d(8, 8, **options)
