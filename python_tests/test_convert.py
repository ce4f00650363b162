"""convert, parameter_groups, structure: what a learned network becomes, and is on the way."""

import copy

import pytest
import torch
from torch import nn

from groupconv_ext import Partition
from groupconv_ext.nn import (
    CondenseConv2d,
    DGConv2d,
    FLGConv1d,
    FLGConv2d,
    GroupedLayer,
    IGCV2Conv2d,
    InterleavedConv2d,
    PartitionedConv2d,
    TwoLevelConv2d,
    convert,
    name_layers,
    parameter_groups,
    structure,
)

DOUBLE = {"dtype": torch.float64}


def network() -> nn.Sequential:
    model = nn.Sequential(
        FLGConv2d(12, 16, 1, groups=4, **DOUBLE),
        nn.BatchNorm2d(16, **DOUBLE),
        nn.Sequential(nn.ReLU(), DGConv2d(16, 16, 3, padding=1, gates=[1, 0, 0, 1], **DOUBLE)),
        CondenseConv2d(16, 8, 1, groups=2, padding_mode="zeros", **DOUBLE),
        TwoLevelConv2d(8, 8, 3, padding=1, groups=2, **DOUBLE),
        InterleavedConv2d(8, 8, 3, padding=1, primary_groups=4, **DOUBLE),
        IGCV2Conv2d(8, 8, 3, padding=1, branch_channels=2, **DOUBLE),
    )
    model[3].condense(1)
    return model


@pytest.mark.parametrize("freeze", [True, False])
def test_converted_computes_the_same_with_less(freeze: bool) -> None:
    model = network()
    x = torch.randn(2, 12, 6, 5, **DOUBLE)
    model(x)  # statistics of a training step
    if freeze:
        for layer in model.modules():
            if isinstance(layer, GroupedLayer):
                layer.freeze_structure()
    model.eval()
    expected, before = model(x), structure(model)
    parameters = sum(p.numel() for p in model.parameters())
    learned = [model[0], model[2][1], model[3]]
    connections = sum(layer.partition().entries * layer.weight[0, 0].numel() for layer in learned)
    dense = sum(p.numel() for layer in learned for p in layer.parameters())
    biases = sum(layer.bias.numel() for layer in learned)
    converted = convert(model)
    assert converted is model
    torch.testing.assert_close(converted(x), expected)
    assert structure(converted) == before
    assert not any(isinstance(layer, GroupedLayer) for layer in converted.modules())
    left = sum(p.numel() for p in converted.parameters())
    assert left == parameters - dense + connections + biases
    assert not any(layer.training for layer in converted.modules())


def test_converting_twice_changes_nothing() -> None:
    model = convert(network())
    layers = list(model.modules())
    state = copy.deepcopy(model.state_dict())
    assert convert(model) is model
    assert all(a is b for a, b in zip(layers, model.modules(), strict=True))
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name])


def test_what_does_not_learn_goes_on_so() -> None:
    model = network().requires_grad_(False)
    model[2][1].weight.requires_grad_()
    convert(model)
    assert [name for name, p in model.named_parameters() if p.requires_grad] == ["2.1.weight"]
    conv = nn.Conv2d(4, 4, 1)
    conv.bias.requires_grad_(False)
    for layer in (FLGConv2d.from_conv2d(conv, groups=2), PartitionedConv2d.from_conv2d(conv)):
        assert layer.weight.requires_grad
        assert not layer.bias.requires_grad


def test_a_layer_alone_and_one_in_two_places() -> None:
    alone = convert(FLGConv2d(8, 8, 1, groups=2))
    assert isinstance(alone, PartitionedConv2d)
    one = convert(FLGConv1d(8, 8, 3, groups=2, padding=1))
    assert one(torch.zeros(1, 8, 5)).shape == (1, 8, 5)
    shared = FLGConv2d(8, 8, 1, groups=2)
    model = nn.ModuleDict({"a": shared, "b": nn.Sequential(shared, shared)})
    convert(model)
    assert isinstance(model["a"], PartitionedConv2d)
    assert model["a"] is model["b"][0] is model["b"][1]


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_logits_that_are_no_numbers_are_refused_and_nothing_is_replaced(value: float) -> None:
    model = network()
    with torch.no_grad():
        model[0].input_logits[3, 1] = value
    layers = list(model.modules())
    with pytest.raises(ValueError, match="layer '0' cannot be converted"):
        convert(model)
    assert all(a is b for a, b in zip(layers, model.modules(), strict=True))
    with pytest.raises(TypeError, match="model is 3"):
        convert(3)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", [name_layers, lambda model: parameter_groups(model, 0.0)])
@pytest.mark.parametrize("compiled", [False, True])
def test_a_layer_that_diverges_in_training_is_named(name: object, compiled: bool) -> None:
    model = network()
    name(model)
    run = torch.compile(model, backend="aot_eager", fullgraph=True) if compiled else model
    x = torch.randn(2, 12, 6, 5, **DOUBLE)
    with torch.no_grad():
        model[2][1].gates[1] = torch.nan
    with pytest.raises(
        (ValueError, RuntimeError), match=r"layer '2\.1', DGConv2d\(16, 16\)\.gates has "
    ):
        run(x)
    with torch.no_grad():
        model[2][1].gates[1] = 1
        model[3].weight[0, 0] = torch.inf
    model[3] = CondenseConv2d(16, 8, 1, groups=2, **DOUBLE)
    name_layers(model)
    nn.init.constant_(model[3].weight, torch.inf)
    with pytest.raises(ValueError, match=r"layer '3', CondenseConv2d\(16, 8, groups=2\)\.weight"):
        model[3].condense(1)


def test_parameter_groups_keep_decay_off_the_structure() -> None:
    model = network()
    decayed, kept = parameter_groups(model, 0.1)
    assert decayed["weight_decay"] == 0.1
    assert kept["weight_decay"] == 0
    expected = {id(p) for p in (model[0].input_logits, model[0].output_logits, model[2][1].gates)}
    assert {id(p) for p in kept["params"]} == expected
    everything = {id(p) for p in model.parameters()}
    assert {id(p) for p in decayed["params"]} == everything - expected
    (one,) = parameter_groups(model, 0.1, decay_structure=True)
    assert {id(p) for p in one["params"]} == everything
    (plain,) = parameter_groups(nn.Linear(2, 2), 0.0)
    assert len(plain["params"]) == 2
    with pytest.raises(ValueError, match="weight_decay is -1"):
        parameter_groups(model, -1)


def test_structure_names_every_partition() -> None:
    found = structure(network())
    assert list(found) == [
        "0", "2.1", "3", "4", "5.primary", "5.secondary", "6.depthwise", "6.stages.0",
        "6.stages.1", "6.stages.2",
    ]  # fmt: skip
    assert found["2.1"] == Partition.kronecker([1, 0, 0, 1], 16, 16)
    assert structure(nn.Conv2d(3, 3, 1)) == {}
    p = Partition.contiguous(4, 4, 2)
    assert structure(PartitionedConv2d(4, 4, 1, partition=p)) == {"": p}
