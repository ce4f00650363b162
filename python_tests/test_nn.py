"""Layers: PartitionedConv2d is nn.Conv2d with other groups, in every respect that users rely on."""

import inspect
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import PARTITIONS
from torch import nn
from torch.nn import functional

from groupconv_ext import Partition
from groupconv_ext.nn import PartitionedConv2d, ShuffledConv2d

RAGGED = PARTITIONS["ragged"]  # 9 → 7 channels in groups of 2×4, 3×1 and 2×4


def image(channels: int, **options: Any) -> torch.Tensor:
    return torch.randn(2, channels, 8, 9, dtype=torch.float64, **options)


# ---- as nn.Conv2d -------------------------------------------------------------------------------


@pytest.mark.parametrize("layer", [PartitionedConv2d, ShuffledConv2d])
def test_arguments_stand_in_the_order_of_conv2ds(layer: type[nn.Module]) -> None:
    expected = list(inspect.signature(nn.Conv2d).parameters.values())
    actual = list(inspect.signature(layer).parameters.values())
    for ours, theirs in zip(actual, expected, strict=False):
        assert (ours.name, ours.default) == (theirs.name, theirs.default)
    assert all(p.kind is p.KEYWORD_ONLY for p in actual[len(expected) :])


OPTIONS = [
    {},
    {"bias": False},
    {"groups": 4, "stride": 2},
    {"groups": 2, "kernel_size": (1, 3), "padding": (0, 1), "stride": (2, 1)},
    {"kernel_size": (2, 4), "padding": "same", "groups": 4},
    {"kernel_size": 3, "padding": "valid", "dilation": (1, 2)},
    {"kernel_size": 5, "padding": 4, "dilation": 2, "stride": 3, "groups": 2},
]


