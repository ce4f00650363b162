"""The HTML page of a run on a GPU; it needs nothing beside it."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from importlib import resources

from ..markup import Cell, card, percent_cell, ratio_cell, table, text_cell
from ..plots import HOW_TO_GET
from ..summary import percent, ratio, short_name
from .rivals import CONTENDERS, OURS
from .state import Found, GpuRow, State
from .summary import Outcome, outcomes, totals

__all__ = ["page"]

_CAPTIONS = {
    "roofline": "Under the slanted line a layer waits for memory, under a level one for "
    "arithmetic; both were measured in this run. A grey line joins the two times of one layer.",
    "layers": "1× is the floor: the larger of the multiply-adds over the rate of a large matrix "
    "product and the bytes, each moved once, over the bandwidth of a large copy.",
    "modes": "A warm cache flatters small layers. From a graph a call costs no Python.",
}


def page(state: State, pictures: Mapping[str, str]) -> str:
    """The page; ``pictures`` are ``<svg>`` elements by name, none without matplotlib."""
    where = resources.files(__package__.rpartition(".")[0])
    css = where.joinpath("page.css").read_text(encoding="utf-8")
    javascript = where.joinpath("page.js").read_text(encoding="utf-8")
    results = outcomes(state)
    return f"""<!DOCTYPE html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>groupconv on {escape(state.device)}</title>
