"""The GPU benchmark where there is no GPU: its dry run, its state, its numbers."""

import csv
import json
import math
import os
import re
import subprocess
import sys
import tarfile
from collections import Counter
from dataclasses import replace
from pathlib import Path
from time import monotonic

import pytest
import torch

import groupconv_ext
from groupconv_ext.bench import plots
from groupconv_ext.bench.correctness import Oracle
from groupconv_ext.bench.gpu import __main__ as program
from groupconv_ext.bench.gpu import layers, pictures, rivals, suite
from groupconv_ext.bench.gpu.clock import Clock
from groupconv_ext.bench.gpu.device import Limits
from groupconv_ext.bench.gpu.page import page
from groupconv_ext.bench.gpu.state import Found, GpuRow, Part, State
from groupconv_ext.bench.gpu.summary import outcomes, table, totals
from groupconv_ext.bench.methods import Case
from groupconv_ext.bench.problems import Kind, Layout, Problem, pointwise
from groupconv_ext.bench.rivals import Attempt

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "benches" / "gpu.sh"


def row(contender: str, cold: float, *, same: bool = True) -> GpuRow:
    return GpuRow(contender, same, cold, cold * 0.9, cold * 1.1, cold / 2, None, "no GPU", 0.1)


def found(problem: Problem, **colds: float) -> Found:
    rows = [row(name.replace("_", "-"), cold) for name, cold in colds.items()]
    rows.append(row("aten-contiguous", 0.1, same=False))
    return Found(problem, 10.0, "memory", tuple(rows), {"bmm": "the groups are ragged"}, {})


def finished(path: Path) -> State:
    state = State.open(path, "A GPU")
    state.set_conditions({"torch": "2.13", "date": "today"})
    rates = dict.fromkeys(("float32", "bfloat16", "float16"), 1e14)
    state.set_limits({"memory": 4e12, "rates": rates})
    first, second, third = suite.SUITE[:3]
    state.add(found(first, native=20.0, triton=15.0, aten=60.0, dense=30.0))
    state.add(found(second, triton=40.0, aten=20.0))
    state.add(found(third, aten=20.0))
    state.end(Part("layers", "unfinished", 12.0, "3 of 90"))
    return state


# ---- the whole of it ----------------------------------------------------------------------------