@pytest.mark.parametrize("padding_mode", ["zeros", "reflect", "replicate", "circular"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_equals_conv2d(options: dict[str, Any], padding_mode: str) -> None:
    options = {"kernel_size": 3, "padding": 1, "padding_mode": padding_mode} | options
    conv = nn.Conv2d(8, 12, **options, dtype=torch.float64)
    x = image(8)
    converted = PartitionedConv2d.from_conv2d(conv)
    torch.testing.assert_close(converted(x), conv(x))
    torch.testing.assert_close(converted(x[0]), conv(x[0]))

    loaded = PartitionedConv2d(8, 12, **options, dtype=torch.float64)
    loaded.load_state_dict(conv.state_dict())
    assert torch.equal(loaded(x), converted(x))


def test_positional_arguments() -> None:
    arguments = (8, 12, 3, 2, 1, 1, 4, False, "zeros", "cpu", torch.float64)
    layer, conv = PartitionedConv2d(*arguments), nn.Conv2d(*arguments)
    layer.load_state_dict(conv.state_dict())
    x = image(8)
    torch.testing.assert_close(layer(x), conv(x))


def test_starts_as_conv2d_starts() -> None:
    """Every group within the bounds of an ``nn.Conv2d`` of the group's size, and filling them."""
    groups = [range(64), [], range(64, 70)]
    partition = Partition(70, 96, groups, [range(1, 96, 2), [0, 2], range(4, 96, 2)])
    layer = PartitionedConv2d(70, 96, 3, partition=partition)
    blocks = layer.weight.detach().split([outs * ins for outs, ins in partition.sizes])
    for block, outputs, inputs in zip(blocks, partition.outputs, partition.inputs, strict=True):
        bias = layer.bias.detach()[list(outputs)]
        if not inputs:
            assert not bias.any()
            continue
        bound = 1 / math.sqrt(len(inputs) * 9)
        for values in (block, bias):
            assert 0.8 * bound < values.abs().max() <= bound
        assert block.std() == pytest.approx(bound / math.sqrt(3), rel=0.1)


def test_trains_as_a_masked_dense_layer() -> None:
    layer = PartitionedConv2d(9, 7, 3, padding=1, partition=RAGGED, dtype=torch.float64)
    dense = nn.Conv2d(9, 7, 3, padding=1, dtype=torch.float64)
    with torch.no_grad():
        dense.weight.copy_(RAGGED.unpack(layer.weight))
        dense.bias.copy_(layer.bias)
    mask = RAGGED.mask(torch.float64)[:, :, None, None]
    dense.weight.register_hook(lambda grad: grad * mask)
    target = image(7)
    x = image(9)
    for network in (layer, dense):
        start = network.weight.detach().clone()
        optimizer = torch.optim.SGD(
            network.parameters(), 0.05, momentum=0.9, weight_decay=0.01, nesterov=True
        )
        for _ in range(6):
            optimizer.zero_grad()
            functional.mse_loss(network(x).relu(), target).backward()
            optimizer.step()
        assert not torch.equal(network.weight, start)
    torch.testing.assert_close(RAGGED.unpack(layer.weight), dense.weight)
    torch.testing.assert_close(layer.bias, dense.bias)


def test_activation_and_residual() -> None:
    options = {"kernel_size": 3, "padding": 1, "partition": RAGGED, "dtype": torch.float64}
    plain = PartitionedConv2d(9, 7, **options)
    x, residual = image(9), image(7)
    for name in ("relu", "relu6", "silu", "hardswish"):
        layer = PartitionedConv2d(9, 7, activation=name, **options)
        layer.load_state_dict(plain.state_dict())
        expected = getattr(functional, name)(plain(x) + residual)
        torch.testing.assert_close(layer(x, residual), expected)
        torch.testing.assert_close(layer(x, residual=residual), expected)


# ---- other groups -------------------------------------------------------------------------------


@pytest.mark.parametrize("partition", PARTITIONS.values(), ids=PARTITIONS.keys())
def test_from_conv2d_keeps_the_connections_of_the_partition(partition: Partition) -> None:
    conv = nn.Conv2d(
        partition.in_channels, partition.out_channels, (3, 2), 2, 1, dtype=torch.float64
    ).eval()
    layer = PartitionedConv2d.from_conv2d(conv, partition, activation="relu", backend="dense")
    x = image(partition.in_channels)
    masked = conv.weight * partition.mask(torch.float64)[:, :, None, None]
    expected = functional.conv2d(x, masked, conv.bias, 2, 1).relu()
    torch.testing.assert_close(layer(x), expected)
    assert not layer.training
    assert layer.weight.shape == (partition.entries, 3, 2)
    assert layer.weight.requires_grad
    assert layer.backend == "dense"


def test_from_a_grouped_conv2d() -> None:
    conv = nn.Conv2d(8, 8, 1, groups=2, bias=False, dtype=torch.float64)
    finer = Partition.contiguous(8, 8, 4)
    x = image(8)
    dense = Partition.contiguous(8, 8, 2).unpack(conv.weight) * finer.mask()[:, :, None, None]
    actual = PartitionedConv2d.from_conv2d(conv, finer)(x)
    torch.testing.assert_close(actual, functional.conv2d(x, dense))


def test_shuffled_equals_a_convolution_and_a_shuffle() -> None:
    conv = nn.Conv2d(12, 24, 3, 2, 1, groups=4, dtype=torch.float64)
    layer = ShuffledConv2d(12, 24, 3, 2, 1, groups=4, dtype=torch.float64)
    layer.load_state_dict(
        {"weight": conv.weight, "bias": nn.ChannelShuffle(4)(conv.bias[None, :, None])[0, :, 0]}
    )
    x = image(12)
    torch.testing.assert_close(layer(x), nn.ChannelShuffle(4)(conv(x)))
    assert isinstance(layer, PartitionedConv2d)


# ---- state --------------------------------------------------------------------------------------


def test_state_survives_a_file(tmp_path: Path) -> None:
    def network(seed: int) -> nn.Module:
        partition = Partition.random(9, 9, 3, seed=seed)
        return nn.Sequential(
            PartitionedConv2d(9, 9, 1, partition=partition, dtype=torch.float64),
            nn.ReLU(),
            PartitionedConv2d(9, 7, 3, partition=RAGGED, bias=False, dtype=torch.float64),
        )

    saved, loaded = network(0), network(1)
    assert saved[0].partition != loaded[0].partition
    torch.save(saved.state_dict(), tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    assert list(state) == ["0.weight", "0.bias", "0._extra_state", "2.weight", "2._extra_state"]
    result = loaded.load_state_dict(state)
    assert not result.missing_keys
    assert not result.unexpected_keys
    assert loaded[0].partition == saved[0].partition, "the meaning of the weight comes with it"
    x = image(9)
    assert torch.equal(loaded(x), saved(x))


@pytest.mark.parametrize(
    "other",
    [
        Partition.from_labels([0, 1, 1], [0, 0, 1], 2),  # the same number of entries
        Partition.from_labels([0, 0, 0], [0, 0, 1], 2),
        Partition(4, 3, [[0, 1], [2]], [[0], [1, 2]]),
    ],
    ids=str,
)
def test_another_partition_is_refused(other: Partition) -> None:
    partition = Partition.from_labels([0, 0, 1], [0, 1, 1], 2)
    layer = PartitionedConv2d(3, 3, 1, partition=partition)
    before = layer.weight.detach().clone()
    state = PartitionedConv2d(other.in_channels, 3, 1, partition=other).state_dict()
    with pytest.raises((ValueError, RuntimeError), match=r"the checkpoint has .*|size mismatch"):
        layer.load_state_dict(state)
    assert layer.partition == partition
    assert torch.equal(layer.weight, before), "nothing of it was loaded"


def test_a_state_that_is_no_partition_is_refused() -> None:
    layer = PartitionedConv2d(9, 7, 1, partition=RAGGED)
    before = layer.weight.detach().clone()
    state = {key: torch.zeros_like(value) for key, value in layer.state_dict().items()}
    with pytest.raises(ValueError, match="table"):
        layer.load_state_dict(state)
    assert torch.equal(layer.weight, before)
    assert layer.partition == RAGGED


def test_a_state_is_a_copy() -> None:
    layer = PartitionedConv2d(9, 7, 1, partition=RAGGED)
    layer.state_dict()["_extra_state"].zero_()
    assert torch.equal(layer.get_extra_state(), Partition(*RAGGED.__reduce__()[1]).cpu_table)


def test_conv2ds_state_needs_as_many_even_groups() -> None:
    x = image(8)
    conv = nn.Conv2d(8, 12, 1, groups=2, dtype=torch.float64)
    permuted = Partition.random(8, 12, 2, seed=0)
    layer = PartitionedConv2d(8, 12, 1, partition=permuted, dtype=torch.float64)
    layer.load_state_dict(conv.state_dict())
    expected = functional.conv2d(x, permuted.unpack(conv.weight), conv.bias)
    torch.testing.assert_close(layer(x), expected)
    with pytest.raises(RuntimeError, match="size mismatch for weight"):
        PartitionedConv2d(8, 12, 1, groups=4).load_state_dict(conv.state_dict())
    with pytest.raises(RuntimeError, match=r"Missing key.*bias"):
        layer.load_state_dict({"weight": conv.weight})


def test_built_on_meta_and_filled_later() -> None:
    made = PartitionedConv2d(9, 7, 3, partition=RAGGED)
    with torch.device("meta"):
        layer = PartitionedConv2d(9, 7, 3, partition=RAGGED)
    assert layer.weight.is_meta
    assert layer(torch.randn(2, 9, 5, 5, device="meta")).shape == (2, 7, 3, 3)
    layer = layer.to_empty(device="cpu")
    layer.load_state_dict(made.state_dict())
    x = torch.randn(2, 9, 5, 5)
    assert torch.equal(layer(x), made(x))
    with torch.device("meta"):
        assigned = PartitionedConv2d(9, 7, 3, partition=RAGGED)
    assigned.load_state_dict(made.state_dict(), assign=True)
    assert torch.equal(assigned(x), made(x))
    layer.reset_parameters()
    assert layer.weight.isfinite().all()


def test_moves_between_dtypes_and_formats() -> None:
    layer = PartitionedConv2d(9, 7, 3, partition=RAGGED)
    x = torch.randn(2, 9, 5, 5).contiguous(memory_format=torch.channels_last)
    expected = layer(x)
    assert expected.is_contiguous(memory_format=torch.channels_last)
    same = layer.to(memory_format=torch.channels_last)
    assert torch.equal(same(x), expected)
    low = layer.bfloat16()
    assert low(x.bfloat16()).dtype == torch.bfloat16
    assert low.partition == RAGGED
    assert low.get_extra_state().dtype == torch.int32


# ---- what it says and refuses -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layer", "text"),
    [
        (
            PartitionedConv2d(9, 7, 1, partition=RAGGED),
            f"PartitionedConv2d({RAGGED}, kernel_size=(1, 1))",
        ),
        (
            PartitionedConv2d(
                9,
                7,
                3,
                (2, 1),
                "valid",
                2,
                3,
                False,
                "reflect",
                partition=RAGGED,
                activation="relu",
            ),
            f"PartitionedConv2d({RAGGED}, kernel_size=(3, 3), stride=(2, 1), padding=valid, "
            "dilation=2, bias=False, padding_mode='reflect', activation='relu')",
        ),
        (
            ShuffledConv2d(8, 8, (1, 3), padding=(0, 1), groups=2),
            "ShuffledConv2d(Partition(8→8, 2 groups, even 4×4, permuted), kernel_size=(1, 3), "
            "padding=(0, 1))",
        ),
    ],
)
def test_repr(layer: nn.Module, text: str) -> None:
    assert repr(layer) == text


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"groups": 2}, ValueError, "groups = 2 contradicts Partition"),
        ({"in_channels": 8}, ValueError, "in_channels, out_channels = 8, 7; expected those of"),
        ({"out_channels": 9}, ValueError, "in_channels, out_channels = 9, 9; expected those of"),
        (
            {"partition": None, "groups": 2},
            ValueError,
            "groups = 2 does not divide in_channels = 9",
        ),
        ({"partition": None, "groups": 0}, ValueError, "groups is 0; expected 1 ≤ groups"),
        ({"partition": "ragged"}, TypeError, "partition is 'ragged'; expected a .*Partition"),
        ({"padding_mode": "mirror"}, ValueError, "padding_mode is 'mirror'; expected one of"),
        ({"kernel_size": 0}, ValueError, "the kernel is 0×0; expected at least 1×1"),
        (
            {"kernel_size": (3, 3, 3)},
            ValueError,
            r"kernel_size is \(3, 3, 3\); expected an int or 2",
        ),
        ({"kernel_size": 1.5}, (TypeError, ValueError), r"kernel_size is 1\.5; expected an int"),
        ({"stride": 0}, ValueError, "stride is 0; expected 1 ≤ stride"),
        ({"padding": -1}, ValueError, "padding is -1; expected 0 ≤ padding"),
        ({"padding": "same", "stride": 2}, ValueError, "padding='same' needs stride 1"),
        ({"dilation": (1, 0)}, ValueError, r"dilation is \(1, 0\); expected 1 ≤ dilation"),
        ({"activation": "gelu"}, ValueError, "activation is 'gelu'; expected None or one of"),
        ({"backend": "cudnn"}, ValueError, "backend is 'cudnn'; expected"),
    ],
)
def test_refuses_at_construction(
    change: dict[str, Any], error: type[Exception], message: str
) -> None:
    options = {"in_channels": 9, "out_channels": 7, "kernel_size": 3, "partition": RAGGED}
    PartitionedConv2d(**options)
    with pytest.raises(error, match=message):
        PartitionedConv2d(**(options | change))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_a_weight_changed_in_place_is_seen(layout: torch.memory_format) -> None:
    """Nothing made of a weight outlives the call, however the weight is written to."""
    layer = PartitionedConv2d(64, 64, 1, bias=False, groups=2).requires_grad_(False)
    x = torch.randn(2, 64, 9, 9).contiguous(memory_format=layout)
    with torch.inference_mode():
        y = layer(x)
        layer.weight.data.mul_(2)  # which no version counter sees
        torch.testing.assert_close(layer(x), 2 * y)
    layer.weight.mul_(2)
    torch.testing.assert_close(layer(x), 4 * y)
    layer.weight.data = layer.weight.data.clone().mul_(2)
    torch.testing.assert_close(layer(x), 8 * y)
