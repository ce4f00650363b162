"""One page with everything a run found. It needs nothing beside it: no network, no other file."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from html import escape
from importlib import resources

from .markup import Cell, card, percent_cell, ratio_cell, table, text_cell
from .plots import HOW_TO_GET
from .problems import Problem
from .results import Report, Row
from .rivals import CONTENDERS, OURS
from .summary import BEST_RIVAL, best_rival, ratio, shares, short_name, versus

_CAPTIONS = {
    "speed-up": "Each bar is one problem: our speed over that of the fastest PyTorch way to "
    "compute the same function, orange where ours is slower. The dot is the usual way. Dashed, the "
    "geometric mean.",
    "share-of-peak": "Multiply-adds that the layer needs, over the time taken, as a share of what "
    "the processor's multiply-add units could do in it.",
    "roofline": "Under the slanted lines a layer waits for memory, under the level one for "
    "arithmetic. A grey line joins the two times of one problem.",
    "heat-map-nchw": "Each number is a share, in percent, of what the processor's "
    "multiply-add units could do, over 256 channels. Maps shrink downwards, groups grow to the "
    "right.",
    "heat-map-nhwc": "The same with channels_last images.",
}


def page(report: Report, pictures: Mapping[str, str]) -> str:
    """The page; ``pictures`` are ``<svg>`` elements by name, none without matplotlib."""
    where = resources.files(__package__)
    css = where.joinpath("page.css").read_text(encoding="utf-8")
    javascript = where.joinpath("page.js").read_text(encoding="utf-8")
    return f"""<!DOCTYPE html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>groupconv bench: {escape(report.machine.cpu)}</title>
