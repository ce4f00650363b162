"""A paper's table beside ours: figures, how they are compared, and how they are printed.

A paper prints a figure with a few digits, ``"363M"``; ours is a whole number. They agree where ours
rounds to what is printed. Where they do not agree a figure says why, or the table is wrong. Many
figures are known to the last unit from the network's structure, by arithmetic on paper; then ours
has to be exactly that, whatever the paper rounds.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from ..bench.terminal import table as aligned

__all__ = ["Figure", "Row", "Table"]

ABOUT = 0.1  # how far from the truth the papers print their "≈"
_UNITS = {"": 1.0, "K": 1e3, "M": 1e6, "G": 1e9, "×": 1.0}


@dataclass(frozen=True)
class Figure:
    """One number of a paper and ours.

    Attributes:
        ours: What this library counts.
        printed: As the paper has it, ``"5.35M"``, or ``"≈4700"``; empty where it has none.
        exact: What arithmetic on the network's structure gives.
        because: Why ours is another than the printed one.
        unit: What one of the printed figure is, where the table's head says so and not the figure.
    """

    ours: float
    printed: str = ""
    exact: float | None = None
    because: str = ""
    unit: float = 1.0

    @property
    def agrees(self) -> bool:
        """Whether ours rounds to the printed one; also where nothing is printed."""
        if not self.printed:
            return True
        value, last = _parse(self.printed.removeprefix("≈"), self.unit)
        about = ABOUT * value if self.printed.startswith("≈") else 0.0
        return abs(self.ours - value) <= max(last / 2, about) * (1 + 1e-9)

    @property
    def unexplained(self) -> str:
        """What is wrong, in words; empty where all is well."""
        if self.exact is not None and self.ours != self.exact:
            return f"counted {_number(self.ours)}; the structure has {_number(self.exact)}"
        if not self.agrees and not self.because:
            return f"counted {_number(self.ours)}; the paper prints {self.printed}"
        if self.because and self.exact is None:
            return f"counted {_number(self.ours)}; an explanation holds for one exact figure only"
        if self.because and self.agrees:
            return f"{self.printed} agrees with {_number(self.ours)} and needs no explanation"
        return ""


def _parse(printed: str, unit: float) -> tuple[float, float]:
    """The number, and what one in its last place is worth."""
    matched = re.fullmatch(r"(\d+)(?:\.(\d+))?([KMG×]?)", printed)
    if matched is None:
        raise ValueError(f"printed is {printed!r}; expected a number such as '5.35M'")
    whole, fraction, suffix = matched.groups()
    unit *= _UNITS[suffix]
    places = len(fraction or "")
    return float(f"{whole}.{fraction or 0}") * unit, unit / 10**places


@dataclass(frozen=True)
class Row:
    """A line of a table: its name, and a figure in every column (``None``: nothing there)."""

    name: str
    figures: Sequence[Figure | None]


@dataclass(frozen=True)
class Table:
    """A table of a paper.

    Attributes:
        title: Where it stands.
        convention: What is counted in it, and at which input size.
        columns: The heads of the figures.
        rows: Its lines, as in the paper.
        remarks: What the paper leaves open or contradicts.
    """

    title: str
    convention: str
    columns: Sequence[str]
    rows: Sequence[Row]
    remarks: Sequence[str] = ()

    @property
    def unexplained(self) -> list[str]:
        """Every difference that nothing explains."""
        return [
            f"{self.title}, {row.name}, {column}: {figure.unexplained}"
            for row in self.rows
            for column, figure in zip(self.columns, row.figures, strict=True)
            if figure is not None and figure.unexplained
        ]

    def text(self) -> str:
        """The table for a terminal: the paper's figure beside ours, marks and notes below."""
        notes: list[str] = []
        head = [""]
        for column in self.columns:
            head += [f"{column}, paper", "ours", ""]
        body = [self._line(row, notes) for row in self.rows]
        numbered = [f"[{number}] {note}" for number, note in enumerate(notes, 1)]
        drawn = aligned(head, body, left=(0,))
        return "\n".join([self.title, self.convention, "", drawn, *self.remarks, *numbered])

    def _line(self, row: Row, notes: list[str]) -> list[str]:
        cells = [row.name]
        for figure in row.figures:
            if figure is None:
                cells += ["", "", ""]
                continue
            mark = "WRONG" if figure.unexplained else "=" if figure.printed else ""
            if figure.because and not figure.unexplained:
                if figure.because not in notes:
                    notes.append(figure.because)
                mark = f"[{notes.index(figure.because) + 1}]"
            cells += [figure.printed or "–", _number(figure.ours), mark]
        return cells


def _number(value: float) -> str:
    return f"{value:.3g}" if value < 10 else f"{value:,.0f}"
