"""The pictures of a report: speed-ups, shares of the peak, the roofline, a grid's heat maps.

They need matplotlib, the ``plots`` extra; without it ``draw`` raises an ImportError that says so,
and everything else of a report works.
"""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from math import atan, degrees
from typing import TYPE_CHECKING, Any

from .heat_map import heat_map
from .problems import Problem
from .results import Report, Row
from .rivals import OURS
from .summary import best_rival, geometric_mean, short_name

try:
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, PercentFormatter
except ImportError:
    HAVE_MATPLOTLIB = False
else:
    HAVE_MATPLOTLIB = True

if TYPE_CHECKING:
    from matplotlib.axes import Axes

HOW_TO_GET = "plots need matplotlib: pip install 'groupconv-ext[plots]'"

# Okabe and Ito's blue and vermilion, told apart under every common colour blindness.
OUR_COLOUR = "#0072b2"
RIVAL_COLOUR = "#d55e00"
BOUND_COLOUR = "#8b93a1"
INK = "#1b1f27"  # becomes ``currentColor`` in an SVG, so that the page's theme decides
STYLE: dict[Any, Any] = {
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlepad": 12,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "font.size": 9,
    "legend.fontsize": 8,
    "legend.frameon": False,
    "savefig.bbox": "tight",
    "svg.fonttype": "none",
    "svg.hashsalt": "groupconv",
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
}

# More rows than this leave no room for their names.
_MOST_NAMED = 96
_CROWDED_HEIGHT = 7.0


def draw(report: Report) -> dict[str, Figure]:
    """Every picture that the report has data for, by name."""
    if not HAVE_MATPLOTLIB:
        raise ImportError(HOW_TO_GET)
    with matplotlib.rc_context(STYLE):
        pictures = {
            "speed-up": _speed_up(report),
            "share-of-peak": _share_of_peak(report),
            "roofline": _roofline(report),
            "heat-map-nchw": heat_map(report, "NCHW"),
            "heat-map-nhwc": heat_map(report, "NHWC"),
        }
    return {name: figure for name, figure in pictures.items() if figure is not None}


def png(figure: Figure) -> bytes:
    """For a file: dark ink on white."""
    data = io.BytesIO()
    with matplotlib.rc_context(STYLE):
        figure.savefig(data, format="png", dpi=160, facecolor="white")
    return data.getvalue()


def svg(figure: Figure) -> str:
    """For a page: an ``<svg>`` element that takes its ink and its font from where it stands."""
    text = io.StringIO()
    with matplotlib.rc_context(STYLE):
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(text, format="svg", transparent=True, metadata=nothing)
    element = text.getvalue()
    element = element[element.index("<svg") :]
    element = re.sub(r"<metadata>.*?</metadata>", "", element, flags=re.DOTALL)
    element = re.sub(r' xmlns(:\w+)?="[^"]*"', "", element)  # known to HTML; no address in the page
    element = re.sub(r"'DejaVu Sans'[^;\"]*", "inherit", element)
    return element.replace(INK, "currentColor")


# ---- the pictures --------------------------------------------------------------------------------


def _speed_up(report: Report) -> Figure | None:
    """Ours over the best rival and over aten, sorted: one line a problem, 1× marked."""
    found = []
    for problem, rows in report.by_problem.items():
        best, aten = best_rival(rows.values()), rows.get("aten")
        if best and best.ours_is_faster is not None:
            found.append((best.ours_is_faster, aten.ours_is_faster if aten else None, problem))
    if not found:
        return None
    found.sort(key=lambda entry: entry[0])
    figure, axes = _rows_figure(len(found))
    places = range(len(found))
    best_ratios = [ratio for ratio, _, _ in found]
    axes.barh(
        places,
        [ratio - 1 for ratio in best_ratios],
        left=1,
        height=0.72 if len(found) <= _MOST_NAMED else 1,
        color=[OUR_COLOUR if ratio >= 1 else RIVAL_COLOUR for ratio in best_ratios],
    )
    aten_ratios = [(place, ratio) for place, (_, ratio, _) in enumerate(found) if ratio]
    dots = axes.scatter(
        [ratio for _, ratio in aten_ratios],
        [place for place, _ in aten_ratios],
        s=14 if len(found) <= _MOST_NAMED else 3,
        color=INK,
        edgecolors="white" if len(found) <= _MOST_NAMED else "none",
        linewidths=0.6,
        zorder=3,
        label="over index_select + conv2d + index_select",
    )
    axes.axvline(1, color=INK, linewidth=1)
    mean = geometric_mean(best_ratios)
    axes.axvline(mean, color=OUR_COLOUR, linewidth=1, linestyle=(0, (4, 3)))
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}×"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    ticks = [0.25, 0.5, 1, 2, 3, 5, 10, 20, 50, 100]
    low, high = axes.get_xlim()
    axes.set_xticks([tick for tick in ticks if low <= tick <= high])
    axes.minorticks_off()
    axes.set_title(f"Speed-up, geometric mean {mean:.2f}× over the best of PyTorch")
    _name_rows(axes, [short_name(problem) for _, _, problem in found])
    bar = Patch(color=OUR_COLOUR, label="over the best of PyTorch")
    axes.legend(handles=[bar, dots], loc="lower right")
    return figure


