"""The pictures of a run on a GPU: the roofline, a bar for each layer, cold, warm and graph."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..plots import (
    BOUND_COLOUR,
    HAVE_MATPLOTLIB,
    HOW_TO_GET,
    INK,
    OUR_COLOUR,
    RIVAL_COLOUR,
    STYLE,
)
from ..summary import short_name
from .state import State
from .summary import Outcome, outcomes

if HAVE_MATPLOTLIB:
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["draw"]

_MARKS = {"bfloat16": "o", "float16": "s", "float32": "^"}
_ROW_INCHES = 0.42


def draw(state: State) -> dict[str, Figure]:
    """Every picture that there is data for, by name."""
    if not HAVE_MATPLOTLIB:
        raise ImportError(HOW_TO_GET)
    results = outcomes(state)
    if not results or not state.limits:
        return {}
    with matplotlib.rc_context(STYLE):
        return {
            "roofline": _roofline(state, results),
            "layers": _layers(results),
            "modes": _modes(results),
        }


def _roofline(state: State, results: Sequence[Outcome]) -> Figure:
    """Rate over intensity; the roofs are a copy and a matrix product of the same run."""
    figure = Figure(figsize=(9.6, 5.4))
    axes = figure.subplots()
    memory: float = state.limits["memory"]
    dtypes = sorted({outcome.found.problem.dtype for outcome in results})
    rates = {dtype: float(state.limits["rates"][dtype]) for dtype in dtypes}
    points = [
        (2 * p.multiply_adds / p.bytes, 2 * p.multiply_adds, outcome)
        for outcome in results
        if (p := outcome.found.problem)
    ]
    low = min(x for x, _, _ in points) / 2
    high = 2 * max(*(x for x, _, _ in points), *(rate / memory for rate in rates.values()))
    for dtype, rate in rates.items():
        ridge = rate / memory
        axes.plot(
            [low, ridge, high],
            [low * memory / 1e12, rate / 1e12, rate / 1e12],
            color=BOUND_COLOUR,
            linewidth=1,
        )
        axes.text(high, rate / 1e12, f" {dtype}", color=BOUND_COLOUR, fontsize=8, va="center")
    for intensity, flops, outcome in points:
        mark = _MARKS[outcome.found.problem.dtype]
        ours = flops / outcome.ours.cold / 1e6
        if outcome.rival is not None:
            theirs = flops / outcome.rival.cold / 1e6
            axes.plot([intensity] * 2, [theirs, ours], color=BOUND_COLOUR, linewidth=0.8, zorder=1)
            axes.scatter(intensity, theirs, s=16, marker=mark, color=RIVAL_COLOUR, zorder=2)
        axes.scatter(intensity, ours, s=22, marker=mark, color=OUR_COLOUR, zorder=3)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("multiply-adds × 2 / bytes that must move")
    axes.set_ylabel("TFLOP/s, cold cache")
    axes.set_title("Roofline: ours blue, the best rival orange")
    return figure


def _layers(results: Sequence[Outcome]) -> Figure:
    """Times as multiples of the floor, one row a layer."""
    order = sorted(results, key=lambda outcome: outcome.share_of_floor)
    figure, axes = _rows(order)
    for place, outcome in enumerate(order):
        floor = outcome.found.floor_us
        axes.barh(place + 0.2, outcome.ours.cold / floor, height=0.36, color=OUR_COLOUR)
        if outcome.rival is not None:
            axes.barh(place - 0.2, outcome.rival.cold / floor, height=0.36, color=RIVAL_COLOUR)
    axes.axvline(1, color=INK, linewidth=1)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}×"))
    axes.set_title("Time over the floor, cold cache: ours blue, the best rival orange")
    return figure


def _modes(results: Sequence[Outcome]) -> Figure:
    """Ours with a cold cache, a warm one, and from a graph, in microseconds."""
    order = sorted(results, key=lambda outcome: outcome.ours.cold)
    figure, axes = _rows(order)
    for place, outcome in enumerate(order):
        row = outcome.ours
        axes.barh(place, row.cold, height=0.6, color=OUR_COLOUR, alpha=0.35)
        axes.scatter(row.warm, place, marker="o", s=18, color=OUR_COLOUR, zorder=3)
        if row.graph is not None:
            axes.scatter(row.graph, place, marker="|", s=60, color=INK, zorder=3)
        axes.plot([outcome.found.floor_us] * 2, [place - 0.3, place + 0.3], color=RIVAL_COLOUR)
    axes.set_xscale("log")
    axes.set_xlabel("µs")
    axes.set_title("Ours: cold (bar), warm (dot), from a CUDA graph (tick), floor (orange)")
    return figure


def _rows(order: Sequence[Outcome]) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(9.6, 1.4 + _ROW_INCHES * len(order)))
    axes = figure.subplots()
    names = [short_name(outcome.found.problem) for outcome in order]
    axes.set_yticks(range(len(order)), names, fontsize=7)
    axes.set_ylim(-0.7, len(order) - 0.3)
    axes.grid(axis="x", color=INK, alpha=0.12)
    axes.set_axisbelow(True)
    return figure, axes
