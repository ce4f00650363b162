"""Layers in the place of convolutions, by a rule."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from groupconv_ext import Partition
from groupconv_ext.nn import (
    CondenseConv2d,
    DGConv2d,
    FLGConv1d,
    FLGConv2d,
    PartitionedConv2d,
    convert,
    replace,
)


def network() -> nn.Sequential:
    shared = nn.Conv2d(8, 8, 1)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.Sequential(shared, nn.BatchNorm2d(8)),
        shared,
        nn.Conv2d(8, 4, 1, stride=2, bias=False),
    )


def pointwise(name: str, conv: nn.Conv2d) -> nn.Module | None:
    return FLGConv2d.from_conv2d(conv, groups=2) if conv.kernel_size == (1, 1) else None


def test_a_rule_chooses_what_is_replaced() -> None:
    model = network().eval()
    asked = []

    def rule(name: str, conv: nn.Module) -> nn.Module | None:
        asked.append(name)
        return pointwise(name, conv)

    dense = model[3].weight
    assert replace(model, rule) is model
    assert asked == ["0", "1.0", "3"]
    assert type(model[0]) is nn.Conv2d
    assert isinstance(model[1][0], FLGConv2d)
    assert model[1][0] is model[2]
    assert not model[2].training
    assert model[3].stride == (2, 2)
    assert model[3].bias is None
    assert torch.equal(model[3].weight, dense)
    assert model(torch.randn(2, 3, 6, 6)).shape == (2, 4, 3, 3)


def test_a_network_replaced_learns_and_converts() -> None:
    model = replace(network(), pointwise)
    x = torch.randn(2, 3, 6, 6)
    model(x).square().sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    model.eval()
    expected = model(x)
    torch.testing.assert_close(convert(model)(x), expected)
    assert isinstance(model[3], PartitionedConv2d)


def test_a_convolution_alone_is_replaced() -> None:
    layer = replace(nn.Conv1d(4, 6, 3, padding=1), lambda _, conv: FLGConv1d.from_conv1d(conv))
    assert isinstance(layer, FLGConv1d)
    assert layer(torch.randn(2, 4, 5)).shape == (2, 6, 5)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize(
    "make",
    [
        lambda conv: FLGConv2d.from_conv2d(conv, partition=Partition.contiguous(4, 6, 2)),
        lambda conv: DGConv2d.from_conv2d(conv, gates=[0]),
        lambda conv: CondenseConv2d.from_conv2d(conv, groups=2),
    ],
    ids=["FLGC", "DGConv", "condensing"],
)
def test_weights_are_those_of_the_convolution(make, groups: int) -> None:
    conv = nn.Conv2d(4, 6, 3, 2, 1, groups=groups, dtype=torch.float64, padding_mode="reflect")
    layer = make(conv)
    x = torch.randn(2, 4, 7, 7, dtype=torch.float64)
    weight = Partition.contiguous(4, 6, groups).unpack(conv.weight)
    if not isinstance(layer, CondenseConv2d):  # which has not forgotten anything yet
        weight = weight * layer.partition().mask(torch.float64)[:, :, None, None]
    padded = functional.pad(x, (1, 1, 1, 1), mode="reflect")
    torch.testing.assert_close(layer(x), functional.conv2d(padded, weight, conv.bias, 2))


def test_nothing_is_replaced_where_a_rule_fails() -> None:
    model = network()
    before = dict(model.named_modules())

    def wide(name: str, conv: nn.Module) -> nn.Module | None:
        return nn.Conv2d(8, 5, 1) if name == "3" else pointwise(name, conv)

    with pytest.raises(ValueError, match="out_channels = 5 for '3'; expected 4"):
        replace(model, wide)
    with pytest.raises(TypeError, match="returned 'FLGC' for '0'; expected a module or None"):
        replace(model, lambda name, conv: "FLGC")
    assert dict(model.named_modules()) == before


def test_refuses_what_is_no_network() -> None:
    with pytest.raises(TypeError, match=r"expected an nn\.Module"):
        replace("resnet50", pointwise)
