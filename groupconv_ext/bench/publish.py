"""Everything that a run leaves in its folder."""

from __future__ import annotations

from pathlib import Path

from . import html, plots
from .results import Report, save, write_whole


def publish(report: Report, folder: Path) -> list[Path]:
    """Write JSON, CSV, the page and (with matplotlib) the pictures; the paths, the page last."""
    paths = list(save(report, folder))
    figures = plots.draw(report) if plots.HAVE_MATPLOTLIB else {}
    for name, figure in figures.items():
        paths.append(folder / f"{name}.png")
        write_whole(paths[-1], plots.png(figure))
    page = html.page(report, {name: plots.svg(figure) for name, figure in figures.items()})
    paths.append(folder / "report.html")
    write_whole(paths[-1], page)
    return paths
