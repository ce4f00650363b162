"""``python -m groupconv_ext.bench.gpu``: the parts of ``benches/gpu.sh`` that are Python.

limits    measure what the device can do at most
layers    time the layers, as far as the time goes; take up where the last run stopped
part      note how another part of the run ended
report    write gpu.json, gpu.csv, gpu.html and the pictures, and print the short table
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from time import monotonic

import torch

from .. import plots
from ..problems import Problem
from ..results import write_whole
from . import pictures, suite
from .clock import Clock
from .device import Limits, conditions, device_name, measure_limits
from .layers import run_layers
from .page import page
from .rivals import contenders
from .state import GpuRow, Part, State
from .summary import table

_UNFINISHED = 3
"""The exit status of a part that ran out of time: call it again."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Do one part."""
    given = _arguments(arguments)
    if not given.dry_run and not torch.cuda.is_available():
        print("there is no GPU here; --dry-run shows on the CPU that it works", file=sys.stderr)
        return 2
    device = torch.device("cpu" if given.dry_run else "cuda")
    name = f"{device_name(device)}, dry run" if given.dry_run else device_name(device)
    try:
        state = State.open(given.out / "state.jsonl", name)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    for part, status, seconds, detail in given.note:
        state.end(Part(part, status, float(seconds), detail))
    started = monotonic()
    match given.command:
        case "limits":
            state.set_conditions(conditions(device))
            state.set_limits(asdict(measure_limits(device)))
            state.end(Part("limits", "passed", monotonic() - started))
        case "layers":
            return _layers(state, device, given, started)
        case "report":
            _report(state, given.out)
    return 0


def _arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m groupconv_ext.bench.gpu")
    parser.add_argument("command", choices=("limits", "layers", "parts", "report"))
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--dry-run", action="store_true", help="tiny layers, on the CPU")
    parser.add_argument("--seconds", type=float, default=480, help="layers: stop before that")
    parser.add_argument("--filter", action="append", default=[], metavar="TEXT")
    parser.add_argument("--compiled", action="store_true", help="layers: torch.compile too; slow")
    parser.add_argument("--tuned", action="store_true", help="layers: measure Triton's launches")
    parser.add_argument(
        "--note",
        nargs=4,
        action="append",
        default=[],
        metavar=("PART", "STATUS", "SECONDS", "DETAIL"),
        help="how a part ended: passed, failed, unfinished or left out",
    )
    return parser.parse_args(arguments)


def _layers(state: State, device: torch.device, given: argparse.Namespace, started: float) -> int:
    if not state.limits:
        state.set_conditions(conditions(device))
        state.set_limits(asdict(measure_limits(device)))
    clock = Clock(device)
    if given.dry_run:
        clock = Clock(device, rounds=3, warm_up=1, warm_calls=1, flush_bytes=1 << 16)
    problems: tuple[Problem, ...] = suite.DRY if given.dry_run else suite.SUITE
    problems = tuple(p for p in problems if all(word in p.name for word in given.filter))
    whole = run_layers(
        state,
        problems,
        contenders(device, with_compiled=given.compiled, with_tuned=given.tuned),
        clock,
        Limits(**state.limits),
        started + given.seconds,
        lambda line: print(line, flush=True),
    )
    wrong = sum(len(entry.wrong) for entry in state.found)
    status = "failed" if wrong else "passed" if whole else "unfinished"
    detail = f"{len(state.found)} of {len(problems)} layers, {wrong} wrong answers"
    state.end(Part("layers", status, monotonic() - started, detail))
    return 1 if wrong else 0 if whole else _UNFINISHED


def _report(state: State, out: Path) -> None:
    write_whole(out / "gpu.json", json.dumps(_data(state), indent=1) + "\n")
    write_whole(out / "gpu.csv", _csv(state))
    figures = pictures.draw(state) if plots.HAVE_MATPLOTLIB else {}
    for name, figure in figures.items():
        write_whole(out / f"{name}.png", plots.png(figure))
    drawn = {name: plots.svg(figure) for name, figure in figures.items()}
    write_whole(out / "gpu.html", page(state, drawn))
    print(table(state))


def _data(state: State) -> dict[str, object]:
    return {
        "device": state.device,
        "conditions": state.conditions,
        "limits": state.limits,
        "parts": [asdict(part) for part in state.parts.values()],
        "problems": [{"name": entry.problem.name, **asdict(entry)} for entry in state.found],
    }


def _csv(state: State) -> str:
    problem_fields = [field.name for field in fields(Problem)]
    row_fields = [field.name for field in fields(GpuRow)]
    text = io.StringIO()
    heads = ["name", *problem_fields, "floor_us", "bound", *row_fields]
    writer = csv.DictWriter(text, heads, lineterminator="\n")
    writer.writeheader()
    for entry in state.found:
        shared = {"name": entry.problem.name, "floor_us": entry.floor_us, "bound": entry.bound}
        for row in entry.rows:
            writer.writerow({**shared, **asdict(entry.problem), **asdict(row)})
    return text.getvalue()


if __name__ == "__main__":
    sys.exit(main())
