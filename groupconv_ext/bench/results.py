"""What a run found, as it is stored: rows with their conditions, in JSON and in CSV.

The JSON holds everything and is read back by ``load``; the CSV has one line for each contender on
each problem, for a spreadsheet. Files are written whole or not at all.
"""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

from .machine import Level, Machine
from .overhead import Overhead
from .problems import Problem

FORMAT = "groupconv-bench-1"


@dataclass(frozen=True)
class Row:
    """One contender on one problem. Times are microseconds a call."""

    problem: Problem
    contender: str
    same_function: bool
    rounds: int
    calls: int  # in a row, for one sample
    median_us: float
    lower_us: float
    upper_us: float
    gflops: float
    share_of_peak: float
    floor_us: float
    bound: str
    share_of_floor: float
    ours_is_faster: float | None  # this time over ours, within rounds; None without ours
    error_over_bound: float


@dataclass(frozen=True)
class Absent:
    """A contender that was not timed: it had no place there, or its answer was wrong."""

    problem: Problem
    contender: str
    reason: str


@dataclass(frozen=True)
class Report:
    """A whole run."""

    suite: str
    conditions: dict[str, str]
    machine: Machine
    peaks: dict[str, float]  # problem name → FMA peak, FLOP/s, measured between its rounds
    overhead: tuple[Overhead, ...]
    rows: tuple[Row, ...]
    refused: tuple[Absent, ...]
    wrong: tuple[Absent, ...]

    @cached_property
    def by_problem(self) -> dict[Problem, dict[str, Row]]:
        """Problem → contender → row, in the order they ran."""
        table: dict[Problem, dict[str, Row]] = {}
        for row in self.rows:
            table.setdefault(row.problem, {})[row.contender] = row
        return table

    @property
    def circumstances(self) -> tuple[str, ...]:
        """Processor, threads, instruction set, torch, day: what a picture has to say."""
        threads = self.machine.threads
        return (
            self.machine.cpu,
            "one thread" if threads == 1 else f"{threads} threads",
            self.conditions["instruction set"].partition(":")[0],
            f"torch {self.conditions['torch']}",
            self.conditions["date"][:10],
        )


def save(report: Report, folder: Path) -> tuple[Path, Path]:
    """Write ``bench.json`` and ``bench.csv`` into ``folder``; the paths."""
    json_path, csv_path = folder / "bench.json", folder / "bench.csv"
    write_whole(json_path, json.dumps({"format": FORMAT, **asdict(report)}, indent=1) + "\n")
    write_whole(csv_path, _csv(report))
    return json_path, csv_path


def load(path: Path) -> Report:
    """Read a report that ``save`` wrote; ValueError for any other file."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if data["format"] != FORMAT:
            raise ValueError(f"format is {data['format']!r}, expected {FORMAT!r}")
        return _report(data)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a benchmark report: {error}") from error


def write_whole(path: Path, content: str | bytes) -> None:
    """Write beside ``path``, then rename, so that nobody ever sees half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        partial.write_bytes(content.encode() if isinstance(content, str) else content)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _report(data: Mapping[str, Any]) -> Report:
    machine = data["machine"]
    return Report(
        suite=data["suite"],
        conditions=data["conditions"],
        machine=Machine(**{**machine, "levels": tuple(Level(**x) for x in machine["levels"])}),
        peaks=data["peaks"],
        overhead=tuple(Overhead(**entry) for entry in data["overhead"]),
        rows=tuple(Row(**{**row, "problem": Problem(**row["problem"])}) for row in data["rows"]),
        refused=tuple(_absent(entry) for entry in data["refused"]),
        wrong=tuple(_absent(entry) for entry in data["wrong"]),
    )


def _absent(entry: Mapping[str, Any]) -> Absent:
    return Absent(**{**entry, "problem": Problem(**entry["problem"])})


def _csv(report: Report) -> str:
    problem_fields = [field.name for field in fields(Problem)]
    row_fields = [field.name for field in fields(Row) if field.name != "problem"]
    text = io.StringIO()
    writer = csv.DictWriter(text, ["name", *problem_fields, *row_fields], lineterminator="\n")
    writer.writeheader()
    for row in report.rows:
        flat = asdict(row)
        writer.writerow({"name": row.problem.name, **flat.pop("problem"), **flat})
    return text.getvalue()