def _share_of_peak(report: Report) -> Figure | None:
    """How much of the FMA peak ours reaches on each problem, its best rival inside the bar."""
    rows_by_problem = {problem: rows for problem, rows in report.by_problem.items() if OURS in rows}
    if len(rows_by_problem) > _MOST_NAMED:
        rows_by_problem = {
            problem: rows for problem, rows in rows_by_problem.items() if _is_typical(problem)
        }
    if not rows_by_problem:
        return None
    order = sorted(rows_by_problem, key=lambda p: rows_by_problem[p][OURS].share_of_peak)
    figure, axes = _rows_figure(len(order))
    places = range(len(order))
    ours = [rows_by_problem[problem][OURS].share_of_peak for problem in order]
    bars = axes.barh(places, ours, height=0.72, color=OUR_COLOUR, label="ours")
    rivals = _overlay_rivals(axes, [list(rows_by_problem[problem].values()) for problem in order])
    axes.set_xlim(0, max(1.0, *ours))
    axes.xaxis.set_major_formatter(PercentFormatter(1))
    axes.grid(axis="x", color=INK, alpha=0.12)
    axes.set_axisbelow(True)
    axes.set_title("Share of the FMA peak measured beside each problem")
    _name_rows(axes, [short_name(problem) for problem in order])
    axes.legend(handles=[bars, *rivals], loc="lower right")
    return figure


def _overlay_rivals(axes: Axes, rows: Sequence[Sequence[Row]]) -> list[Any]:
    """Thin bars and ticks inside ours; the handles for a legend."""
    best = [(place, best_rival(row)) for place, row in enumerate(rows)]
    bound = [
        (place, entry.share_of_peak)
        for place, row in enumerate(rows)
        for entry in row
        if entry.contender == "aten-contiguous"
    ]
    bars = axes.barh(
        [place for place, row in best if row],
        [row.share_of_peak for _, row in best if row],
        height=0.3,
        color=RIVAL_COLOUR,
        label="best of PyTorch",
    )
    ticks = axes.scatter(
        [share for _, share in bound],
        [place for place, _ in bound],
        marker="|",
        s=42,
        color=BOUND_COLOUR,
        zorder=3,
        label="PyTorch with the permutation left out",
    )
    return [bars, ticks]


def _roofline(report: Report) -> Figure | None:
    """Rate over arithmetic intensity, under the roofs that this run measured."""
    points = [
        (2 * problem.multiply_adds / problem.bytes, rows[OURS].gflops, best_rival(rows.values()))
        for problem, rows in report.by_problem.items()
        if OURS in rows
    ]
    if not points:
        return None
    figure = Figure(figsize=(9.6, 5.4))
    axes = figure.subplots()
    machine = report.machine
    peak = machine.flops_per_second / 1e9
    last_ridge = machine.flops_per_second / machine.levels[-1].bytes_per_second
    intensities = [x for x, _, _ in points]
    low, high = min(*intensities, 0.8) / 1.6, max(*intensities, last_ridge) * 1.6
    for index, level in enumerate(machine.levels):
        bandwidth = level.bytes_per_second / 1e9
        ridge = peak / bandwidth
        line = (0, (1, 1.5)) if index < len(machine.levels) - 1 else "solid"
        axes.plot(
            [low, ridge], [low * bandwidth, peak], color=BOUND_COLOUR, linewidth=1, linestyle=line
        )
        # Further along its line than the one before, whose line may be the same.
        at = low * 1.15 * 1.7**index
        axes.text(
            at,
            at * bandwidth,
            f"{level.name} {bandwidth:.0f} GB/s",
            rotation=degrees(atan(bandwidth)),
            rotation_mode="anchor",
            transform_rotates_text=True,
            va="bottom",
            fontsize=7.5,
            color=BOUND_COLOUR,
        )
    axes.axhline(peak, color=INK, linewidth=1)
    axes.annotate(
        f"FMA peak {peak:.0f} GFLOP/s",
        (high, peak),
        xytext=(0, 4),
        textcoords="offset points",
        ha="right",
        fontsize=7.5,
    )
    for intensity, rate, rival in points:
        if rival:
            pair = [rival.gflops, rate]
            axes.plot(
                [intensity] * 2, pair, color=BOUND_COLOUR, linewidth=0.7, alpha=0.55, zorder=2
            )
    axes.scatter(
        [x for x, _, rival in points if rival],
        [rival.gflops for _, _, rival in points if rival],
        s=18,
        color=RIVAL_COLOUR,
        zorder=3,
        label="best of PyTorch",
    )
    axes.scatter(
        intensities,
        [rate for _, rate, _ in points],
        s=24,
        color=OUR_COLOUR,
        zorder=4,
        label="ours",
    )
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlim(low, high)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("floating-point operations for each byte that must move")
    axes.set_ylabel("GFLOP/s")
    axes.grid(color=INK, alpha=0.1)
    axes.set_title("Roofline")
    ours_first = axes.get_legend_handles_labels()[0][::-1]
    axes.legend(handles=ours_first, loc="lower right")
    return figure


# ---- shared parts --------------------------------------------------------------------------------


def _rows_figure(count: int) -> tuple[Figure, Axes]:
    """A figure of horizontal rows, tall enough for their names where names fit."""
    height = 0.2 * count if count <= _MOST_NAMED else _CROWDED_HEIGHT
    figure = Figure(figsize=(8.2, 1.2 + height))
    axes = figure.subplots()
    axes.set_ylim(-0.8, count - 0.2)
    return figure, axes


def _name_rows(axes: Axes, names: Sequence[str]) -> None:
    axes.spines["left"].set_visible(False)
    axes.tick_params(axis="y", length=0, labelsize=7.5)
    axes.set_yticks(range(len(names)) if len(names) <= _MOST_NAMED else [])
    if len(names) <= _MOST_NAMED:
        axes.set_yticklabels(names)
    else:
        axes.set_ylabel(f"{len(names)} problems")


def _is_typical(problem: Problem) -> bool:
    return (
        problem.kind in ("permuted", "overlapping")
        and problem.batch == 1
        and problem.layout == "NCHW"
        and problem.dtype == "float32"
        and not problem.trains
    )
