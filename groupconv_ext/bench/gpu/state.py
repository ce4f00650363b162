"""What was found so far: a file of JSON lines, one for each thing that is finished.

A line is written whole and reaches the disk before the next begins, so a run may be killed at any
time: the next one skips what is there. A last line that was cut off is dropped; any other line that
cannot be read, or a file from another device, is refused.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..problems import Problem

__all__ = ["FORMAT", "Found", "GpuRow", "Part", "State"]

FORMAT = "groupconv-gpu-1"


@dataclass(frozen=True)
class GpuRow:
    """One contender on one problem; microseconds a call."""

    contender: str
    same_function: bool
    cold: float
    cold_lower: float
    cold_upper: float
    warm: float
    graph: float | None
    why_no_graph: str
    error_over_bound: float


@dataclass(frozen=True)
class Found:
    """Everything about one problem."""

    problem: Problem
    floor_us: float
    bound: str
    rows: tuple[GpuRow, ...]
    refused: dict[str, str]
    wrong: dict[str, str]

    def row(self, contender: str) -> GpuRow | None:
        """A contender's row, if it was timed."""
        return next((row for row in self.rows if row.contender == contender), None)


@dataclass(frozen=True)
class Part:
    """A part of the run: how it ended."""

    name: str
    status: str  # passed, failed, unfinished or left out
    seconds: float
    detail: str = ""


@dataclass
class State:
    """The file, and what it holds."""

    path: Path
    device: str
    conditions: dict[str, str] = field(default_factory=dict)
    limits: dict[str, Any] = field(default_factory=dict)
    found: list[Found] = field(default_factory=list)
    parts: dict[str, Part] = field(default_factory=dict)

    @classmethod
    def open(cls, path: Path, device: str) -> State:
        """Read what is there; ValueError where that is something else."""
        state = cls(path, device)
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            state._append({"format": FORMAT, "device": device})
            return state
        lines = list(_lines(path))
        if not lines or lines[0].get("format") != FORMAT:
            raise ValueError(f"{path} is not a state of the GPU benchmark; nothing was changed")
        if lines[0]["device"] != device:
            raise ValueError(
                f"{path} was begun on {lines[0]['device']} and this is {device}; "
                "start in an empty folder"
            )
        for line in lines[1:]:
            state._take(line)
        return state

    @property
    def done(self) -> set[str]:
        """The names of the problems that need no more time."""
        return {entry.problem.name for entry in self.found}

    def set_conditions(self, conditions: dict[str, str]) -> None:
        """Note the conditions of the run; the first ones are kept."""
        if not self.conditions:
            self._add({"conditions": conditions})

    def set_limits(self, limits: dict[str, Any]) -> None:
        """Note the device's limits."""
        self._add({"limits": limits})

    def add(self, found: Found) -> None:
        """Note a finished problem."""
        self._add({"problem": asdict(found)})

    def end(self, part: Part) -> None:
        """Note how a part ended; the last word counts."""
        self._add({"part": asdict(part)})

    def _add(self, line: dict[str, Any]) -> None:
        self._append(line)
        self._take(json.loads(json.dumps(line)))

    def _append(self, line: dict[str, Any]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def _take(self, line: dict[str, Any]) -> None:
        if "conditions" in line:
            self.conditions = line["conditions"]
        elif "limits" in line:
            self.limits = line["limits"]
        elif "part" in line:
            part = Part(**line["part"])
            self.parts[part.name] = part
        else:
            entry = line["problem"]
            rows = tuple(GpuRow(**row) for row in entry["rows"])
            problem = Problem(**entry["problem"])
            self.found.append(Found(**{**entry, "problem": problem, "rows": rows}))


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    text = path.read_text(encoding="utf-8")
    whole, _, rest = text.rpartition("\n")
    if rest:  # cut off while it was written
        path.write_text(whole + "\n" if whole else "", encoding="utf-8")
    for number, line in enumerate(whole.splitlines(), 1):
        try:
            data = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{path}, line {number} cannot be read: {error}") from error
        if not isinstance(data, dict):
            raise ValueError(f"{path}, line {number} is {data!r}, expected an object")
        yield data
