"""Counting: against numbers worked out by hand, and what cannot be counted."""

import pytest
import torch
from torch import nn
from torch.nn import functional

import groupconv_ext as gc

RAGGED = gc.Partition.from_labels(
    [0, 0, 0, 1, 1, 2], [0, 1, 1, 1, 1, 2, 2, 2], 4
)  # 3 + 8 + 3 connections


def test_layers_of_torch() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1, groups=1),
        nn.BatchNorm2d(8),
        nn.ConvTranspose2d(8, 4, 2, stride=2, bias=False),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, 5),
    )
    counted = gc.count(model, (6, 10))
    assert [layer.name for layer in counted.layers] == ["0", "1", "2", "5"]
    assert [layer.parameters for layer in counted.layers] == [3 * 8 * 9 + 8, 16, 8 * 4 * 4, 25]
    assert [layer.multiply_adds for layer in counted.layers] == [
        3 * 8 * 9 * 15,
        0,
        8 * 4 * 4 * 15,
        20,
    ]
    assert [layer.output for layer in counted.layers] == [(8, 3, 5), (), (4, 6, 10), (5,)]
    assert counted.of("norm").parameters == 16
    assert counted.of("convolution", "linear").multiply_adds == counted.multiply_adds


@pytest.mark.parametrize(
    ("layer", "parameters", "multiply_adds"),
    [
        (lambda: gc.nn.PartitionedConv2d(6, 8, 3, padding=1, partition=RAGGED), 14 * 9 + 8, 126),
        (lambda: gc.nn.ShuffledConv2d(6, 8, 1, groups=2, bias=False), 24, 24),
        (
            lambda: gc.nn.TwoLevelConv2d(6, 8, 3, padding=1, groups=2),
            24 * 9 + 6 * 9 + 16 + 8,
            24 * 9 + 6 * 9 + 16,
        ),
        (
            lambda: gc.nn.InterleavedConv2d(6, 8, 3, padding=1, primary_groups=2, bias=False),
            24 * 9 + 16,
            24 * 9 + 16,
        ),
        (
            lambda: gc.nn.IGCV2Conv2d(6, 12, 3, padding=1, branch_channels=[2, 3], bias=False),
            54 + 12 + 36,
            54 + 12 + 36,
        ),
        (lambda: gc.nn.DepthwiseSeparableConv2d(6, 8, 3, padding=1, bias=False), 102, 102),
    ],
    ids=["partitioned", "shuffled", "two-level", "IGC", "IGCV2", "separable"],
)
def test_layers_of_this_library(layer, parameters: int, multiply_adds: int) -> None:
    counted = gc.count(layer(), (6, 4, 5))
    assert counted.parameters == counted.dense_parameters == parameters
    assert counted.multiply_adds == counted.dense_multiply_adds == multiply_adds * 20


def test_strides_move_the_pixels_to_where_a_stage_works() -> None:
    separable = gc.nn.DepthwiseSeparableConv2d(6, 8, 3, 2, 1, bias=False)
    xception = gc.nn.XceptionConv2d(6, 8, 3, 2, 1, bias=False)
    assert gc.count(separable, (6, 4, 4)).multiply_adds == (54 + 48) * 4
    assert gc.count(xception, (6, 4, 4)).multiply_adds == 48 * 16 + 72 * 4


@pytest.mark.parametrize("freeze", [False, True])
def test_learned_groups_count_deployed_and_dense(freeze: bool) -> None:
    layer = gc.nn.FLGConv2d(6, 8, 3, padding=1, partition=RAGGED)
    if freeze:
        layer.freeze_structure()
    counted = gc.count(layer, (6, 2, 2))
    assert (counted.parameters, counted.dense_parameters) == (14 * 9 + 8, 48 * 9 + 8)
    assert (counted.multiply_adds, counted.dense_multiply_adds) == (14 * 36, 48 * 36)
    converted = gc.count(gc.nn.convert(layer), (6, 2, 2))
    assert (converted.parameters, converted.multiply_adds) == (14 * 9 + 8, 14 * 36)


def test_groups_that_nothing_says_are_not_guessed() -> None:
    counted = gc.count(gc.nn.FLGConv2d(6, 8, 1, groups=2, device="meta"), (6, 2, 2))
    assert counted.dense_multiply_adds == 48 * 4
    with pytest.raises(ValueError, match="FLGConv2d, learns its groups, and on the meta device"):
        _ = counted.multiply_adds
    with pytest.raises(ValueError, match="ask for the dense numbers"):
        _ = counted.parameters


class Functions(nn.Module):
    """Convolutions that are no layers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Parameter(torch.randn(8, 3, 3, 3))
        self.packed = nn.Parameter(torch.randn(16, 1, 1))
        self.head = nn.Parameter(torch.randn(10, 8))
        self.partition = gc.Partition.contiguous(8, 8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = functional.conv2d(x, self.stem)
        x = gc.conv2d(x, self.packed, partition=self.partition)
        return functional.linear(x.mean((2, 3)), self.head)


def test_functions_are_counted_where_they_are_called() -> None:
    counted = gc.count(nn.Sequential(Functions()), 10)
    assert counted.parameters == 216 + 16 + 80
    assert counted.of("convolution").multiply_adds == (216 + 16) * 64
    assert counted.of("linear").multiply_adds == 80
    assert {layer.name for layer in counted.of("linear").layers} == {"0(linear)"}


def test_a_layer_called_twice_works_twice() -> None:
    layer = nn.Conv2d(3, 3, 1, bias=False)
    counted = gc.count(nn.Sequential(layer, layer), 2)
    assert counted.parameters == 9
    assert counted.multiply_adds == 2 * 9 * 4


def test_the_model_is_left_as_it_was() -> None:
    model = gc.models.create("igc_l24m2", depth=8)
    model.features[0].eval()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    gc.count(model, 32)
    assert [module.training for module in model.modules()] == modes
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    for key, value in model.state_dict().items():
        assert torch.equal(value, state[key])
    model(torch.randn(2, 3, 8, 8)).sum().backward()


class Undecided(nn.Module):
    """Looks at its values."""

    def __init__(self) -> None:
        super().__init__()
        self.part = nn.Linear(3, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.part(x.mean((2, 3))) if x.sum() > 0 else x


def test_refuses_what_cannot_be_run_without_data() -> None:
    model = nn.Sequential(Undecided())
    with pytest.raises(ValueError, match=r"Sequential cannot be counted on .*failed in '0'"):
        gc.count(model, 8)
    assert not model[0].part._forward_hooks


def test_refuses_an_operation_whose_groups_cannot_be_seen() -> None:
    class Chained(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            partition = gc.Partition.contiguous(4, 4, 2)
            weights = [torch.ones(8, 1, 1)] * 2
            return gc.chain(x, weights, partitions=[partition] * 2)

    with pytest.raises(ValueError, match="calls the operation chain outside of a layer"):
        gc.count(Chained(), (4, 4, 4))


@pytest.mark.parametrize("size", [0, (3, 4, -1), (), "224", (2.0, 2.0)])
def test_refuses_sizes(size: object) -> None:
    with pytest.raises(ValueError, match="expected a side"):
        gc.count(nn.Conv2d(3, 3, 1), size)


def test_refuses_what_is_no_model_and_images_too_small() -> None:
    with pytest.raises(TypeError, match=r"expected an nn\.Module"):
        gc.count("resnet50", 224)
    with pytest.raises(ValueError, match="expected at least 32 × 32"):
        gc.count(gc.models.create("igcv3", device="meta"), 16)
