"""Normalisations folded into convolutions: the same outputs, and what is left alone."""

import pytest
import torch
from torch import nn

import groupconv_ext as gc
from groupconv_ext.nn import (
    DepthwiseSeparableConv2d,
    FLGConv2d,
    IGCV2Conv2d,
    IGCV3Block,
    InterleavedConv2d,
    PartitionedConv1d,
    PartitionedConv2d,
    ShuffledConv2d,
    TwoLevelConv2d,
    convert,
    fold,
)

RAGGED = gc.Partition.random(12, 16, 3, seed=0, uneven=True)
LAYERS = {
    "torch": lambda b: nn.Conv2d(12, 16, 3, padding=1, bias=b),
    "torch, grouped": lambda b: nn.Conv2d(12, 16, 3, padding=1, groups=4, bias=b),
    "ragged": lambda b: PartitionedConv2d(12, 16, 3, padding=1, partition=RAGGED, bias=b),
    "shuffled": lambda b: ShuffledConv2d(12, 16, 3, padding=1, groups=4, bias=b),
    "two-level": lambda b: TwoLevelConv2d(12, 16, 3, padding=1, groups=4, bias=b),
    "IGC": lambda b: InterleavedConv2d(12, 16, 3, padding=1, primary_groups=4, bias=b),
    "IGCV2": lambda b: IGCV2Conv2d(12, 16, 3, padding=1, branch_channels=(4, 3), bias=b),
    "separable": lambda b: DepthwiseSeparableConv2d(12, 16, 3, padding=1, bias=b),
}


def trained(model: nn.Module) -> nn.Module:
    """In evaluation, its statistics and scales none that could be left out unseen."""
    torch.manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean.normal_()
            module.running_var.uniform_(0.3, 3)
            if module.affine:
                nn.init.uniform_(module.weight, -2, 2)
                nn.init.normal_(module.bias)
    return model.double().eval()


def norms(model: nn.Module) -> int:
    return sum(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules())


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("affine", [False, True])
def test_the_same_outputs(layer: str, bias: bool, affine: bool) -> None:
    model = trained(nn.Sequential(LAYERS[layer](bias), nn.BatchNorm2d(16, affine=affine)))
    x = torch.randn(2, 12, 5, 6, dtype=torch.float64)
    expected = model(x)
    assert fold(model) is model
    assert norms(model) == 0
    torch.testing.assert_close(model(x), expected)


@pytest.mark.parametrize("activation", [nn.ReLU, nn.ReLU6, nn.SiLU, nn.Hardswish])
def test_an_activation_is_fused(activation: type[nn.Module]) -> None:
    layer = PartitionedConv2d(12, 16, 1, partition=RAGGED)
    model = trained(nn.Sequential(layer, nn.BatchNorm2d(16), activation(), nn.ReLU()))
    x = torch.randn(2, 12, 5, 6, dtype=torch.float64)
    expected = model(x)
    fold(model)
    assert [type(m) for m in model] == [PartitionedConv2d, nn.ReLU]
    torch.testing.assert_close(model(x), expected)


def test_an_activation_stays_where_the_layer_has_none() -> None:
    model = trained(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU()))
    assert [type(m) for m in fold(model)] == [nn.Conv2d, nn.ReLU]


def test_sound_folds_as_well() -> None:
    model = trained(nn.Sequential(PartitionedConv1d(12, 16, 3, groups=4), nn.BatchNorm1d(16)))
    x = torch.randn(2, 12, 9, dtype=torch.float64)
    expected = model(x)
    torch.testing.assert_close(fold(model)(x), expected)
    assert norms(model) == 0


def test_a_block_folds() -> None:
    block = trained(IGCV3Block(12, 12, expansion=2))
    x = torch.randn(2, 12, 5, 6, dtype=torch.float64)
    expected = block(x)
    assert block.skip
    torch.testing.assert_close(fold(block)(x), expected)
    assert norms(block) == 0
    assert block.depthwise.activation == "relu6"


