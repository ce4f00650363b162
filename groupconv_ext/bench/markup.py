"""Pieces of a page that several pages are made of: sortable tables, and cards with one number."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

from .summary import percent, ratio


class Cell:
    """A table cell: what it shows, what it sorts by, and its classes."""

    def __init__(self, text: str, value: float | None = None, css: str = "") -> None:
        self.text, self.value, self.css = text, value, css

    def __str__(self) -> str:
        css = f' class="{self.css}"' if self.css else ""
        value = "" if self.value is None else f' data-value="{self.value:.6g}"'
        return f"<td{css}{value}>{escape(self.text)}</td>"


def text_cell(text: str, css: str = "") -> Cell:
    """A cell of words."""
    return Cell(text, css=f"text {css}".strip())


def ratio_cell(value: float | None, css: str = "") -> Cell:
    """A ratio above 1 where ours is faster, marked where it is not."""
    if value is not None and value < 1:
        css = f"{css} loss".strip()
    return Cell(ratio(value), value, css)


def percent_cell(share: float) -> Cell:
    """A share of a limit."""
    return Cell(percent(share), share)


def table(
    heads: Sequence[str],
    rows: Iterable[tuple[str, Sequence[Cell]]],
    *,
    text: Sequence[int],
    element_id: str = "",
) -> str:
    """A sortable table; the columns in ``text`` hold words, the others numbers."""
    head_cells = "".join(
        f'<th class="{"text" if column in text else "number"}">{escape(head)}</th>'
        for column, head in enumerate(heads)
    )
    body = "\n".join(
        f'<tr data-name="{escape(name.lower())}">{"".join(map(str, cells))}</tr>'
        for name, cells in rows
    )
    identity = f' id="{element_id}"' if element_id else ""
    return (
        f'<div class="scroll"><table class="sortable"{identity}><thead><tr>{head_cells}</tr>'
        f"</thead>\n<tbody>\n{body}\n</tbody></table></div>"
    )


def card(number: str, text: str, *, loss: bool) -> str:
    """One number and what it is."""
    css = "card loss" if loss else "card"
    return f'<div class="{css}"><b>{number}</b><span>{escape(text)}</span></div>'
