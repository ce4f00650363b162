"""The command line: ``groupconv <command>``. A command is one entry of ``COMMANDS``."""

from __future__ import annotations

import argparse
import ast
import io
import pickle
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch
from torch import nn

from . import __version__, _ops, bench, models, tables
from .bench import machine, plots, problems, publish, results, suites, terminal
from .doctor import doctor
from .inspection import inspect, page
from .models.names import check_known


@dataclass(frozen=True)
class Command:
    """A subcommand: its arguments, and what it does; ``run`` returns the exit status."""

    name: str
    help: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]


class UserError(Exception):
    """Something the caller can put right; printed without a traceback, exit status 2."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status: 0, 1 for a failed run, 2 for a wrong call."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal without × still gets its table
    parser = _parser()
    parsed = parser.parse_args(arguments)
    try:
        return int(parsed.command.run(parsed))
    except UserError as error:
        print(f"groupconv {parsed.command.name}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="groupconv",
        description="Convolutions whose channel groups are learned, permuted or uneven.",
    )
    parser.add_argument("--version", action="version", version=f"groupconv-ext {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="<command>", required=True)
    for command in COMMANDS:
        subparser = commands.add_parser(command.name, help=command.help, description=command.help)
        command.add_arguments(subparser)
        subparser.set_defaults(command=command)
    return parser


# ---- bench ---------------------------------------------------------------------------------------


def _bench_arguments(parser: argparse.ArgumentParser) -> None:
    suite = parser.add_mutually_exclusive_group()
    suite.add_argument(
        "--suite", choices=suites.SUITES, default="quick", help="default: %(default)s"
    )
    suite.add_argument(
        "--quick",
        dest="suite",
        action="store_const",
        const="quick",
        help="the same as --suite quick: less than two minutes",
    )
    parser.add_argument(
        "--filter",
        action="append",
        default=[],
        metavar="TEXT",
        help="only problems whose name holds TEXT, as --list shows it; several must all occur",
    )
    parser.add_argument(
        "--direction",
        choices=get_args(problems.Direction),
        help="only this one",
    )
    parser.add_argument(
        "--layout",
        choices=get_args(problems.Layout),
        help="only this one",
    )
    parser.add_argument(
        "--dtype",
        choices=get_args(problems.Dtype),
        help="every problem in this one; default: what the suite says, float32 nearly everywhere",
    )
    parser.add_argument(
        "--threads", type=_positive, default=1, metavar="N", help="default: %(default)s"
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("groupconv-bench"),
        metavar="FOLDER",
        help="where to leave the report, tables and pictures; default: %(default)s",
    )
    parser.add_argument(
        "--no-progress",
        dest="progress",
        action="store_false",
        help="no progress bar (there is none either when stderr is not a terminal)",
    )
    parser.add_argument("--list", action="store_true", help="print the problems and time nothing")


def _bench(arguments: argparse.Namespace) -> int:
    chosen = suites.select(
        suites.SUITES[arguments.suite],
        words=arguments.filter,
        direction=arguments.direction,
        layout=arguments.layout,
        dtype=arguments.dtype,
    )
    if not chosen:
        raise UserError(
            f"no problem of the {arguments.suite} suite matches; "
            f"`groupconv bench --suite {arguments.suite} --list` prints their names"
        )
    if arguments.list:
        print("\n".join(problem.name for problem in chosen))
        return 0
    _check_writable(arguments.out)
    if _ops.unavailable is not None:
        raise UserError(f"there is nothing to time: {_ops.unavailable}")
    options = bench.Options(threads=arguments.threads, show_progress=arguments.progress)
    report = bench.run(arguments.suite, chosen, bench.CONTENDERS.values(), options)
    print(terminal.text(report))
    paths = publish.publish(report, arguments.out)
    if not plots.HAVE_MATPLOTLIB:
        print(f"\nno pictures: {plots.HOW_TO_GET}")
    print(f"\nreport: {paths[-1]}")
    return 1 if report.wrong else 0


def _check_writable(folder: Path) -> None:
    """Find out before the run, not after it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(f"cannot write to --out {folder}: {error.strerror}") from error