@pytest.mark.parametrize("name", ["igcv3", "shufflenet", "flgc_mobilenet_v2", "igcv2_cifar"])
def test_networks_fold_once_and_for_all(name: str) -> None:
    torch.manual_seed(0)
    options = {"igcv3": {"width": 0.25}, "shufflenet": {"width": 0.25}}.get(name, {})
    network = trained(gc.models.create(name, **options))
    convert(network)
    x = torch.randn(1, 3, 32, 32, dtype=torch.float64)
    expected = network(x)
    fold(network)
    assert norms(network) == 0
    torch.testing.assert_close(network(x), expected)
    state = network.state_dict()
    fold(network)
    assert network.state_dict().keys() == state.keys()
    torch.testing.assert_close(network(x), expected)


def test_a_shortcut_is_added_by_the_last_convolution() -> None:
    options = {"depth": 14, "classes": 4, "groups": 4}
    network = trained(gc.models.create("sgc_resnet50", **options))
    x = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    expected = network(x)
    fold(network)
    blocks = [m for m in network.modules() if isinstance(m, gc.models.blocks.Residual)]
    assert all(block.last.activation == "relu" for block in blocks)
    torch.testing.assert_close(network(x), expected)
    plain = trained(gc.models.create("resnet50", depth=14, classes=4))
    expected = plain(x)
    torch.testing.assert_close(fold(plain)(x), expected)  # torch's convolutions add nothing


def joined_unit() -> nn.Module:
    """The first unit of a ShuffleNet, which joins a pool of its input and its body."""
    network = gc.models.create("shufflenet", width=0.25, repeats=(0, 0, 0), classes=4)
    return next(m for m in network.modules() if type(m).__name__ == "_Joined")


def test_a_joined_pool_becomes_a_convolution_and_the_relu_part_of_both() -> None:
    unit = trained(joined_unit())
    x = torch.randn(2, 24, 9, 6, dtype=torch.float64)  # of both signs, odd and even
    expected = unit(x)
    fold(unit)
    assert isinstance(unit.pool, PartitionedConv2d)
    assert [type(m) for m in unit.modules()].count(nn.ReLU) == 0
    torch.testing.assert_close(unit(x), expected)
    pool = unit.pool
    assert fold(unit).pool is pool


def test_a_joined_unit_stays_where_a_norm_stays_at_its_end() -> None:
    unit = trained(joined_unit())
    last = unit.body[-1]
    last.conv = FLGConv2d(last.conv.in_channels, last.conv.out_channels, 1, groups=3, bias=False)
    unit = unit.double().eval()  # it still learns, so its normalisation is not folded
    x = torch.randn(2, 24, 8, 8, dtype=torch.float64)
    expected = unit(x)
    fold(unit)
    assert isinstance(unit.pool, nn.AvgPool2d)
    assert isinstance(unit.activation, nn.ReLU)
    torch.testing.assert_close(unit(x), expected)


def test_pre_activation_norms_stay() -> None:
    network = trained(gc.models.create("wide_resnet28", depth=10, width=1))
    before = norms(network)
    x = torch.randn(1, 3, 8, 8, dtype=torch.float64)
    expected = network(x)
    assert norms(fold(network)) == before
    torch.testing.assert_close(network(x), expected)


def test_layers_that_learn_and_layers_in_two_places_stay() -> None:
    learning = trained(nn.Sequential(FLGConv2d(4, 4, 1, groups=2), nn.BatchNorm2d(4)))
    assert norms(fold(learning)) == 1
    conv, norm = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
    shared = trained(nn.Sequential(conv, norm, nn.Sequential(conv, nn.BatchNorm2d(4))))
    x = torch.randn(1, 4, 3, 3, dtype=torch.float64)
    expected = shared(x)
    assert norms(fold(shared)) == 2
    torch.testing.assert_close(shared(x), expected)


def test_refuses_batch_statistics_and_changes_nothing() -> None:
    first = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))
    second = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4, track_running_stats=False))
    model = nn.Sequential(first, second)
    with pytest.raises(ValueError, match=r"eval\(\) mode"):
        fold(model)
    with pytest.raises(ValueError, match="running statistics"):
        fold(model.eval())
    assert norms(model) == 2
    assert len(first) == 2
    with pytest.raises(TypeError, match=r"expected an nn\.Module"):
        fold("resnet50")
