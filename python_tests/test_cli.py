"""The command line: what it prints, what it leaves, and how it fails."""

from __future__ import annotations

import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

import groupconv_ext
from groupconv_ext import _ops, bench, cli
from groupconv_ext.bench import suites
from groupconv_ext.bench.methods import Case, Method
from groupconv_ext.bench.problems import Problem
from groupconv_ext.bench.rivals import Contender
from groupconv_ext.bench.timing import Plan

needs_native = pytest.mark.skipif(_ops.unavailable is not None, reason=str(_ops.unavailable))

TINY = Problem("tiny", 8, 8, 4, 4, 1, 1, 0, groups=2, kind="permuted")


@pytest.fixture
def tiny_suite(monkeypatch: pytest.MonkeyPatch) -> None:
    brief = Plan(seconds=0, least_rounds=1, sample_seconds=1e-5)
    monkeypatch.setattr(suites, "SUITES", {"quick": (TINY,), "full": (TINY,)})
    monkeypatch.setattr(bench, "Options", partial(bench.Options, plan=brief))


def fails(arguments: list[str]) -> int:
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    assert isinstance(caught.value.code, int)
    return caught.value.code


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert fails(["--version"]) == 0
    assert capsys.readouterr().out == f"groupconv-ext {groupconv_ext.__version__}\n"


def test_it_is_a_module_too() -> None:
    command = [sys.executable, "-m", "groupconv_ext", "--version"]
    found = subprocess.run(command, capture_output=True, text=True, check=True)
    assert found.stdout == f"groupconv-ext {groupconv_ext.__version__}\n"


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert fails(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(command.name in text for command in cli.COMMANDS)


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ([], "required"),
        (["bunch"], "bunch"),
        (["bench", "--threads", "0"], "'0' is not a positive whole number"),
        (["bench", "--threads", "many"], "'many' is not a positive whole number"),
        (["bench", "--suite", "half"], "half"),
        (["bench", "--quick", "--suite", "full"], "not allowed"),
        (["bench", "--layout", "CHWN"], "CHWN"),
        (["bench", "--dtype", "float8"], "float8"),
        (["bench", "--direction", "sideways"], "sideways"),
    ],
)
def test_wrong_calls_are_explained(
    arguments: list[str], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fails(arguments) == 2
    assert complaint in capsys.readouterr().err


def test_doctor_prints_and_is_well(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor"]) == 0
    assert len(capsys.readouterr().out.splitlines()) > 2


def test_list_prints_names_and_filters(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["bench", "--list", "--filter", "1x1", "--filter", "g8 ", "--layout", "NHWC"]
    assert cli.main(arguments) == 0
    names = capsys.readouterr().out.splitlines()
    assert names
    assert all("1x1" in name and "G8 " in name and "NHWC" in name for name in names)


def test_a_filter_that_leaves_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "--filter", "alexnet"]) == 2
    assert "--list" in capsys.readouterr().err


def test_a_folder_that_cannot_be_written_is_found_out_first(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("in the way")
    assert cli.main(["bench", "--out", str(blocked)]) == 2
    assert "cannot write to --out" in capsys.readouterr().err
    assert blocked.read_text() == "in the way"


def test_without_the_native_library_it_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(_ops, "unavailable", "the native library was not built")
    assert cli.main(["bench", "--out", str(tmp_path)]) == 2
    assert "the native library was not built" in capsys.readouterr().err


@needs_native
@pytest.mark.usefixtures("tiny_suite")
def test_bench_from_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "--out", str(tmp_path), "--no-progress"]) == 0
    printed = capsys.readouterr()
    assert "1×1 8→8 4² G2" in printed.out
    assert str(tmp_path / "report.html") in printed.out
    assert printed.err == ""
    assert (tmp_path / "bench.csv").stat().st_size > 0


@needs_native
@pytest.mark.usefixtures("tiny_suite")
def test_a_wrong_answer_fails_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def method(case: Case) -> Method:
        return Method(lambda x, weight: x * 2, case.weight)

    broken = Contender("broken", "doubles its input", method)
    monkeypatch.setattr(bench, "CONTENDERS", {**bench.CONTENDERS, "broken": broken})
    assert cli.main(["bench", "--out", str(tmp_path)]) == 1
    assert "WRONG: broken" in capsys.readouterr().out