def _positive(text: str) -> int:
    number = int(text) if text.isdecimal() else 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive whole number")
    return number


# ---- tables --------------------------------------------------------------------------------------


def _tables_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "papers",
        nargs="*",
        metavar="PAPER",
        help=f"only these: {', '.join(tables.PAPERS)}; default: all",
    )


def _tables(arguments: argparse.Namespace) -> int:
    for paper in arguments.papers:
        try:
            check_known("paper", paper, tables.PAPERS)
        except ValueError as error:
            raise UserError(str(error)) from error
    unexplained = []
    for paper in arguments.papers or tables.PAPERS:
        for table in tables.PAPERS[paper]():
            print(table.text(), end="\n\n", flush=True)
            unexplained += table.unexplained
    for line in unexplained:
        print(f"unexplained: {line}", file=sys.stderr)
    if not unexplained:
        print("= agrees with the printed figure; [n] differs, for the reason below its table")
    return 1 if unexplained else 0


# ---- inspect -------------------------------------------------------------------------------------


def _inspect_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="a name of groupconv_ext.models.list()")
    parser.add_argument(
        "--set",
        dest="options",
        action="append",
        default=[],
        metavar="OPTION=VALUE",
        help="an option of the model, such as groups=8; several may be given",
    )
    parser.add_argument(
        "--size", type=_positive, metavar="N", help="of the images; default: its own"
    )
    parser.add_argument("--weights", type=Path, metavar="FILE", help="a state dict of the model")
    parser.add_argument(
        "--rounds", type=_positive, default=9, metavar="N", help="default: %(default)s"
    )
    parser.add_argument(
        "--threads", type=_positive, default=1, metavar="N", help="default: %(default)s"
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="the page; default: MODEL.html")


def _inspect(arguments: argparse.Namespace) -> int:
    options: dict[str, Any] = dict(_option(text) for text in arguments.options)
    out = arguments.out or Path(f"{arguments.model}.html")
    try:
        model = models.create(arguments.model, **options)
    except (ValueError, TypeError) as error:
        raise UserError(str(error)) from error
    _check_writable(out.parent)
    if arguments.weights is None:
        models.condense(model)  # a network that has not been trained has nothing to lose by it
    else:
        _load(model, arguments.weights)
    torch.set_num_threads(arguments.threads)
    size = arguments.size or models.entry(arguments.model).input_size
    said = ", ".join([arguments.model, *arguments.options])
    try:
        found = inspect(
            model,
            size,
            title=said,
            rounds=arguments.rounds,
            conditions=machine.conditions(arguments.threads),
        )
    except ValueError as error:
        raise UserError(str(error)) from error
    results.write_whole(out, page(found))
    print(f"{found.before_ms:.2f} ms before conversion, {found.after_ms:.2f} ms after; page: {out}")
    return 0


def _option(text: str) -> tuple[str, object]:
    name, equals, value = text.partition("=")
    if not (name and equals):
        raise UserError(f"--set {text!r} is no option; expected OPTION=VALUE, such as groups=8")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value


def _load(model: nn.Module, path: Path) -> None:
    try:
        model.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    except (OSError, RuntimeError, ValueError, TypeError, pickle.UnpicklingError) as error:
        raise UserError(f"--weights {path} does not fit: {error}") from error


# ---- doctor --------------------------------------------------------------------------------------


def _doctor_arguments(parser: argparse.ArgumentParser) -> None:
    del parser  # takes none


def _doctor(arguments: argparse.Namespace) -> int:
    del arguments
    print(doctor())
    return 0


COMMANDS = (
    Command(
        "bench",
        "Time the kernels against every other way to compute the same layers.",
        _bench_arguments,
        _bench,
    ),
    Command(
        "tables",
        "Count every network of the papers, beside the figures they print.",
        _tables_arguments,
        _tables,
    ),
    Command(
        "inspect",
        "A network as a page: its layers, their groups, counts and times, before and after.",
        _inspect_arguments,
        _inspect,
    ),
    Command(
        "doctor",
        "Say what was built, what this machine can run, and why.",
        _doctor_arguments,
        _doctor,
    ),
)
