"""Weights of public layouts: plain networks under the usual names, the same outputs from ours."""

from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional

from groupconv_ext import models
from groupconv_ext.nn import CondenseConv2d


def randomise(network: nn.Module) -> nn.Module:
    """Statistics and scales as after training: none of them one or zero."""
    torch.manual_seed(1)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.2)
            module.running_var.uniform_(0.5, 1.5)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.2)
    return network.eval()


def shuffle(x: torch.Tensor, groups: int) -> torch.Tensor:
    return x.unflatten(1, (groups, -1)).transpose(1, 2).flatten(1, 2)


# ---- the public networks ------------------------------------------------------------------------


class Bottleneck(nn.Module):
    def __init__(self, ins: int, width: int, outs: int, stride: int, groups: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(ins, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, groups=groups, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, outs, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(outs)
        self.downsample = None
        if stride != 1 or ins != outs:
            conv = nn.Conv2d(ins, outs, 1, stride, bias=False)
            self.downsample = nn.Sequential(conv, nn.BatchNorm2d(outs))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.bn1(self.conv1(x)).relu()
        y = self.bn2(self.conv2(y)).relu()
        y = self.bn3(self.conv3(y))
        return (y + (x if self.downsample is None else self.downsample(x))).relu()


class ResNet(nn.Module):
    def __init__(self, width: int, groups: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        ins = 64
        for stage, repeats in enumerate((1, 1, 1, 1)):
            blocks = []
            for block in range(repeats):
                stride = 2 if stage and not block else 1
                outs = 256 << stage
                blocks.append(Bottleneck(ins, width << stage, outs, stride, groups))
                ins = outs
            self.add_module(f"layer{stage + 1}", nn.Sequential(*blocks))
        self.fc = nn.Linear(ins, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = functional.max_pool2d(self.bn1(self.conv1(x)).relu(), 3, 2, 1)
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(x.mean((2, 3)))


class InvertedResidual(nn.Module):
    def __init__(self, ins: int, outs: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = ins * expansion

        def layers(*conv) -> nn.Sequential:
            *sizes, groups = conv
            made = nn.Conv2d(*sizes, sizes[2] // 2, groups=groups, bias=False)
            return nn.Sequential(made, nn.BatchNorm2d(sizes[1]), nn.ReLU6())

        first = [layers(ins, hidden, 1, 1, 1)] if expansion != 1 else []
        last = [nn.Conv2d(hidden, outs, 1, bias=False), nn.BatchNorm2d(outs)]
        self.conv = nn.Sequential(*first, layers(hidden, hidden, 3, stride, hidden), *last)
        self.skips = stride == 1 and ins == outs

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.conv(x) if self.skips else self.conv(x)


def mobilenet_v2() -> nn.Module:
    def first(ins: int, outs: int, kernel: int, stride: int) -> nn.Module:
        conv = nn.Conv2d(ins, outs, kernel, stride, kernel // 2, bias=False)
        return nn.Sequential(conv, nn.BatchNorm2d(outs), nn.ReLU6())

    layers = [first(3, 16, 3, 2)]
    ins = 16
    for expansion, outs, repeats, stride in models.mobilenet.INVERTED_RESIDUALS:
        outs = models.mobilenet.scaled(outs, 0.5)
        for block in range(repeats):
            layers.append(InvertedResidual(ins, outs, 1 if block else stride, expansion))
            ins = outs
    layers.append(first(ins, 1280, 1, 1))
    pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
    head = nn.Sequential(nn.Dropout(), nn.Linear(1280, 10))
    names = OrderedDict(features=nn.Sequential(*layers), pool=pool, classifier=head)
    return nn.Sequential(names)


class WideBlock(nn.Module):
    def __init__(self, ins: int, outs: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(ins)
        self.conv1 = nn.Conv2d(ins, outs, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outs)
        self.conv2 = nn.Conv2d(outs, outs, 3, 1, 1, bias=False)
        self.convShortcut = None if ins == outs else nn.Conv2d(ins, outs, 1, stride, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.bn1(x).relu()
        beside = x if self.convShortcut is None else self.convShortcut(y)
        return self.conv2(self.bn2(self.conv1(y)).relu()) + beside


def wide_resnet() -> nn.Module:
    layers = OrderedDict(conv1=nn.Conv2d(3, 16, 3, 1, 1, bias=False))
    ins = 16
    for stage in range(3):
        layers[f"block{stage + 1}"] = WideBlock(ins, 32 << stage, 2 if stage else 1)
        ins = 32 << stage
    layers["bn1"] = nn.BatchNorm2d(ins)
    layers["relu"] = nn.ReLU()
    layers["pool"] = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
    layers["fc"] = nn.Linear(ins, 10)
    return nn.Sequential(layers)


class ShuffleUnit(nn.Module):
    """With the shuffle behind the first normalisation, or behind the second."""

    def __init__(
        self, ins: int, outs: int, stride: int, first: int, groups: int, late: bool
    ) -> None:
        super().__init__()
        inside = outs // 4
        written = outs - ins if stride == 2 else outs
        self.g_conv_1x1_compress = nn.Conv2d(ins, inside, 1, groups=first, bias=False)
        self.bn_compress = nn.BatchNorm2d(inside)
        self.depthwise_conv3x3 = nn.Conv2d(inside, inside, 3, stride, 1, groups=inside, bias=False)
        self.bn_after_depthwise = nn.BatchNorm2d(inside)
        self.g_conv_1x1_expand = nn.Conv2d(inside, written, 1, groups=groups, bias=False)
        self.bn_expand = nn.BatchNorm2d(written)
        self.stride, self.first, self.late = stride, first, late

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.bn_compress(self.g_conv_1x1_compress(x)).relu()
        y = y if self.late else shuffle(y, self.first)
        y = self.bn_after_depthwise(self.depthwise_conv3x3(y))
        y = shuffle(y, self.first) if self.late else y
        y = self.bn_expand(self.g_conv_1x1_expand(y))
        if self.stride == 2:
            return torch.cat((functional.avg_pool2d(x, 3, 2, 1), y), 1).relu()
        return (x + y).relu()


def shufflenet(late: bool) -> nn.Module:
    conv = nn.Sequential(nn.Conv2d(3, 24, 3, 2, 1, bias=False), nn.BatchNorm2d(24), nn.ReLU())
    layers = OrderedDict(first_conv=conv, maxpool=nn.MaxPool2d(3, 2, 1))
    ins = 24
    for stage in range(3):
        outs = 240 << stage
        first = 1 if stage == 0 else 3
        layers[f"stage{stage + 2}"] = nn.Sequential(
            ShuffleUnit(ins, outs, 2, first, 3, late), ShuffleUnit(outs, outs, 1, 3, 3, late)
        )
        ins = outs
    layers["pool"] = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
    layers["classifier"] = nn.Linear(ins, 10, bias=False)
    return nn.Sequential(layers)


class Permutation(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return shuffle(x, 2)


class IGCV3Unit(nn.Module):
    def __init__(self, ins: int, outs: int, stride: int, expansion: int, skips: bool) -> None:
        super().__init__()
        hidden = ins * expansion
        self.conv = nn.Sequential(
            nn.Conv2d(ins, hidden, 1, groups=2, bias=False),
            nn.BatchNorm2d(hidden),
            Permutation(),
            nn.Conv2d(hidden, hidden, 3, stride, 1, groups=hidden, bias=False),
            nn.BatchNorm2d(hidden),
            nn.ReLU6(),
            nn.Conv2d(hidden, outs, 1, groups=2, bias=False),
            nn.BatchNorm2d(outs),
        )
        self.skips = skips

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.conv(x) if self.skips else self.conv(x)


def igcv3() -> nn.Module:
    def first(ins: int, outs: int, kernel: int, stride: int) -> nn.Module:
        conv = nn.Conv2d(ins, outs, kernel, stride, kernel // 2, bias=False)
        return nn.Sequential(conv, nn.BatchNorm2d(outs), nn.ReLU6())

    layers = [first(3, 16, 3, 2)]
    ins = 16
    for expansion, outs, _, stride in models.mobilenet.INVERTED_RESIDUALS:
        outs = models.mobilenet.scaled(outs, 0.5)
        layers.append(IGCV3Unit(ins, outs, stride, expansion, skips=False))
        layers.append(IGCV3Unit(outs, outs, 1, expansion, skips=True))
        ins = outs
    pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return nn.Sequential(*layers, first(ins, 640, 1, 1), pool, nn.Linear(640, 10))


class LearnedGroupConv(nn.Module):
    """CondenseNet's, while it trains: a mask, of which two stages of three are over."""

    def __init__(self, ins: int, outs: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(ins)
        self.conv = nn.Conv2d(ins, outs, 1, bias=False)
        self.register_buffer("_count", torch.tensor(ins // 2))
        self.register_buffer("_stage", torch.tensor(2))
        mask = torch.ones(4, ins)
        for row in mask:
            row[torch.randperm(ins)[: ins // 2]] = 0
        self.register_buffer("_mask", mask.repeat(outs // 4, 1)[:, :, None, None])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(x).relu()
        return functional.conv2d(x, self.conv.weight * self._mask)


class DenseLayer(nn.Module):
    def __init__(self, ins: int, growth: int) -> None:
        super().__init__()
        self.conv_1 = LearnedGroupConv(ins, 4 * growth)
        names = OrderedDict(
            norm=nn.BatchNorm2d(4 * growth),
            relu=nn.ReLU(),
            conv=nn.Conv2d(4 * growth, growth, 3, 1, 1, groups=4, bias=False),
        )
        self.conv_2 = nn.Sequential(names)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat((x, self.conv_2(self.conv_1(x))), 1)


def condensenet() -> nn.Module:
    layers = OrderedDict(init_conv=nn.Conv2d(3, 16, 3, 1, 1, bias=False))
    ins = 16
    for stage in range(3):
        if stage:
            layers[f"transition_{stage}"] = nn.AvgPool2d(2)
        blocks = OrderedDict()
        for layer in range(2):
            blocks[f"denselayer_{layer + 1}"] = DenseLayer(ins, 8 << stage)
            ins += 8 << stage
        layers[f"denseblock_{stage + 1}"] = nn.Sequential(blocks)
    layers["norm_last"] = nn.BatchNorm2d(ins)
    layers["relu_last"] = nn.ReLU()
    layers["pool_last"] = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
    names = OrderedDict(features=nn.Sequential(layers), classifier=nn.Linear(ins, 10))
    return nn.Sequential(names)


PUBLIC = {
    "ResNet50": (lambda: ResNet(64, 1), "resnet50", {"depth": 14}, {}),
    "ResNeXt50": (lambda: ResNet(128, 32), "resnext50", {"depth": 14}, {}),
    "MobileNetV2": (mobilenet_v2, "mobilenet_v2", {"width": 0.5}, {}),
    "WideResNet": (wide_resnet, "wide_resnet28", {"depth": 10, "width": 2}, {}),
    "ShuffleNet": (lambda: shufflenet(False), "shufflenet", {"repeats": (1, 1, 1)}, {}),
    "ShuffleNet, late": (
        lambda: shufflenet(True),
        "shufflenet",
        {"repeats": (1, 1, 1)},
        {"shuffled": "depthwise"},
    ),
    "IGCV3": (igcv3, "igcv3", {"width": 0.5, "repeats": (2,) * 7}, {}),
    "CondenseNet": (condensenet, "condensenet_cifar", {"depth": 14}, {}),
}


@pytest.mark.parametrize("family", PUBLIC)
def test_the_same_outputs_with_the_weights_of_a_public_network(family: str) -> None:
    make, name, options, loading = PUBLIC[family]
    torch.manual_seed(0)
    public = randomise(make())
    network = models.create(name, classes=10, **options).eval()
    models.load_public(network, public.state_dict(), **loading)
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = public(x)
        torch.testing.assert_close(network(x), expected, rtol=1e-3, atol=1e-4)
    assert expected.std() > 1e-3


def test_masks_are_kept() -> None:
    torch.manual_seed(0)
    public = condensenet()
    network = models.load_public(models.create("condensenet_cifar", depth=14), public.state_dict())
    layers = [m for m in network.features.modules() if isinstance(m, CondenseConv2d)]
    assert all(layer.stage == 2 for layer in layers)


def small() -> tuple[nn.Module, dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    network = models.create("wide_resnet28", depth=10, width=2)
    return network, dict(wide_resnet().state_dict())


@pytest.mark.parametrize("wrap", ["file", "state_dict", "module", "epoch"])
def test_checkpoints_are_opened(wrap: str, tmp_path: Path) -> None:
    network, state = small()
    source: object = state
    if wrap == "module":
        source = {f"module.{key}": value for key, value in state.items()}
    elif wrap == "state_dict":
        source = {"state_dict": state}
    elif wrap == "epoch":
        source = {"epoch": 3, "model": state, "optimizer": {"state": {}, "lr": 0.1}}
    if wrap == "file":
        torch.save(source, tmp_path / "weights.pt")
        source = tmp_path / "weights.pt"
    models.load_public(network, source)
    assert torch.equal(network.classifier.weight, state["fc.weight"])


def test_our_own_state_loads_as_well() -> None:
    network, _ = small()
    other = models.create("wide_resnet28", depth=10, width=2)
    state = {k: v for k, v in other.state_dict().items() if not k.endswith("_extra_state")}
    models.load_public(network, state)
    assert torch.equal(network.classifier.weight, other.classifier.weight)


def without(state: dict[str, torch.Tensor], *names: str) -> dict[str, torch.Tensor]:
    return {key: value for key, value in state.items() if key not in names}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (
            lambda s: dict(WideResNetOf(4).state_dict()),
            r"tensor 'block1\.conv1\.weight' has shape \[64, 16, 3, 3\]; expected \[32, 16, 3, 3\] "
            r"for 'features\.1\.first\.conv\.weight'",
        ),
        (
            lambda s: without(s, "fc.weight", "fc.bias"),
            r"nothing is left for 'classifier', a linear",
        ),
        (
            lambda s: s | {"more.weight": torch.ones(3, 3)},
            r"tensor 'more\.weight' has no counterpart: the network ends with 'classifier'",
        ),
        (
            lambda s: without(s, "block1.convShortcut.weight"),
            r"tensor 'block2\.bn1\.weight' belongs to a normalisation; expected a convolution for "
            r"'features\.1\.shortcut'",
        ),
        (lambda s: without(s, "bn1.running_var"), r"'bn1' has no 'running_var'"),
        (lambda s: without(s, "conv1.weight") | {"conv1.bias": torch.ones(16)}, r"no weight"),
        (
            lambda s: s | {"conv1.bias": torch.ones(16)},
            r"tensor 'conv1\.bias' has no counterpart in 'features\.0', a Conv2d without it",
        ),
        (lambda s: s | {"fc.scale": torch.ones(1)}, r"tensor 'fc\.scale' is none of"),
        (lambda s: {}, r"source is a dict with the keys \[\]; expected a state dict"),
        (lambda s: {"a": s, "b": s}, r"expected a state dict, or a checkpoint with exactly one"),
        (lambda s: 3, r"source is a int with no keys"),
    ],
)
def test_refuses_what_does_not_fit_and_copies_nothing(change, says: str) -> None:
    network, state = small()
    before = {key: value.clone() for key, value in network.state_dict().items()}
    with pytest.raises(ValueError, match=says):
        models.load_public(network, change(state))
    for key, value in network.state_dict().items():
        assert torch.equal(value, before[key])


def WideResNetOf(width: int) -> nn.Module:  # noqa: N802 (it stands for a class)
    layers = OrderedDict(conv1=nn.Conv2d(3, 16, 3, 1, 1, bias=False))
    layers["block1"] = WideBlock(16, 16 * width, 1)
    return nn.Sequential(layers)


def test_refuses_masks_that_differ_within_a_group() -> None:
    public = condensenet()
    network = models.create("condensenet_cifar", depth=14)
    key = "features.denseblock_1.denselayer_1.conv_1._mask"
    state = public.state_dict()
    torn = state[key].clone()
    torn[0] = 1 - torn[0]
    with pytest.raises(ValueError, match="differs within a group of 4"):
        models.load_public(network, state | {key: torn})
    with pytest.raises(ValueError, match=r"mask of .* has shape \[32, 8, 1, 1\]; expected"):
        models.load_public(network, state | {key: torn[:, :8]})
    assert all(m.stage == 0 for m in network.modules() if isinstance(m, CondenseConv2d))


def test_refuses_networks_without_a_public_layout_and_other_shuffles() -> None:
    network = models.create("igc_l24m2", depth=8)
    with pytest.raises(ValueError, match="InterleavedConv2d; no public layout has one"):
        models.load_public(network, network.state_dict())
    with pytest.raises(ValueError, match="shuffled is 'later'; expected one of"):
        models.load_public(*small(), shuffled="later")


def test_a_truncated_file_is_refused(tmp_path: Path) -> None:
    network, state = small()
    path = tmp_path / "weights.pt"
    torch.save(state, path)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(Exception, match=r"archive|central directory|zip"):
        models.load_public(network, path)
