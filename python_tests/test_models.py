"""Every network of the registry: built, trained a step, converted, saved, compiled."""

import copy
from typing import Any

import pytest
import torch
from torch import nn

from groupconv_ext import count, models
from groupconv_ext.nn import DGConv2d, GroupedLayer, convert, name_layers

# What makes a network small enough to train a step in a test; the rest are its own options.
SMALL: dict[str, dict[str, Any]] = {
    "resnet50": {"depth": 14},
    "resnet101": {"depth": 14, "classes": 5},
    "flgc_resnet50": {"depth": 14, "classes": 10},
    "sgc_resnet50": {"depth": 14, "classes": 10},
    "resnet18": {"width": 16},
    "resnext50": {"depth": 14, "width": 64},
    "resnext101": {"depth": 26, "width": 64, "groups": 8},
    "groupable_resnext50": {"depth": 14, "width": 64},
    "groupable_resnext101": {"depth": 26, "width": 32},
    "wide_resnet28": {"width": 2, "depth": 10},
    "wide_resnet34": {"width": 1, "convolution": "gc2l", "groups": 4},
    "mobilenet_v1": {"width": 0.25, "convolution": "flgc", "groups": 3},
    "mobilenet_v2": {"width": 0.5, "convolution": "gc2l", "groups": 4},
    "condensenet74": {"stages": (2, 2, 1, 1, 1), "classes": 16},
    "sgc_condensenet74": {"stages": (2, 2, 1, 1, 1), "classes": 16},
    "flgc_condensenet74": {"stages": (2, 2, 1, 1, 1), "classes": 16},
    "condensenet_cifar": {"depth": 14},
    "flgc_mobilenet_v2": {"width": 0.5},
    "regconv": {"depth": 8},
    "sum_fusion": {"depth": 8},
    "igcnet": {"depth": 8},
    "igc_l4m8": {"depth": 8},
    "igc_l24m2": {"depth": 11},
    "xception_cifar": {"width": 16, "depth": 8},
    "igcv1_cifar": {"width": 16, "depth": 8},
    "igcv2_cifar": {"depth": 8},
    "igc_resnet18_l100m2": {"primary": 20, "stem_channels": 20},
    "igc_l16m32": {"primary": 4, "secondary": 8, "depth": 8},
    "igc_l450m2": {"primary": 45, "depth": 8},
    "igc_l32m26": {"primary": 8, "secondary": 4, "depth": 8, "identity": True},
    "igc_resnet18": {"primary": 4, "secondary": 4},
    "igc_resnet18_l4m32": {"secondary": 4},
    "igc_resnet18_l16m16": {"secondary": 2},
    "igcv2_star": {"width": 64, "depth": 8},
    "igcv2": {"width": 0.25},
    "igcv3": {"width": 0.5, "repeats": (1, 2, 1, 2, 1, 2, 1)},
    "shufflenet": {"repeats": (1, 2, 1)},
}
FAMILIES = {
    "ResNet": ("flgc_resnet50", {"depth": 14, "classes": 10}),
    "ResNeXt": ("groupable_resnext50", {"depth": 14, "width": 32}),
    "WideResNet": ("wide_resnet28", {"width": 2, "depth": 10, "convolution": "gc2l", "groups": 4}),
    "MobileNet": ("mobilenet_v2", {"width": 0.25, "convolution": "shuffle", "groups": 4}),
    "CondenseNet": ("condensenet_cifar", {"depth": 8}),
    "IGC": ("igc_l24m2", {"depth": 8, "identity": True}),
    "IGCV2": ("igcv2_cifar", {"depth": 8}),
    "IGCV3": ("igcv3", {"width": 0.25, "repeats": (1,) * 7}),
    "ShuffleNet": ("shufflenet", {"groups": 8, "width": 0.25, "repeats": (1, 1, 1)}),
}
NAMES = tuple(models.list())


def small(name: str) -> nn.Module:
    torch.manual_seed(0)
    return models.create(name, **SMALL.get(name, {}))


