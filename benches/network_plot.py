"""Time against multiply-adds, a point a network: where time follows work, points lie on a line."""

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
    figure = Figure(figsize=(8.5 * len(directions), 6), layout="constrained")
    axes = figure.subplots(1, len(directions), squeeze=False)[0]
    for ax, direction in zip(axes, directions, strict=True):
        _draw(ax, [row for row in rows if row["direction"] == direction], direction)
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=120)
    return data.getvalue()


def _draw(ax: Any, rows: list[dict[str, Any]], direction: str) -> None:
    ours = "ours, folded" if direction == "forward" else "ours"
    for form in (ours, "plain", "unpermuted", "standard"):
        of = [row for row in rows if row["form"] == form]
        colour, marker = STYLES[form]
        ax.plot(
            [row["multiply_adds"] / 1e6 for row in of],
            [row["milliseconds"] for row in of],
            marker,
            color=colour,
            markerfacecolor="none" if form in HOLLOW else colour,
            label=form,
        )
    points = [row for row in rows if row["form"] == ours]
    for row in points:
        ax.annotate(
            row["network"],
            (row["multiply_adds"] / 1e6, row["milliseconds"]),
            xytext=(6, -9),
            textcoords="offset points",
            fontsize=7,
            color=STYLES[ours][0],
        )
    ax.set_xscale("log")
    ax.set_yscale("log")
    low, high = ax.get_xlim()
    rate = sorted(row["multiply_adds"] / 1e6 / row["milliseconds"] for row in points)
    middle = rate[len(rate) // 2]
    ax.plot([low, high], [low / middle, high / middle], color=STYLES[ours][0], lw=0.8, ls="--")
    ax.text(low, low / middle, f" {2 * middle:.0f} GFLOP/s", fontsize=7, color=STYLES[ours][0])
    ax.set_xlim(low, high)
    ax.set_xlabel("million multiply-adds")
    ax.set_ylabel("milliseconds")
    ax.set_title(f"{direction}: time against work", loc="left", fontsize=10)
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(frameon=False, fontsize=8)
