"""Time against multiply-adds, a point a network: where time follows work, points lie on a line.

The numbers stand beside the points of ours, in the order of their work.
"""

from __future__ import annotations

import io
from typing import Any

from matplotlib.figure import Figure

STYLES = {
    "ours, folded": ("#0072b2", "o"),
    "plain, folded": ("#d55e00", "s"),
    "ours, converted": ("#0072b2", "o"),
    "ours": ("#0072b2", "o"),
    "plain": ("#d55e00", "s"),
    "unpermuted": ("#8b93a1", "^"),
    "standard": ("#1b1f27", "D"),
}
HOLLOW = {"unpermuted"}


def draw(rows: list[dict[str, Any]]) -> bytes:
    """A picture of all directions among ``rows``."""
    directions = list(dict.fromkeys(row["direction"] for row in rows))
    figure = Figure(figsize=(9.5 * len(directions), 6), layout="constrained")
    axes = figure.subplots(1, len(directions), squeeze=False)[0]
    for ax, direction in zip(axes, directions, strict=True):
        _draw(ax, [row for row in rows if row["direction"] == direction], direction)
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=120)
    return data.getvalue()


def _draw(ax: Any, rows: list[dict[str, Any]], direction: str) -> None:
    suffix = ", folded" if direction == "forward" else ""
    ours = f"ours{suffix}"
    for form in (ours, f"plain{suffix}", "unpermuted", "standard"):
        of = [row for row in rows if row["form"] == form]
        colour, marker = STYLES[form]
        ax.plot(
            [row["multiply_adds"] / 1e6 for row in of],
            [row["milliseconds"] for row in of],
            marker,
            color=colour,
            markerfacecolor="none" if form in HOLLOW else colour,
            label=f"{form}, not folded" if suffix and not form.endswith(suffix) else form,
        )
    points = sorted(
        (row["multiply_adds"] / 1e6, row["milliseconds"], row["network"])
        for row in rows
        if row["form"] == ours
    )
    for number, (work, time, _) in enumerate(points, 1):
        ax.annotate(
            str(number),
            (work, time),
            xytext=(5, -9),
            textcoords="offset points",
            fontsize=8,
            color=STYLES[ours][0],
        )
    names = [f"{number}  {name}" for number, (*_, name) in enumerate(points, 1)]
    ax.text(1.02, 0.5, "\n".join(names), transform=ax.transAxes, va="center", color=STYLES[ours][0])
    ax.set_xscale("log")
    ax.set_yscale("log")
    low, high = ax.get_xlim()
    rates = sorted(work / time for work, time, _ in points)
    middle = rates[len(rates) // 2]
    ax.plot([low, high], [low / middle, high / middle], color=STYLES[ours][0], lw=0.8, ls="--")
    ax.annotate(
        f"{2 * middle:.0f} GFLOP/s",
        (high, high / middle),
        xytext=(0, 4),
        textcoords="offset points",
        ha="right",
        fontsize=7,
        color=STYLES[ours][0],
    )
    ax.set_xlim(low, high)
    ax.set_xlabel("million multiply-adds")
    ax.set_ylabel("milliseconds")
    ax.set_title(f"{direction}: time against work", loc="left", fontsize=10)
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(frameon=False, fontsize=8)
