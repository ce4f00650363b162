"""What a run on a GPU says in a few numbers. A ratio above 1 means that ours is faster."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ..summary import geometric_mean, percent, ratio, short_name
from .rivals import OURS
from .state import Found, GpuRow, State

__all__ = ["Outcome", "Total", "outcomes", "table", "totals"]


@dataclass(frozen=True)
class Outcome:
    """One problem: ours at its best, and the best of all others that compute the same."""

    found: Found
    ours: GpuRow
    rival: GpuRow | None

    @property
    def faster(self) -> float | None:
        """How many times faster ours is, with a cold cache."""
        return None if self.rival is None else self.rival.cold / self.ours.cold

    @property
    def share_of_floor(self) -> float:
        """The floor over our time, with a cold cache."""
        return self.found.floor_us / self.ours.cold


@dataclass(frozen=True)
class Total:
    """All problems of one kind in one direction."""

    kind: str
    direction: str
    count: int
    mean: float
    least: float
    least_name: str
    losses: int
    mean_of_floor: float


def outcomes(state: State) -> tuple[Outcome, ...]:
    """Every problem that a kernel of ours was timed on."""
    found = []
    for entry in state.found:
        ours = _least(row for row in entry.rows if row.contender in OURS)
        rivals = (r for r in entry.rows if r.contender not in OURS and r.same_function)
        if ours is not None:
            found.append(Outcome(entry, ours, _least(rivals)))
    return tuple(found)


def _least(rows: Iterable[GpuRow]) -> GpuRow | None:
    return min(rows, key=lambda row: row.cold, default=None)


def totals(results: Sequence[Outcome]) -> tuple[Total, ...]:
    """Geometric means by kind of groups and direction; every loss is counted."""
    groups: dict[tuple[str, str], list[Outcome]] = {}
    for outcome in results:
        if outcome.rival is not None:
            problem = outcome.found.problem
            groups.setdefault((problem.kind, problem.direction), []).append(outcome)
    return tuple(_total(*key, members) for key, members in groups.items())


def _total(kind: str, direction: str, members: Sequence[Outcome]) -> Total:
    ratios = [(outcome.faster or 0.0, outcome) for outcome in members]
    least, worst = min(ratios, key=lambda pair: pair[0])
    return Total(
        kind,
        direction,
        len(members),
        geometric_mean(value for value, _ in ratios),
        least,
        short_name(worst.found.problem),
        sum(value < 1 for value, _ in ratios),
        geometric_mean(outcome.share_of_floor for outcome in members),
    )


def table(state: State) -> str:
    """The short table that ends a run."""
    lines = [f"device: {state.device}"]
    lines += [
        f"  {part.name:10} {part.status:10} {part.seconds:6.0f} s  {part.detail}".rstrip()
        for part in state.parts.values()
    ]
    results = outcomes(state)
    for total in totals(results):
        lines.append(
            f"{total.kind:12} {total.direction:17} {total.count:3} layers  "
            f"{ratio(total.mean)} the best rival (least {ratio(total.least)}, slower on "
            f"{total.losses}), {percent(total.mean_of_floor)} of the floor"
        )
    lines += [
        f"slower: {short_name(o.found.problem)}: {ratio(o.faster)} of {o.rival.contender}"
        for o in sorted(results, key=lambda o: o.faster or 1)
        if o.rival is not None and o.faster is not None and o.faster < 1
    ]
    wrong = [(entry, name) for entry in state.found for name in entry.wrong]
    lines += [
        f"WRONG: {name} on {entry.problem.name}: {entry.wrong[name]}" for entry, name in wrong
    ]
    return "\n".join(lines)