def image(network: nn.Module, batch: int = 2) -> torch.Tensor:
    side = max(8, network.smallest_input)
    return torch.randn(batch, 3, side, side)


@pytest.fixture(params=NAMES)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


def test_every_name_has_a_line(name: str) -> None:
    assert models.list()[name]
    assert "classes" in models.entry(name).options()


def test_builds_in_full_on_the_meta_device(name: str) -> None:
    network = models.create(name, device="meta")
    assert all(parameter.is_meta for parameter in network.parameters())
    counted = count(network, models.entry(name).input_size)
    assert counted.dense_parameters == sum(
        parameter.numel()
        for parameter_name, parameter in network.named_parameters()
        if not parameter_name.endswith(("logits", "gates"))
    )
    assert counted.dense_multiply_adds > counted.of("convolution").dense_multiply_adds // 2 > 0


def test_learns_converts_and_keeps_its_state(name: str) -> None:
    network = small(name)
    x = image(network)
    network(x).square().mean().backward()
    without = [key for key, value in network.named_parameters() if value.grad is None]
    assert not without
    with torch.no_grad():
        for parameter in network.parameters():
            assert parameter.grad is not None
            parameter -= 1e-3 * parameter.grad
    network.eval()
    models.condense(network)
    with torch.no_grad():
        expected = network(x)

    again = small(name)
    again.load_state_dict(network.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(again.eval()(x), expected)

    counted = count(network, x.shape[1:])
    converted = convert(network)
    assert not any(isinstance(layer, GroupedLayer) for layer in converted.modules())
    assert sum(p.numel() for p in converted.parameters()) == counted.parameters
    assert count(converted, x.shape[1:]).multiply_adds == counted.multiply_adds
    with torch.no_grad():
        torch.testing.assert_close(converted(x), expected, rtol=1e-3, atol=1e-4)
        fresh = copy.deepcopy(converted)
        for parameter in fresh.parameters():
            parameter.zero_()
        fresh.load_state_dict(converted.state_dict())
        torch.testing.assert_close(fresh(x), converted(x))


@pytest.mark.parametrize("family", FAMILIES)
def test_compiles_into_one_graph(family: str) -> None:
    torch._dynamo.reset()
    name, options = FAMILIES[family]
    torch.manual_seed(0)
    network = models.create(name, **options).eval()
    x = image(network)
    compiled = torch.compile(network, backend="eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), network(x))


@pytest.mark.parametrize("kind", models.convolutions.KINDS)
def test_wide_resnet_with_every_kind_of_convolution(kind: str) -> None:
    groups = 1 if kind in ("sc", "dgconv") else 4
    network = models.create("wide_resnet28", width=1, depth=10, convolution=kind, groups=groups)
    network(torch.randn(2, 3, 8, 8)).sum().backward()
    assert all(parameter.grad is not None for parameter in network.parameters())


def test_learned_numbers_of_groups_make_a_resnext() -> None:
    learner = models.create("groupable_resnext50", width=32, classes=4)
    groups = models.learned_groups(learner)
    assert len(groups) == 16
    assert len(set(groups)) > 1
    network = models.create("resnext50", width=32, classes=4, groups=groups)
    found = [
        layer.partition.groups
        for name, layer in network.named_modules()
        if name.endswith("body.1.conv")
    ]
    assert found == groups


def test_gates_are_given_by_width() -> None:
    def gates(channels: int) -> list[int]:
        bits = channels.bit_length() - 1
        return [0] * 5 + [1] * (bits - 5)

    network = models.create("groupable_resnext50", gates=gates)
    layers = [layer for layer in network.modules() if isinstance(layer, DGConv2d)]
    assert {layer.partition().groups for layer in layers} == {32}


def test_options_are_told() -> None:
    options = models.entry("flgc_resnet50").options()
    assert options["groups"] == 4
    assert options["convolution"] == "flgc"


def test_dtype_and_device() -> None:
    network = models.create("shufflenet", device="meta", dtype=torch.bfloat16)
    parameter = next(network.parameters())
    assert parameter.is_meta
    assert parameter.dtype == torch.bfloat16


# ---- bad input ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        ("flgc_resnet5", {}, r"no model 'flgc_resnet5'; did you mean 'flgc_resnet50'"),
        ("quite another", {}, r"no model 'quite another'; expected one of"),
        ("igcv3", {"widht": 1.0}, r"option of 'igcv3' 'widht'; did you mean 'width'"),
        ("igcv3", {"width": 0}, r"model 'igcv3' with \{'width': 0\}: width is 0"),
        ("igcv3", {"groups": 5}, r"groups = 5 does not divide in_channels = 32"),
        ("mobilenet_v2", {"convolution": "flcg"}, r"no convolution 'flcg'; did you mean 'flgc'"),
        ("mobilenet_v2", {"groups": 2}, r"groups is 2; standard convolution takes no number"),
        ("mobilenet_v2", {"strides": (1, 2)}, r"strides has 2 entries; expected one for each of 7"),
        ("shufflenet", {"groups": 5}, r"groups is 5; expected one of \(1, 2, 3, 4, 8\)"),
        ("resnet50", {"depth": 52}, r"depth is 52; expected one of \(14, 26, 50, 101\)"),
        ("resnext50", {"groups": [4, 8]}, r"groups has 2 entries; expected one for each of 16"),
        ("resnext50", {"groups": "many"}, r"groups is 'many'; expected a number, a list"),
        ("wide_resnet28", {"depth": 27}, r"depth is 27; expected 6 n \+ 4"),
        ("condensenet_cifar", {"depth": 51}, r"depth is 51; expected 6 n \+ 2"),
        ("igcnet", {"depth": 21}, r"depth is 21; expected 3 B \+ 2"),
        ("igcnet", {"depth": 11, "identity": True}, r"3 blocks; expected an even number"),
        ("igcv1_cifar", {"width": 7}, r"width is 7; expected an even number"),
        ("igcv2_cifar", {"branches": (8,)}, r"branches has 1 entries; expected K for each of 3"),
        ("igcv2_cifar", {"branches": (7, 7, 7)}, r"branch_channels = 7 does not divide"),
        ("igc_resnet18", {"doubles": "both"}, r"doubles is 'both'; expected 'primary' or"),
    ],
)
def test_refuses(name: str, options: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        models.create(name, device="meta", **options)


def test_refuses_values_of_another_kind() -> None:
    with pytest.raises(TypeError, match=r"model 'igcv3' with \{'groups': '2'\}: groups must be"):
        models.create("igcv3", groups="2")


def test_refuses_images_that_its_strides_swallow() -> None:
    network = models.create("shufflenet", groups=1).eval()
    with pytest.raises(ValueError, match=r"images of 31 × 40; expected at least 32 × 32"):
        network(torch.randn(1, 3, 31, 40))
    with pytest.raises(ValueError, match=r"x has shape \[3, 64, 64\]; expected images"):
        network(torch.randn(3, 64, 64))


def test_refuses_the_state_of_another_width() -> None:
    narrow, wide = (models.create("wide_resnet28", depth=10, width=w) for w in (1, 2))
    with pytest.raises(RuntimeError, match="size mismatch"):
        wide.load_state_dict(narrow.state_dict())


def test_learned_groups_need_a_groupable_network() -> None:
    with pytest.raises(ValueError, match="no DGConv2d"):
        models.learned_groups(models.create("resnext50", device="meta"))


def test_errors_name_the_layer_of_a_network() -> None:
    network = models.create("mobilenet_v1", width=0.25, convolution="flgc", groups=2)
    name_layers(network)
    layer = next(m for m in network.modules() if isinstance(m, GroupedLayer))
    layer.input_logits.data.fill_(torch.nan)
    with pytest.raises(ValueError, match=r"features\.1\.1\.conv.*nan"):
        network(torch.randn(1, 3, 32, 32))