def run_script(out: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    # The script looks for the package where these tests found it.
    search = [str(Path(groupconv_ext.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    settings = {"OUT": str(out), "PYTHON": sys.executable, **environment}
    return subprocess.run(
        [str(SCRIPT), *arguments],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, search))} | settings,
        capture_output=True,
        text=True,
    )


def test_dry_run_and_resume(tmp_path: Path) -> None:
    out = tmp_path / "out"
    run = run_script(out, "--dry-run", FILTER="1x1")
    assert run.returncode == 0, run.stdout + run.stderr
    assert "dry-run 1x1 16-16 4x4 G2 permuted N1 NHWC float32 forward: " in run.stdout
    for part in ("build", "tests", "limits", "layers", "networks"):
        assert f"\n  {part}" in run.stdout
    data = json.loads((out / "gpu.json").read_text())
    assert [entry["name"] for entry in data["problems"]] == [p.name for p in suite.DRY[:2]]
    assert all(not entry["wrong"] for entry in data["problems"])
    assert data["device"].endswith(", dry run")
    with (out / "gpu.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert {line["contender"] for line in lines} >= {"aten", "dense", "gemm", "aten-contiguous"}
    assert all(float(line["cold"]) > 0 and line["graph"] == "" for line in lines)
    assert "Every contender" in (out / "gpu.html").read_text()
    pngs = {"roofline.png", "layers.png", "modes.png"} if plots.HAVE_MATPLOTLIB else set()
    rest = {"state.jsonl", "gpu.json", "gpu.csv", "gpu.html", "log.txt"}
    assert {path.name for path in out.iterdir()} == rest | pngs

    # The rest in another folder, taken up where this one stopped.
    other = tmp_path / "other"
    run = run_script(other, "--dry-run", "layers", RESUME=str(out), PACK="1")
    assert run.returncode == 0, run.stdout + run.stderr
    assert "dry-run 3x3" in run.stdout
    assert "permuted N1 NHWC float32 forward: " not in run.stdout, "timed again"
    assert len(json.loads((other / "gpu.json").read_text())["problems"]) == len(suite.DRY)
    kept = {"state.jsonl", "gpu.json", "gpu.html", "log.txt", "rest.tar.gz"}
    assert {path.name for path in other.iterdir()} == kept
    with tarfile.open(other / "rest.tar.gz") as archive:
        assert set(archive.getnames()) == {"gpu.csv"} | pngs


def test_what_has_passed_is_left_out(tmp_path: Path) -> None:
    """Of a call for everything; the build is no result and is made again where it is gone."""
    state = State.open(tmp_path / "state.jsonl", "a CPU")
    for name, status in (("build", "passed"), ("tests", "passed"), ("all-tests", "failed")):
        state.end(Part(name, status, 1.0))
    functions = re.search(r"has_passed\(\) \{.*?\n\}\n", SCRIPT.read_text(), re.DOTALL)
    assert functions
    for resumes, expected in (("1", "tests"), ("", "")):
        script = f"OUT={tmp_path}; resumes={resumes}; {functions[0]}"
        script += "for part in tests all-tests memcheck; do has_passed $part && echo $part; done"
        run = subprocess.run(["bash", "-c", script], capture_output=True, text=True)
        assert run.stdout.split() == expected.split()


def test_the_sanitizer_has_tests_to_watch() -> None:
    words = dict(re.findall(r'^ +(chosen|largest)="([^"]+)"$', SCRIPT.read_text(), re.MULTILINE))
    tests = [ROOT / "python_tests" / name for name in ("test_on_gpu.py", "test_cuda.py")]
    collect = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider"]
    both = f"{words['chosen']} or ({words['largest']})"
    found = subprocess.run([*collect, *tests, "-k", both], capture_output=True, text=True, cwd=ROOT)
    lines = [line.rpartition("::")[2] for line in found.stdout.splitlines() if "::" in line]
    names = Counter(line.partition("[")[0] for line in lines)
    assert names == {
        "test_the_same_bits_again": 2,
        "test_larger_layers": 6,
        "test_groups_of_many_channels": 1,
    }


def test_the_script_refuses(tmp_path: Path) -> None:
    run = run_script(tmp_path, "everything")
    assert run.returncode == 2
    assert "unknown argument everything; expected --dry-run or some of: build" in run.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert program.main(["report", "--out", str(tmp_path)]) == 2
    assert "there is no GPU here; --dry-run" in capsys.readouterr().err


def test_time_is_up(tmp_path: Path) -> None:
    """Nothing is begun after the deadline, and the exit status says that something is left."""
    arguments = ["layers", "--dry-run", "--out", str(tmp_path), "--seconds", "-1"]
    assert program.main(arguments) == 3
    assert State.open(tmp_path / "state.jsonl", state_device(tmp_path)).parts["layers"].status == (
        "unfinished"
    )


def test_what_fails_takes_nothing_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A failure is noted and the rest is timed, unless the device is lost: then in another call."""

    def fail(*_: object) -> object:
        raise RuntimeError("an illegal memory access")

    broken = replace(rivals.CONTENDERS[0], name="broken", method=fail)
    contenders = (rivals.CONTENDERS[0], broken)
    clock = Clock(torch.device("cpu"), rounds=3, warm_up=1, warm_calls=1, flush_bytes=1 << 16)
    limits = Limits(1e9, dict.fromkeys(("float32", "bfloat16", "float16"), 1e9))

    def run(state: State) -> bool:
        problems = suite.DRY[:1] + suite.DRY[2:]
        return layers.run_layers(
            state, problems, contenders, clock, limits, monotonic() + 60, lambda line: None
        )

    state = State.open(tmp_path / "whole", "a CPU")
    assert run(state)
    for entry in state.found:
        assert [row.contender for row in entry.rows] == [contenders[0].name]
        assert "illegal memory access" in entry.wrong["broken"]

    lost = State.open(tmp_path / "lost", "a CPU")
    with monkeypatch.context() as patch:
        patch.setattr(layers, "_is_lost", lambda device: True)
        assert not run(lost)
    assert [(entry.rows, list(entry.wrong)) for entry in lost.found] == [((), ["broken"])]
    assert run(State.open(tmp_path / "lost", "a CPU")), "goes on behind the one that failed"

    failing = State.open(tmp_path / "failing", "a CPU")
    monkeypatch.setattr(Clock, "time", fail)
    assert run(failing)
    assert all("while it was timed" in entry.wrong["one of them"] for entry in failing.found)


def state_device(folder: Path) -> str:
    line = (folder / "state.jsonl").read_text().splitlines()[0]
    device: str = json.loads(line)["device"]
    return device


# ---- the state ----------------------------------------------------------------------------------


def test_state_is_read_back(tmp_path: Path) -> None:
    state = finished(tmp_path / "state.jsonl")
    again = State.open(tmp_path / "state.jsonl", "A GPU")
    assert again == state
    assert again.done == {p.name for p in suite.SUITE[:3]}


def test_a_line_that_was_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "state.jsonl"
    finished(path)
    whole = path.read_text()
    path.write_text(whole + '{"part": {"name": "te')
    state = State.open(path, "A GPU")
    assert len(state.found) == 3
    state.end(Part("tests", "passed", 1.0))
    assert State.open(path, "A GPU").parts["tests"].status == "passed"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("nothing\n", "line 1 cannot be read"),
        ("[1]\n", "line 1 is "),
        ('{"format": "other", "device": "A GPU"}\n', "is not a state"),
        ('{"format": "groupconv-gpu-1", "device": "Another"}\n', "was begun on Another"),
        ('{"format": "groupconv-gpu-1", "device": "A GPU"}\n{]\n{}\n', "line 2 cannot be read"),
    ],
)
def test_a_foreign_state_is_refused(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "state.jsonl"
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        State.open(path, "A GPU")
    assert path.read_text() == content


# ---- the numbers --------------------------------------------------------------------------------


def test_ours_at_its_best_against_the_best_rival(tmp_path: Path) -> None:
    state = finished(tmp_path / "state.jsonl")
    first, second = outcomes(state)
    assert (first.ours.contender, first.rival and first.rival.contender) == ("triton", "dense")
    assert first.faster == 2.0
    assert first.share_of_floor == pytest.approx(10 / 15)
    assert second.faster == 0.5
    (total,) = totals(outcomes(state))
    assert (total.count, total.losses, total.least) == (2, 1, 0.5)
    assert total.mean == pytest.approx(math.sqrt(2.0 * 0.5))
    text = table(state)
    assert "slower: " in text
    assert "0.50× of aten" in text
    assert "unfinished" in text


def test_the_page_holds_it_all(tmp_path: Path) -> None:
    state = finished(tmp_path / "state.jsonl")
    state.add(replace(state.found[0], wrong={"padded": "output is <off>"}))
    drawn = {}
    if plots.HAVE_MATPLOTLIB:
        figures = pictures.draw(state)
        assert set(figures) == {"roofline", "layers", "modes"}
        drawn = {name: plots.svg(figure) for name, figure in figures.items()}
    text = page(state, drawn)
    assert text.count("<svg") == len(drawn)
    for expected in ("A GPU", "2.00×", "0.50×", "output is &lt;off&gt;", "3 of 90", "4 TB/s"):
        assert expected in text
    assert "http" not in text, "the page needs nothing beside it"


def test_nothing_was_timed(tmp_path: Path) -> None:
    state = State.open(tmp_path / "state.jsonl", "A GPU")
    assert "A GPU" in page(state, {})
    assert table(state) == "device: A GPU"


def test_times_on_the_wall_clock() -> None:
    calls = {"a": 0, "b": 0}

    def count(name: str) -> None:
        calls[name] += 1

    clock = Clock(torch.device("cpu"), rounds=5, warm_up=2, warm_calls=3, flush_bytes=1 << 10)
    times = clock.time({name: lambda name=name: count(name) for name in calls})  # type: ignore[misc]
    assert set(calls.values()) == {2 + 5 + 3 * 3}
    for time in times.values():
        assert 0 < time.cold_lower <= time.cold <= time.cold_upper
        assert time.graph is None
        assert time.why_no_graph == "CUDA graphs need a GPU"


# ---- the rivals ---------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
@pytest.mark.parametrize("kind", ["permuted", "ragged", "contiguous"])
def test_products_compute_the_layer(kind: Kind, layout: Layout) -> None:
    """gemm, bmm and grouped-mm against float64, where each has a place."""
    layer = replace(pointwise("test", (64, 64), 4, 4, kind), layout=layout, batch=2)
    bfloat16 = replace(layer, dtype="bfloat16")
    training = replace(layer, direction="forward+backward")
    ran = set()
    for contender in rivals.CONTENDERS:
        for problem in (layer, training, bfloat16):
            if contender.name not in ("gemm", "bmm", "grouped-mm"):
                continue
            if contender.reason_against(problem) is None:
                case = Case.make(problem)
                with torch.inference_mode(not problem.trains):
                    Oracle.of(case).check(Attempt(case, contender.method(case)).answer())
                ran.add(contender.name)
    expected = {"gemm"} | ({"bmm"} if kind != "ragged" else set())
    if kind != "ragged" and layout == "NHWC":
        expected.add("grouped-mm")
    assert ran == expected


def test_every_problem_of_the_suite_has_a_name_of_its_own() -> None:
    names = [problem.name for problem in suite.SUITE]
    assert len(names) == len(set(names)) > 60
