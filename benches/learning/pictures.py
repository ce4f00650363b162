"""The same as pictures; they need matplotlib, the ``plots`` extra."""

from __future__ import annotations

import statistics

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from tables import Runs, by_method, column

OURS, OTHER, GREY = "#4477AA", "#BBBBBB", "#606060"
LEARNED = ("FLGC", "DGConv")


def _dots(ax: Axes, at: float, values: list[float], colour: str) -> None:
    """Every run as a dot, and their mean as a line."""
    ax.hlines(100 * statistics.mean(values), at - 0.3, at + 0.3, color=colour, linewidth=2.5)
    offsets = [at + 0.05 * (i % 5 - 2) for i in range(len(values))]
    ax.scatter(offsets, [100 * value for value in values], s=18, color=colour, alpha=0.7)


def _style(ax: Axes, title: str, names: list[str]) -> None:
    ax.set_title(title, loc="left", fontsize=10, color=GREY)
    ax.set_xticks(range(len(names)), names)
    ax.tick_params(labelsize=8, labelcolor=GREY, length=0)
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(axis="y", color="#E6E6E6", linewidth=0.8)
    ax.set_axisbelow(True)


def planted(runs: Runs) -> Figure:
    flgc = [run for run in runs if run["layer"] == "FLGC"]
    gates = [run for run in runs if run["layer"] == "DGConv"]
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    starts = [share for run in flgc for share in run["starts"]]
    shown = [
        ("FLGC,\nkept start", column(flgc, "agreement"), OURS),
        ("FLGC,\nevery start", starts, OURS),
        ("fixed\ngroups", column(flgc, "fixed_agreement"), OTHER),
    ]
    for at, (_, values, colour) in enumerate(shown):
        _dots(left, at, values, colour)
    _style(left, "channels in the right group, %", [name for name, _, _ in shown])
    _dots(right, 0, column(gates, "open_right"), OURS)
    _dots(right, 1, column(gates, "random_right"), OURS)
    names = ["DGConv from\nopen gates", "DGConv from\nrandom gates"]
    _style(right, "gates found, %", names)
    right.set_xlim(-0.6, 1.6)
    left.set_ylim(0, 104)
    return figure


def classify(runs: Runs, task: str) -> Figure:
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    ax = figure.subplots()
    methods = by_method(runs)
    for at, (name, own) in enumerate(methods.items()):
        _dots(ax, at, column(own, "accuracy"), OURS if name in LEARNED else GREY)
    costs = [statistics.mean(column(own, "multiply_adds")) for own in methods.values()]
    names = [f"{name}\n{cost / 1e3:.0f} k" for name, cost in zip(methods, costs, strict=True)]
    _style(ax, f"{task}: accuracy on unseen images, %; multiply-adds below", names)
    return figure