<style>
{css}</style>
<h1>groupconv on a GPU</h1>
<p class="soft wide">{escape(_subtitle(state))}</p>
{_wrong(state)}
<div class="cards">{_cards(results)}</div>
{_figures(pictures)}
<h2>By kind of groups</h2>
{_totals(results)}
<h2>Every layer</h2>
<input id="filter" type="search" placeholder="Filter: 1x1 ragged nhwc …" aria-label="Filter">
{_layers(results)}
<h2>Every contender</h2>
{_contenders(state)}
<h2>Parts of the run</h2>
{_parts(state)}
<h2>How to read it</h2>
{_how_to_read()}
<h2>Conditions</h2>
{_conditions(state)}
<script>
{javascript}</script>
</html>
"""


def _subtitle(state: State) -> str:
    asked = ("torch", "cuDNN", "triton", "date")
    known = [f"{name} {state.conditions[name]}" for name in asked if name in state.conditions]
    return " · ".join([state.device, f"{len(state.found)} layers", *known])


def _wrong(state: State) -> str:
    items = "".join(
        f"<li><b>{escape(name)}</b> on {escape(entry.problem.name)}: {escape(reason)}</li>"
        for entry in state.found
        for name, reason in entry.wrong.items()
    )
    if not items:
        return ""
    return f'<div class="wrong"><b class="loss">Wrong answers, not timed</b><ul>{items}</ul></div>'


def _cards(results: tuple[Outcome, ...]) -> str:
    return "".join(
        card(
            ratio(total.mean),
            f"{total.kind}, {total.direction}, over the best rival of each of {total.count} layers "
            f"(geometric mean); slower on {total.losses}",
            loss=total.mean < 1,
        )
        for total in totals(results)
    )


def _figures(pictures: Mapping[str, str]) -> str:
    if not pictures:
        return f'<p class="soft">No pictures: {escape(HOW_TO_GET)}, or nothing was timed</p>'
    return "\n".join(
        f"<figure>{svg}<figcaption>{_CAPTIONS[name]}</figcaption></figure>"
        for name, svg in pictures.items()
    )


def _totals(results: tuple[Outcome, ...]) -> str:
    rows = [
        (
            total.kind,
            [
                text_cell(total.kind),
                text_cell(total.direction),
                Cell(str(total.count), total.count),
                ratio_cell(total.mean, "best"),
                ratio_cell(total.least),
                Cell(str(total.losses), total.losses),
                percent_cell(total.mean_of_floor),
                text_cell(total.least_name),
            ],
        )
        for total in totals(results)
    ]
    heads = ["groups", "direction", "layers", "mean", "least", "slower on", "of floor", "least at"]
    return table(heads, rows, text=(0, 1, 7))


def _layers(results: tuple[Outcome, ...]) -> str:
    heads = [
        "layer",
        "by",
        "cold",
        "warm",
        "graph",
        "floor",
        "of floor",
        "×\u00a0best",
        "best rival",
    ]
    rows = []
    for outcome in results:
        row, problem = outcome.ours, outcome.found.problem
        cells = [
            text_cell(short_name(problem), "best"),
            text_cell(row.contender),
            *_times(row),
            Cell(f"{outcome.found.floor_us:.1f}", outcome.found.floor_us),
            percent_cell(outcome.share_of_floor),
            ratio_cell(outcome.faster, "best"),
            text_cell(outcome.rival.contender if outcome.rival else ""),
        ]
        rows.append((problem.name, cells))
    return table(heads, rows, text=(0, 1, 8), element_id="problems")


def _times(row: GpuRow) -> list[Cell]:
    graph = Cell("") if row.graph is None else Cell(f"{row.graph:.1f}", row.graph)
    return [Cell(f"{row.cold:.1f}", row.cold, "ours"), Cell(f"{row.warm:.1f}", row.warm), graph]


def _contenders(state: State) -> str:
    heads = ["layer", "contender", "cold µs", "25%", "75%", "warm µs", "graph µs", "of floor"]
    rows = []
    for entry in state.found:
        for row in sorted(entry.rows, key=lambda row: row.cold):
            css = "" if row.same_function else "bound"
            cold, warm, graph = _times(row)
            cells = [
                text_cell(short_name(entry.problem)),
                text_cell(row.contender, css),
                cold,
                Cell(f"{row.cold_lower:.1f}", row.cold_lower),
                Cell(f"{row.cold_upper:.1f}", row.cold_upper),
                warm,
                graph,
                percent_cell(entry.floor_us / row.cold),
            ]
            rows.append((f"{entry.problem.name} {row.contender}", cells))
    refused = "".join(_absences(entry) for entry in state.found)
    details = f"<details><summary>Without a place</summary><dl>{refused}</dl></details>"
    return table(heads, rows, text=(0, 1)) + details


def _absences(entry: Found) -> str:
    name = escape(short_name(entry.problem))
    return "".join(
        f"<dt>{escape(contender)}, {name}</dt><dd>{escape(reason)}</dd>"
        for contender, reason in entry.refused.items()
    )


def _parts(state: State) -> str:
    rows = [
        (
            part.name,
            [
                text_cell(part.name),
                text_cell(part.status, "loss" if part.status == "failed" else ""),
                Cell(f"{part.seconds:.0f} s", part.seconds),
                text_cell(part.detail),
            ],
        )
        for part in state.parts.values()
    ]
    return table(["part", "status", "time", "detail"], rows, text=(0, 1, 3))


def _how_to_read() -> str:
    about = "".join(
        f"<dt>{escape(c.name)}{'' if c.same_function else ' (a bound)'}</dt>"
        f"<dd>{escape(c.about)}</dd>"
        for c in CONTENDERS
    )
    return f"""<p>Ours is the faster of {escape(" and ".join(OURS))}. Every answer was compared with
float64 on a few images before anything was timed. Times are microseconds; <b>cold</b> is the median
of interleaved rounds, each after the L2 cache was overwritten, and every ratio and share is taken
of it. A bound (italic) computes an easier function, with the permutation left out.</p>
<dl>{about}</dl>"""


def _conditions(state: State) -> str:
    entries = dict(state.conditions)
    if state.limits:
        entries["copy"] = f"{state.limits['memory'] / 1e12:.3g} TB/s"
        for dtype, rate in state.limits["rates"].items():
            entries[f"matrix product, {dtype}"] = f"{rate / 1e12:.3g} TFLOP/s"
    shares = [outcome.share_of_floor for outcome in outcomes(state)]
    if shares:
        entries["of the floor"] = f"{percent(min(shares))} to {percent(max(shares))}"
    items = "".join(f"<dt>{escape(k)}</dt><dd>{escape(v)}</dd>" for k, v in entries.items())
    return f"<dl>{items}</dl>"
