"""The pictures show what they should, and without matplotlib everything else still works."""

import subprocess
import sys
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import PARTITIONS
from torch import nn

import groupconv_ext as gc
from groupconv_ext.partition import Partition
from groupconv_ext.report import plot_partition

WHITE = np.ones(3)


@pytest.fixture
def pyplot() -> Iterator[Any]:
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    pyplot = pytest.importorskip("matplotlib.pyplot")
    yield pyplot
    pyplot.close("all")


def panels(figure: Any) -> tuple[Any, Any]:
    """The two panels of the only axes of a figure."""
    left, right = figure.axes[0].child_axes
    return left, right


def cells(panel: Any) -> np.ndarray:
    (image,) = panel.images
    return np.asarray(image.get_array())


def coloured(panel: Any) -> np.ndarray:
    filled: np.ndarray = (cells(panel) != WHITE).any(2)
    return filled


@pytest.mark.parametrize("name", PARTITIONS)
def test_left_panel_is_the_mask(name: str, pyplot: Any) -> None:
    p = PARTITIONS[name]
    left, _ = panels(plot_partition(p))
    assert np.array_equal(coloured(left), p.mask().numpy())
    # Connections of one group share a colour, and no two groups do.
    image = cells(left)
    colours = [
        {tuple(image[n, c]) for n in outs for c in ins}
        for outs, ins in zip(p.outputs, p.inputs, strict=True)
        if outs and ins
    ]
    assert all(len(of_group) == 1 for of_group in colours)
    assert len(set(chain(*colours))) == len(colours)


@pytest.mark.parametrize("name", PARTITIONS)
def test_right_panel_has_its_blocks_on_the_diagonal(name: str, pyplot: Any) -> None:
    p = PARTITIONS[name]
    _, right = panels(plot_partition(p))
    reads = sum(map(len, p.inputs))
    unread = p.in_channels - len(set(chain(*p.inputs)))
    expected = np.zeros((p.out_channels, reads + unread), bool)
    row = column = 0
    for outs, ins in p.sizes:
        expected[row : row + outs, column : column + ins] = True
        row, column = row + outs, column + ins
    assert np.array_equal(coloured(right), expected)
    texts = {text.get_text() for text in right.texts}
    assert ("unread" in texts) == (unread > 0)
    assert ("bias only" in texts) == any(outs and not ins for outs, ins in p.sizes)


def test_few_channels_are_numbered_as_they_stand(pyplot: Any) -> None:
    p = PARTITIONS["overlapping, unread"]
    left, right = panels(plot_partition(p))

    def numbers(labels: list[Any]) -> list[int]:
        return [int(label.get_text()) for label in labels]

    assert numbers(left.get_xticklabels()) == [0, 1, 2, 3, 4, 5]
    assert numbers(right.get_xticklabels()) == [0, 1, 5, 4, 5, 1, 2, 3]
    assert numbers(right.get_yticklabels()) == [0, 3, 2, 1]


def test_blocks_and_titles_carry_the_numbers(pyplot: Any) -> None:
    figure = plot_partition(Partition.random(256, 128, 8, seed=0))
    _, right = panels(figure)
    assert [text.get_text() for text in right.texts] == ["16×32"] * 8
    title = figure.axes[0].get_title(loc="left")
    assert title == "256 → 128 channels, 8 groups, each 16×32\n4,096 connections, 12.5 % of dense"
    for panel in panels(figure):
        assert "input" in panel.get_xlabel()
        assert "output" in panel.get_ylabel()
        assert panel.get_title(loc="left")


def test_no_connection_is_lost_among_thousands_of_channels(pyplot: Any) -> None:
    p = Partition.random(2000, 1500, 100, seed=0)
    left, right = panels(plot_partition(p))
    mask = p.mask().numpy()
    height, width = coloured(left).shape
    assert max(height, width) <= 512
    hit = np.zeros((height, width), bool)
    rows, columns = mask.nonzero()
    hit[rows * height // 1500, columns * width // 2000] = True
    assert np.array_equal(coloured(left), hit)
    # Sorted, almost every cell lies inside one block and has its full colour, or none.
    assert 0.01 < coloured(right).mean() < 0.02


@pytest.mark.parametrize("size", [1, 2, 30, 2048])
def test_draws_every_size(size: int, pyplot: Any, tmp_path: Path) -> None:
    path = tmp_path / "partition.png"
    plot_partition(Partition.random(size, size, min(size, 2), seed=0)).savefig(path)
    assert pyplot.imread(path).std() > 0.05


def test_draws_into_given_axes(pyplot: Any) -> None:
    figure, (first, second) = pyplot.subplots(1, 2)
    assert plot_partition(PARTITIONS["ragged"], second) is figure
    assert len(second.child_axes) == 2
    assert not first.child_axes
    assert len(pyplot.get_fignums()) == 1


def test_without_matplotlib_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"pip install groupconv-ext\[plots\]"):
        plot_partition(PARTITIONS["dense"])


def test_importing_the_library_does_not_import_matplotlib() -> None:
    program = "import sys, groupconv_ext.report; assert 'matplotlib' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


# ---- a whole network ----------------------------------------------------------------------------


def test_structure_of_a_network_that_learned(pyplot: Any) -> None:
    model = nn.Sequential(
        gc.nn.FLGConv2d(8, 8, 1, groups=3),
        gc.nn.DGConv2d(8, 8, 1, gates=[0, 1, 0]),
        gc.nn.IGCV2Conv2d(8, 8, 3, padding=1, branch_channels=2),
    )
    model(torch.randn(1, 8, 4, 4))
    with torch.no_grad():
        model[1].gates.neg_()
    for _ in range(2):  # the second changes nothing, and is a step
        model(torch.randn(1, 8, 4, 4))
    figure = gc.report.plot_structure(model)
    figure.canvas.draw()
    axes = [axis for axis in figure.get_axes() if axis.axison]
    titles = [axis.get_title() or axis.get_title(loc="left") for axis in axes]
    assert [t.split("\n")[0] for t in titles[2:8]] == [
        "0", "1", "2.depthwise", "2.stages.0", "2.stages.1", "2.stages.2",
    ]  # fmt: skip
    assert "groups" in titles[0]
    assert "share" in titles[1]
    bars = [round(patch.get_height()) for patch in axes[0].patches]
    assert bars[1:] == [2, 8, 4, 4, 4]  # gates 1 0 1: one factor of two is apart
    dynamics, gates = axes[8:]
    (line,) = dynamics.get_lines()
    assert line.get_xdata().tolist() == [0, 1, 3]
    assert line.get_ydata().tolist() == [4, 2, 2]
    assert gates.get_images()[0].get_array().tolist() == [[0, 1, 1], [1, 0, 0], [0, 1, 1]]
    assert all(tick == round(tick) for axis in (dynamics, gates) for tick in axis.get_xticks())
    one_group = gc.report.plot_structure(gc.nn.DGConv2d(3, 5, 1))
    assert any(axis.get_title() == "\n1 group" for axis in one_group.get_axes())
    figure = gc.report.plot_structure(gc.nn.convert(model))
    assert len([axis for axis in figure.get_axes() if axis.axison]) == 8
    with pytest.raises(ValueError, match="no layer with a partition"):
        gc.report.plot_structure(nn.Linear(2, 2))
    with pytest.raises(TypeError, match=r"model is 3; expected an nn\.Module"):
        gc.report.plot_structure(3)
    with pytest.raises(TypeError, match=r"partition is 3; expected a groupconv_ext\.Partition"):
        plot_partition(3)
