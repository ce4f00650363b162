"""A report as plain text, for a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from .results import Report, Row
from .rivals import OURS
from .summary import best_rival, percent, ratio, shares, short_name, versus


def text(report: Report) -> str:
    """The whole report as plain text: problems, then shares, then ratios, then what went wrong."""
    parts = [_machine_lines(report), _problem_table(report)]
    if any(row.contender == OURS for row in report.rows):
        parts += [_shares_table(report), _versus_table(report), _overhead_table(report)]
    parts += [
        f"WRONG: {entry.contender} on {entry.problem.name}: {entry.reason}"
        for entry in report.wrong
    ]
    return "\n\n".join(parts)


def _machine_lines(report: Report) -> str:
    machine = report.machine
    levels = ", ".join(f"{x.name} {x.bytes_per_second / 1e9:.0f} GB/s" for x in machine.levels)
    isa = report.conditions["instruction set"].partition(":")[0]
    threads = "one thread" if machine.threads == 1 else f"{machine.threads} threads"
    return (
        f"{machine.cpu}, {isa}, {threads}: FMA peak {machine.flops_per_second / 1e9:.0f} GFLOP/s, "
        f"copy {levels}"
    )


def _problem_table(report: Report) -> str:
    head = ["layer", "kind", "N", "layout", "direction", "µs", "GFLOP/s", "of peak", "of floor"]
    head += ["× aten", "× best", "best of PyTorch"]
    body = []
    for problem, rows in report.by_problem.items():
        ours, aten, best = rows.get(OURS), rows.get("aten"), best_rival(rows.values())
        body.append(
            [
                problem.label,
                problem.kind,
                str(problem.batch),
                problem.layout,
                "fwd+bwd" if problem.trains else "fwd",
                *_our_numbers(ours),
                ratio(aten.ours_is_faster if aten else None),
                ratio(best.ours_is_faster if best else None),
                f"{best.contender} {best.median_us:.0f} µs" if best else "",
            ]
        )
    return table(head, body, left=(0, 1, 3, 4, 11))


def _our_numbers(row: Row | None) -> list[str]:
    if row is None:
        return [""] * 4
    return [
        f"{row.median_us:.0f}" if row.median_us >= 100 else f"{row.median_us:.1f}",
        f"{row.gflops:.0f}" if row.gflops >= 10 else f"{row.gflops:.1f}",
        percent(row.share_of_peak),
        percent(row.share_of_floor),
    ]


def _shares_table(report: Report) -> str:
    head = ["class of layers", "layout", "direction", "layers"]
    head += ["least of peak", "median of peak", "median of floor"]
    body = [
        [
            entry.family,
            entry.layout,
            entry.direction,
            str(entry.count),
            percent(entry.least_of_peak),
            percent(entry.median_of_peak),
            percent(entry.median_of_floor),
        ]
        for entry in shares(report)
    ]
    return table(head, body, left=(0, 1, 2))


def _versus_table(report: Report) -> str:
    head = ["ours against", "direction", "layers", "geometric mean", "least", "losses", "least at"]
    body = [
        [
            entry.contender + ("" if entry.same_function else " (a bound)"),
            entry.direction,
            str(entry.count),
            ratio(entry.geometric_mean),
            ratio(entry.least),
            str(entry.losses),
            short_name(entry.least_problem),
        ]
        for entry in versus(report)
    ]
    return table(head, body, left=(0, 1, 6))


def _overhead_table(report: Report) -> str:
    head = ["a call on one pixel", "groups", "ours, µs", "F.conv2d, µs", "ratio"]
    body = [
        [
            entry.mode,
            str(entry.groups),
            f"{entry.ours_us:.2f}",
            f"{entry.theirs_us:.2f}",
            ratio(entry.ratio),
        ]
        for entry in report.overhead
    ]
    return table(head, body, left=(0,))


def table(head: Sequence[str], body: Sequence[Sequence[str]], left: Sequence[int]) -> str:
    """Columns as wide as they need to be; those in ``left`` flush left, numbers flush right."""
    lines = [head, *body]
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]

    def line(cells: Sequence[str]) -> str:
        aligned = (
            cell.ljust(width) if column in left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(cells, widths, strict=True))
        )
        return "  ".join(aligned).rstrip()

    rule = "  ".join("─" * width for width in widths)
    return "\n".join([line(head), rule, *(line(cells) for cells in body)])
