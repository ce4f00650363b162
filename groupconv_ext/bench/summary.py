"""What a run says in a few numbers: geometric means, shares of the limits, the worst of each.

Only contenders that compute the same function are rivals; bounds are summarised apart. A ratio
above 1 means that ours is faster.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import exp, log
from statistics import median

from .problems import Problem
from .results import Report, Row
from .rivals import OURS

BEST_RIVAL = "best of PyTorch"


@dataclass(frozen=True)
class Versus:
    """Ours against one contender in one direction, over all problems that both ran."""

    contender: str
    direction: str
    same_function: bool
    count: int
    geometric_mean: float
    least: float
    least_problem: Problem
    losses: int  # problems where ours is slower


@dataclass(frozen=True)
class Shares:
    """How near ours came to the limits on one class of layers."""

    family: str
    layout: str
    direction: str
    count: int
    least_of_peak: float
    median_of_peak: float
    median_of_floor: float


def geometric_mean(values: Iterable[float]) -> float:
    """The mean of ratios, in which 2× and ½× cancel."""
    logs = [log(value) for value in values]
    return exp(sum(logs) / len(logs))


def best_rival(rows: Iterable[Row]) -> Row | None:
    """The fastest contender on one problem that computes the same function, ours apart.

    By its ratio within rounds, the number that is reported; by its time where ours did not run.
    """
    rivals = [row for row in rows if row.same_function and row.contender != OURS]
    return min(rivals, key=lambda row: row.ours_is_faster or row.median_us, default=None)


def versus(report: Report) -> tuple[Versus, ...]:
    """Ours against the best of PyTorch, then against each contender, direction by direction."""
    ratios: dict[tuple[str, str, bool], list[tuple[float, Problem]]] = {}

    def add(contender: str, row: Row) -> None:
        if row.ours_is_faster is not None:
            key = (contender, row.problem.direction, row.same_function)
            ratios.setdefault(key, []).append((row.ours_is_faster, row.problem))

    for rows in report.by_problem.values():
        if best := best_rival(rows.values()):
            add(BEST_RIVAL, best)
    for row in report.rows:
        if row.contender != OURS:
            add(row.contender, row)
    order = {name: i for i, (name, _, _) in enumerate(ratios)}
    return tuple(
        _versus(*key, ratios[key]) for key in sorted(ratios, key=lambda k: (k[1], order[k[0]]))
    )


def _versus(
    contender: str, direction: str, same: bool, found: Sequence[tuple[float, Problem]]
) -> Versus:
    least, problem = min(found, key=lambda pair: pair[0])
    values = [ratio for ratio, _ in found]
    return Versus(
        contender=contender,
        direction=direction,
        same_function=same,
        count=len(values),
        geometric_mean=geometric_mean(values),
        least=least,
        least_problem=problem,
        losses=sum(value < 1 for value in values),
    )


_REACHES = ((32, "≥ 32"), (16, "16–31"), (8, "8–15"), (0, "< 8"))
FAMILIES = (
    *(f"{kernel}, {reach} channels/group" for kernel in ("1×1", "K×K") for _, reach in _REACHES),
    "depthwise",
)


def family(problem: Problem) -> str:
    """The class of layers that a kernel's target is set for."""
    if problem.is_depthwise:
        return "depthwise"
    channels = problem.channels_per_group
    reach = next(name for least, name in _REACHES if channels >= least)
    kernel = "1×1" if problem.kernel == 1 else "K×K"
    return f"{kernel}, {reach} channels/group"


def shares(report: Report) -> tuple[Shares, ...]:
    """Our shares of the FMA peak and of the floor, by direction, class of layers and layout."""
    classes: dict[tuple[str, int, str], list[Row]] = {}
    for row in report.rows:
        if row.contender == OURS:
            problem = row.problem
            key = (problem.direction, FAMILIES.index(family(problem)), problem.layout)
            classes.setdefault(key, []).append(row)
    return tuple(
        Shares(
            family=FAMILIES[index],
            layout=layout,
            direction=direction,
            count=len(rows),
            least_of_peak=min(row.share_of_peak for row in rows),
            median_of_peak=median(row.share_of_peak for row in rows),
            median_of_floor=median(row.share_of_floor for row in rows),
        )
        for (direction, index, layout), rows in sorted(classes.items())
    )


def short_name(problem: Problem) -> str:
    """For an axis or a table cell: what differs from a forward pass of one NCHW image."""
    notes = [
        problem.kind,
        "" if problem.batch == 1 else f"N={problem.batch}",
        "NHWC" if problem.layout == "NHWC" else "",
        "fwd+bwd" if problem.trains else "",
    ]
    return f"{problem.label}  " + ", ".join(note for note in notes if note)


def percent(share: float) -> str:
    """A share for a reader: 87%."""
    return f"{100 * share:.0f}%"


def ratio(value: float | None) -> str:
    """A ratio for a reader: 3.42×, or nothing."""
    if value is None:
        return ""
    return f"{value:.2f}×" if value < 10 else f"{value:.1f}×"
