"""The whole-network benchmark: its plain networks are the same functions, its tables are whole."""

import importlib
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

import groupconv_ext as gc

FOLDER = Path(__file__).parents[1] / "benches"

TINY = {
    "FLGC": ("flgc_resnet50", {"depth": 14, "classes": 4, "groups": 8}),
    "MobileNet": ("mobilenet_v2", {"width": 0.25, "convolution": "shuffle", "groups": 4}),
    "CondenseNet": ("condensenet_cifar", {"depth": 14}),
    "ShuffleNet": ("shufflenet", {"width": 0.25, "repeats": (1, 1, 1)}),
    "IGCV2": ("igcv2", {"width": 0.25}),
    "IGCV3": ("igcv3", {"width": 0.5, "repeats": (2,) * 7}),
    "G-ResNeXt": ("groupable_resnext50", {"depth": 14, "width": 32}),
    "GC-2L": ("wide_resnet28", {"depth": 10, "width": 1, "convolution": "gc2l", "groups": 4}),
    "IGC": ("igc_l24m2", {"depth": 8, "identity": True}),
    "IGCV2*": ("igcv2_star", {"width": 64, "depth": 8}),
    "Xception": ("xception_cifar", {"width": 16, "depth": 8}),
}


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module


def network(load: Any, name: str) -> Any:
    model, options = TINY[name]
    return load("networks").Network(model, options, 64, "regconv", {"width": 4, "depth": 5}, 2)


def foreign(model: nn.Module) -> list[str]:
    """Layers of this library that are left."""
    return [
        type(m).__name__
        for m in model.modules()
        if type(m).__module__.startswith("groupconv_ext.nn") and hasattr(m, "kernel_size")
    ]


@pytest.mark.parametrize("name", TINY)
def test_plain_networks_are_the_same_functions(name: str, load: Any) -> None:
    networks: ModuleType = load("networks")
    chosen = network(load, name)
    x = torch.randn(2, 3, 64, 64)
    forms = networks.forward_forms(chosen, "cpu", compiles=False)
    for form in ("ours", "ours, converted", "ours, folded", "plain, folded"):
        networks.check(forms[form], forms["plain"], x)
    assert not foreign(forms["plain"])
    assert not foreign(forms["unpermuted"])
    assert forms["unpermuted"](x).shape == forms["plain"](x).shape
    training = networks.training_forms(chosen, "cpu")
    networks.check(training["ours"], training["plain"], x)
    assert not foreign(training["plain"])


@pytest.mark.parametrize("name", ["FLGC", "G-ResNeXt", "CondenseNet", "IGC"])
def test_plain_networks_learn_as_ours_do(name: str, load: Any) -> None:
    networks: ModuleType = load("networks")
    forms = networks.training_forms(network(load, name), "cpu")
    x = torch.randn(2, 3, 64, 64)
    gradients = {}
    for form in ("ours", "plain"):
        model = forms[form]
        model(x).square().sum().backward()
        stem = next(m for m in model.modules() if isinstance(m, nn.Conv2d))
        gradients[form] = stem.weight.grad
    scale = float(gradients["plain"].abs().max())
    torch.testing.assert_close(gradients["ours"], gradients["plain"], rtol=2e-2, atol=2e-2 * scale)


def test_every_form_takes_channels_last(load: Any) -> None:
    networks: ModuleType = load("networks")
    forms = networks.forward_forms(network(load, "IGC"), "cpu", compiles=False)
    x = torch.randn(1, 3, 64, 64)
    expected = forms["plain"](x)
    layout = networks.LAYOUTS["NHWC"]
    for model in networks.laid_out(forms, layout).values():
        weights = [weight for weight in model.parameters() if weight.dim() == 4]
        assert all(weight.is_contiguous(memory_format=layout) for weight in weights)
    found = forms["ours, folded"](x.contiguous(memory_format=layout))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_a_wrong_answer_stops_the_run(load: Any) -> None:
    networks: ModuleType = load("networks")
    forms = networks.forward_forms(network(load, "IGC"), "cpu", compiles=False)
    with pytest.raises(AssertionError):
        networks.check(forms["ours"], forms["unpermuted"], torch.randn(1, 3, 64, 64))


@pytest.mark.parametrize("direction", ["forward", "training"])
def test_a_run_leaves_its_tables_and_another_adds_to_them(
    direction: str, load: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    networks: ModuleType = load("networks")
    monkeypatch.setattr(
        networks, "NETWORKS", {"tiny": network(load, "IGC"), "other": network(load, "Xception")}
    )
    threads = torch.get_num_threads()
    command = ["networks", "--seconds", "0", "--out", str(tmp_path)]
    command += ["--train"] if direction == "training" else []
    try:
        for name in ("tiny", "other", "tiny"):
            monkeypatch.setattr(sys, "argv", [*command, "--only", name])
            networks.main()
        measured = (tmp_path / "networks.json").read_text()
        monkeypatch.setattr(sys, "argv", [*command, "--resume"])
        networks.main()
        assert (tmp_path / "networks.json").read_text() == measured
        monkeypatch.setattr(sys, "argv", [*command, "--layout", "NHWC"])
        with pytest.raises(SystemExit, match="other layout"):
            networks.main()
    finally:
        torch.set_num_threads(threads)
    found = json.loads((tmp_path / "networks.json").read_text())
    rows = found["rows"]
    forms = {"ours", "plain", "unpermuted", "standard"}
    if direction == "forward":
        forms |= {"ours, converted", "ours, folded", "plain, folded"}
    assert {row["form"] for row in rows} == forms
    assert len(rows) == 2 * len(forms)
    assert found["conditions"]["threads"] == "1"
    model, options = TINY["IGC"]
    work = gc.count(gc.models.create(model, **options), 64).multiply_adds
    batch = 2 if direction == "training" else 1
    first = next(row for row in rows if (row["network"], row["form"]) == ("tiny", "plain"))
    assert first["multiply_adds"] == work * batch
    assert first["lower_quartile"] <= first["milliseconds"] <= first["upper_quartile"]
    assert "| tiny |" in (tmp_path / "networks.md").read_text()
    assert len((tmp_path / "networks.csv").read_text().splitlines()) == 1 + len(rows)
    if importlib.util.find_spec("matplotlib"):
        assert (tmp_path / "networks.png").read_bytes().startswith(b"\x89PNG")


def test_names_that_do_not_exist_are_refused(
    load: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    networks: ModuleType = load("networks")
    monkeypatch.setattr(sys, "argv", ["networks", "--only", "AlexNet", "--out", str(tmp_path)])
    threads = torch.get_num_threads()
    try:
        with pytest.raises(SystemExit, match="no network is called"):
            networks.main()
    finally:
        torch.set_num_threads(threads)
