"""A picture of the ``grid`` suite: share of the FMA peak over channels per group × map size.

One row of panels for each kernel, one panel for ours, one for the best of PyTorch on the same
function and one for PyTorch with the permutation left out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import TYPE_CHECKING

from .problems import Layout, Problem
from .results import Report, Row
from .rivals import OURS
from .suites import GRID_NETWORK
from .summary import best_rival

with suppress(ImportError):  # plots.py says what is missing
    from matplotlib.figure import Figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Pick = Callable[[Mapping[str, Row]], "Row | None"]

PANELS: Mapping[str, Pick] = {
    "ours": lambda rows: rows.get(OURS),
    "best of PyTorch": lambda rows: best_rival(rows.values()),
    "PyTorch, permutation left out": lambda rows: rows.get("aten-contiguous"),
}


def heat_map(report: Report, layout: Layout) -> Figure | None:
    """The figure for one layout, or None where the report has no grid of it."""
    grid = {
        problem: rows
        for problem, rows in report.by_problem.items()
        if problem.network == GRID_NETWORK and problem.layout == layout
    }
    if not grid:
        return None
    kernels = sorted({problem.kernel for problem in grid})
    figure = Figure(figsize=(3.4 * len(PANELS), 0.9 + 2.4 * len(kernels)), layout="constrained")
    panels = figure.subplots(len(kernels), len(PANELS), squeeze=False, sharex=True, sharey=True)
    for line, kernel in zip(panels, kernels, strict=True):
        of_kernel = {problem: rows for problem, rows in grid.items() if problem.kernel == kernel}
        for axes, (title, pick) in zip(line, PANELS.items(), strict=True):
            _panel(axes, of_kernel, pick)
            axes.set_title(f"{kernel}×{kernel}: {title}", fontsize=9)
        line[0].set_ylabel("map")
    for axes in panels[-1]:
        axes.set_xlabel("channels per group")
    figure.suptitle(f"Share of the FMA peak, {layout}, batch 1", fontsize=11, fontweight="bold")
    peak = f"FMA peak {report.machine.flops_per_second / 1e9:.0f} GFLOP/s"
    figure.supxlabel(" · ".join((*report.circumstances, peak)), fontsize=8)
    return figure


def _panel(axes: Axes, grid: Mapping[Problem, Mapping[str, Row]], pick: Pick) -> None:
    widths = sorted({problem.channels_per_group for problem in grid})
    sizes = sorted({problem.height for problem in grid}, reverse=True)
    shares = [[float("nan")] * len(widths) for _ in sizes]
    for problem, rows in grid.items():
        row = pick(rows)
        column = widths.index(problem.channels_per_group)
        if row is not None:
            shares[sizes.index(problem.height)][column] = row.share_of_peak
    axes.imshow(shares, vmin=0, vmax=1, cmap="cividis", aspect="auto")
    for y, line in enumerate(shares):
        for x, share in enumerate(line):
            if share == share:
                ink = "white" if share < 0.55 else "black"
                axes.text(
                    x, y, f"{100 * share:.0f}", ha="center", va="center", color=ink, fontsize=8
                )
    axes.set_xticks(range(len(widths)), [str(width) for width in widths])
    axes.set_yticks(range(len(sizes)), [f"{size}²" for size in sizes])
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
