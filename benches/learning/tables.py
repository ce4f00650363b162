"""The runs as Markdown, means over the seeds with their standard deviation."""

from __future__ import annotations

import statistics
from typing import Any

Runs = list[dict[str, Any]]


def spread(values: list[float], scale: float = 100, digits: int = 1) -> str:
    mean, deviation = statistics.mean(values), statistics.stdev(values)
    return f"{scale * mean:.{digits}f} ± {scale * deviation:.{digits}f}"


def column(runs: Runs, name: str) -> list[float]:
    return [run[name] for run in runs]


def planted(runs: Runs) -> str:
    flgc = [run for run in runs if run["layer"] == "FLGC"]
    gates = [run for run in runs if run["layer"] == "DGConv"]
    starts = [share for run in flgc for share in run["starts"]]
    whole = sum(share == 1 for share in starts)
    rows = [
        "| | channels in the right group, % | of the output's variance left, % |",
        "|---|---|---|",
        f"| FLGC, the start with the fewest connections | {spread(column(flgc, 'agreement'))} "
        f"| {spread(column(flgc, 'error'), digits=2)} |",
        f"| FLGC, every start ({whole} of {len(starts)} find all) | {spread(starts)} | |",
        f"| fixed groups | {spread(column(flgc, 'fixed_agreement'))} "
        f"| {spread(column(flgc, 'fixed_error'), digits=2)} |",
        "",
        "| | gates found, % | of the output's variance left, % |",
        "|---|---|---|",
    ]
    for start, said in (("open", "all gates open"), ("random", "random gates")):
        rows.append(
            f"| DGConv from {said} | {spread(column(gates, f'{start}_right'))} "
            f"| {spread(column(gates, f'{start}_error'), digits=2)} |"
        )
    return "\n".join(rows) + "\n"


def by_method(runs: Runs) -> dict[str, Runs]:
    return {
        name: [run for run in runs if run["method"] == name]
        for name in dict.fromkeys(run["method"] for run in runs)
    }


def classify(runs: Runs) -> str:
    rows = [
        "| | accuracy, % | lowest … highest | multiply-adds | parameters |",
        "|---|---|---|---|---|",
    ]
    for name, own in by_method(runs).items():
        accuracy = column(own, "accuracy")
        rows.append(
            f"| {name} | {spread(accuracy)} "
            f"| {100 * min(accuracy):.1f} … {100 * max(accuracy):.1f} "
            f"| {statistics.mean(column(own, 'multiply_adds')) / 1e3:.0f} k "
            f"| {statistics.mean(column(own, 'parameters')) / 1e3:.1f} k |"
        )
    return "\n".join(rows) + "\n"
