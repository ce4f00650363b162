"""The experiments on learning: they measure what they say, and the easy part of what they found."""

import importlib
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from groupconv_ext import Partition
from groupconv_ext.nn import FLGConv2d

FOLDER = Path(__file__).parents[1] / "benches" / "learning"


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module


def test_agreement_does_not_ask_for_names(load: Any) -> None:
    planted: ModuleType = load("planted")
    teacher = Partition.from_labels([0, 0, 1, 1, 2, 2], [0, 1, 1, 2], 3)
    renamed = Partition.from_labels([4, 4, 0, 0, 2, 2], [4, 0, 0, 2], 5)
    assert planted.agreement(renamed, teacher) == 1
    merged = Partition.from_labels([0, 0, 0, 0, 2, 2], [0, 0, 0, 2], 5)
    assert planted.agreement(merged, teacher) == pytest.approx(7 / 10)
    split = Partition.from_labels([0, 3, 1, 1, 2, 2], [0, 1, 1, 2], 5)
    assert planted.agreement(split, teacher) == pytest.approx(9 / 10)


@pytest.mark.slow
def test_planted_groups_and_gates_are_found(load: Any) -> None:
    planted: ModuleType = load("planted")
    torch.manual_seed(4)
    partition = Partition.random(32, 32, 4, seed=4, uneven=True)
    teacher = planted.random_teacher(partition)
    students = [planted.learn_flgc(teacher) for _ in range(2)]
    best = max(students, key=lambda student: planted.agreement(student.partition(), partition))
    assert planted.agreement(best.partition(), partition) >= 0.95
    assert planted.error(best, teacher) < 0.01
    gates = planted.dgconv(0)
    assert gates["open_right"] == 1
    assert gates["open_error"] < 0.01


def test_networks_cost_the_same(load: Any) -> None:
    methods: ModuleType = load("methods")
    costs = {
        method.name: methods.multiply_adds(methods.network(method)) for method in methods.METHODS
    }
    assert costs["groups"] == 64 * 9 * 64 + (64 + 16 + 16) * 9 * 64 * 8 + 640
    for name, cost in costs.items():
        if name not in ("FLGC", "DGConv"):  # which begin where chance or their gates put them
            assert cost == pytest.approx(costs["groups"], rel=0.05)
    ragged = Partition.random(64, 64, 8, seed=0, uneven=True)
    learned = methods.Method(
        "FLGC", 64, lambda c, s: FLGConv2d(c, c, 3, padding=1, bias=False, partition=ragged)
    )
    pixels = 3 * 64  # stride 1 everywhere
    assert methods.multiply_adds(methods.network(learned)) == (
        64 * 9 * 64 + pixels * 9 * ragged.entries + 640
    )


def test_strokes_are_drawn_from_their_seed(load: Any) -> None:
    images: ModuleType = load("images")
    x, digits = images.strokes(400, 3)
    again, same = images.strokes(400, 3)
    assert torch.equal(x, again)
    assert torch.equal(digits, same)
    assert x.shape == (400, 1, 8, 8)
    assert x.isfinite().all()
    assert set(digits.tolist()) == set(range(10))
    # Means of the digits differ, and tell more than half of the images apart.
    means = torch.stack([x[digits == digit].mean(0) for digit in range(10)])
    other, truth = images.strokes(400, 4)
    nearest = torch.cdist(other.flatten(1), means.flatten(1)).argmin(1)
    assert 0.5 < float((nearest == truth).float().mean()) < 0.95


def test_scanned_digits_are_cut_once(load: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    images: ModuleType = load("images")
    numbers = torch.arange(1797)
    found = SimpleNamespace(
        images=numbers[:, None, None].expand(-1, 8, 8).numpy(), target=numbers.numpy()
    )
    fake: Any = ModuleType("sklearn.datasets")
    fake.load_digits = lambda: found
    monkeypatch.setitem(sys.modules, "sklearn", ModuleType("sklearn"))
    monkeypatch.setitem(sys.modules, "sklearn.datasets", fake)
    (x, y), (test_x, test_y) = images.load("digits", 0)
    assert x.shape == (1297, 1, 8, 8)
    assert test_x.shape == (500, 1, 8, 8)
    assert torch.equal(x[:, 0, 0, 0] * 16, y.float())
    assert sorted([*y.tolist(), *test_y.tolist()]) == list(range(1797))
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(SystemExit, match="take --task strokes"):
        images.load("digits", 0)


@pytest.mark.slow
def test_a_learned_network_trains_and_converts(load: Any) -> None:
    methods: ModuleType = load("methods")
    found = {method.name: method for method in methods.METHODS}
    flgc = methods.run(found["FLGC"], "strokes", 0, epochs=3)
    assert flgc["accuracy"] > 0.3  # chance is 0.1
    assert len(flgc["groups"]) == 3