<style>
{css}</style>
<h1>groupconv bench</h1>
<p class="soft wide">{_subtitle(report)}</p>
{_wrong(report)}
{_cards(report)}
{_figures(pictures)}
<h2>Against each contender</h2>
{_versus_table(report)}
<h2>Shares of the limits</h2>
{_shares_table(report)}
<h2>What a call costs</h2>
{_overhead_table(report)}
<h2>Every problem</h2>
<input id="filter" type="search" placeholder="Filter: 1x1 ragged n16 …" aria-label="Filter">
{_problem_table(report)}
<h2>How to read it</h2>
{_how_to_read(report)}
<h2>Conditions</h2>
{_conditions(report)}
<script>
{javascript}</script>
</html>
"""


def _subtitle(report: Report) -> str:
    suite = f"{len(report.by_problem)} problems of the {report.suite} suite"
    return escape(" · ".join((suite, *report.circumstances)))


def _wrong(report: Report) -> str:
    if not report.wrong:
        return ""
    items = "".join(
        f"<li><b>{escape(entry.contender)}</b> on {escape(entry.problem.name)}: "
        f"{escape(entry.reason)}</li>"
        for entry in report.wrong
    )
    return f'<div class="wrong"><b class="loss">Wrong answers, not timed</b><ul>{items}</ul></div>'


def _cards(report: Report) -> str:
    cards = []
    for entry in versus(report):
        if entry.contender in (BEST_RIVAL, "aten"):
            cards.append(
                card(
                    ratio(entry.geometric_mean),
                    f"{entry.direction}, over {entry.contender} (geometric mean of {entry.count})",
                    loss=entry.geometric_mean < 1,
                )
            )
        if entry.contender == BEST_RIVAL:
            cards.append(
                card(
                    ratio(entry.least),
                    f"{entry.direction}, the least: {short_name(entry.least_problem)}; "
                    f"slower on {entry.losses} of {entry.count}",
                    loss=entry.least < 1,
                )
            )
    return f'<div class="cards">{"".join(cards)}</div>' if cards else ""


def _figures(pictures: Mapping[str, str]) -> str:
    if not pictures:
        return f'<p class="soft">No pictures: {escape(HOW_TO_GET)}</p>'
    return "\n".join(
        f"<figure>{svg}<figcaption>{_CAPTIONS[name]}</figcaption></figure>"
        for name, svg in pictures.items()
    )


# ---- tables --------------------------------------------------------------------------------------


def _versus_table(report: Report) -> str:
    rows = [
        (
            entry.contender,
            [
                text_cell(entry.contender, "" if entry.same_function else "bound"),
                text_cell(entry.direction),
                Cell(str(entry.count), entry.count),
                ratio_cell(entry.geometric_mean, "best"),
                ratio_cell(entry.least),
                Cell(str(entry.losses), entry.losses),
                text_cell(short_name(entry.least_problem)),
            ],
        )
        for entry in versus(report)
    ]
    return table(
        ["ours against", "direction", "problems", "mean", "least", "slower on", "least at"],
        rows,
        text=(0, 1, 6),
    )


def _shares_table(report: Report) -> str:
    rows = [
        (
            entry.family,
            [
                text_cell(entry.family),
                text_cell(entry.layout),
                text_cell(entry.direction),
                Cell(str(entry.count), entry.count),
                percent_cell(entry.least_of_peak),
                percent_cell(entry.median_of_peak),
                percent_cell(entry.median_of_floor),
            ],
        )
        for entry in shares(report)
    ]
    return table(
        [
            *("class of layers", "layout", "direction", "layers"),
            *("least of peak", "median of peak", "median of floor"),
        ],
        rows,
        text=(0, 1, 2),
    )


def _overhead_table(report: Report) -> str:
    rows = [
        (
            entry.mode,
            [
                text_cell(entry.mode),
                Cell(str(entry.groups), entry.groups),
                Cell(f"{entry.ours_us:.2f}", entry.ours_us, "ours"),
                Cell(f"{entry.theirs_us:.2f}", entry.theirs_us),
                Cell(ratio(entry.ratio), entry.ratio),
            ],
        )
        for entry in report.overhead
    ]
    heads = ["a call on one pixel", "groups", "ours, µs", "F.conv2d, µs", "ours / theirs"]
    return table(heads, rows, text=(0,))


def _problem_table(report: Report) -> str:
    present = {row.contender for row in report.rows} - {OURS}
    rivals = [name for name in CONTENDERS if name in present]
    rivals += sorted(present - set(rivals))
    heads = ["layer", "kind", "layout", "pass", "N", "µs", "GFLOP/s", "of peak", "of floor"]
    heads += ["×\u00a0best", "best of PyTorch", *(f"×\u00a0{name}" for name in rivals), "network"]
    lines = [
        (
            problem.name,
            [
                *_problem_cells(problem),
                *_our_cells(rows),
                *_rival_cells(rows, rivals),
                text_cell(problem.network),
            ],
        )
        for problem, rows in report.by_problem.items()
    ]
    return table(heads, lines, text=(0, 1, 2, 3, 10, len(heads) - 1), element_id="problems")


def _problem_cells(problem: Problem) -> list[Cell]:
    return [
        text_cell(problem.label, "best"),
        text_cell(problem.kind),
        text_cell(problem.layout),
        text_cell("fwd+bwd" if problem.trains else "fwd"),
        Cell(str(problem.batch), problem.batch),
    ]


def _our_cells(rows: Mapping[str, Row]) -> list[Cell]:
    row = rows.get(OURS)
    if row is None:
        return [Cell("")] * 4
    return [
        Cell(f"{row.median_us:.1f}", row.median_us, "ours"),
        Cell(f"{row.gflops:.1f}", row.gflops),
        percent_cell(row.share_of_peak),
        percent_cell(row.share_of_floor),
    ]


def _rival_cells(rows: Mapping[str, Row], rivals: Sequence[str]) -> list[Cell]:
    best = best_rival(rows.values())
    cells = [
        ratio_cell(best.ours_is_faster if best else None, "best"),
        text_cell(best.contender if best else ""),
    ]
    for name in rivals:
        row = rows.get(name)
        is_bound = row is not None and not row.same_function
        cells.append(ratio_cell(row.ours_is_faster if row else None, "bound" if is_bound else ""))
    return cells


# ---- words ---------------------------------------------------------------------------------------


def _how_to_read(report: Report) -> str:
    present = {row.contender for row in report.rows}
    contenders = "".join(
        f"<dt>{escape(name)}{'' if contender.same_function else ' (a bound)'}</dt>"
        f"<dd>{escape(contender.about)}</dd>"
        for name, contender in CONTENDERS.items()
        if name in present
    )
    counts = Counter((entry.contender, entry.reason) for entry in report.refused)
    refused = "".join(
        f"<dt>{escape(name)}, {count} times</dt><dd>{escape(reason)}</dd>"
        for (name, reason), count in sorted(counts.items())
    )
    return f"""<p>Every answer was compared with float64 before anything was timed. Contenders then
took turns in rounds; times are medians over the rounds, and a ratio (×) is the median of the ratios
within each round, above 1 where ours is faster. A bound (italic) computes an easier function, with
the permutation left out.</p>
<p>The floor of a problem is the larger of two times: its multiply-adds over the FMA peak, measured
between its rounds, and its bytes, each moved once, over the copy bandwidth of the smallest memory
level that holds them. A kernel that reads more than it writes can beat a copy's bandwidth a
little.</p>
<dl>{contenders}</dl>
<details><summary>Contenders without a place</summary><dl>{refused}</dl></details>"""


def _conditions(report: Report) -> str:
    entries = dict(report.conditions)
    entries["FMA peak"] = f"{report.machine.flops_per_second / 1e9:.1f} GFLOP/s"
    for level in report.machine.levels:
        size = "" if level.capacity is None else f" ({level.capacity >> 10} KiB)"
        entries[f"copy, {level.name}{size}"] = f"{level.bytes_per_second / 1e9:.1f} GB/s"
    items = "".join(f"<dt>{escape(k)}</dt><dd>{escape(v)}</dd>" for k, v in entries.items())
    return f"<dl>{items}</dl>"
