"""What ``auto`` takes where it measures: what is remembered, measuring once, and neither."""

import json
import multiprocessing
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import needs_native

import groupconv_ext as gc
from groupconv_ext import Partition, backends, two_level
from groupconv_ext.backends import Backend, Call, choice
from groupconv_ext.backends.aten import ATEN
from groupconv_ext.backends.dense import DENSE
from groupconv_ext.backends.devices import cpu_model
from groupconv_ext.backends.measure import Operands, measure
from groupconv_ext.backends.oracle import REFERENCE
from groupconv_ext.backends.registry import Question
from groupconv_ext.backends.remembered import FORMAT, Entry, Remembered, default_path
from groupconv_ext.operations import NATIVE_OPERATIONS
from groupconv_ext.two_level import TwoLevelPartitions
from groupconv_ext.window import POINTWISE, Window

PERMUTED = Partition.random(256, 256, 8, seed=0)


def operands(partition: Partition, needs_grad: bool = False) -> Operands:
    x = torch.randn(1, partition.in_channels, 4, 4, requires_grad=needs_grad)
    weight = torch.randn(partition.entries, 1, 1, requires_grad=needs_grad)
    return x, weight, None, None, partition, POINTWISE, "none", None


@pytest.fixture(autouse=True)
def nothing_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "_known", {})
    monkeypatch.setattr(choice, "_known_ways", {})


# ---- measuring once -----------------------------------------------------------------------------


def slow(*arguments: object) -> torch.Tensor:
    for _ in range(40):
        REFERENCE.convolve(*arguments)  # type: ignore[arg-type]
    return REFERENCE.convolve(*arguments)  # type: ignore[arg-type]


SLOW = Backend("reference", lambda call: None, slow)


@pytest.mark.parametrize("needs_grad", [False, True])
def test_the_fastest_is_taken_and_remembered(tmp_path: Path, needs_grad: bool) -> None:
    given = operands(PERMUTED, needs_grad)
    asked = Question.of(given[0], given[1], PERMUTED, POINTWISE, needs_grad, False)
    path = tmp_path / "deep" / "choices.json"
    assert choice.best(asked, given, (SLOW, DENSE), "A GPU", Remembered(path)).name == "dense"
    assert given[0].grad is None
    data = json.loads(path.read_text())
    ((text, entry),) = data["entries"].items()
    assert text.startswith("A GPU; torch ")
    assert torch.__version__ in text
    assert "in_channels 256" in text
    assert entry["chosen"] == "dense"
    assert entry["microseconds"]["reference"] > entry["microseconds"]["dense"] > 0

    # Another process would not measure again: the file decides.
    entry["chosen"] = "reference"
    path.write_text(json.dumps(data))
    choice._known.clear()
    assert choice.best(asked, given, (SLOW, DENSE), "A GPU", Remembered(path)).name == "reference"
    # What the file names but cannot serve the call is measured anew.
    choice._known.clear()
    assert choice.best(asked, given, (ATEN, DENSE), "A GPU", Remembered(path)).name != "reference"


def test_no_measuring_where_it_would_do_harm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = torch.randn(1, 256, 4, 4)
    assert choice.may_measure(x)
    monkeypatch.setenv("GROUPCONV_MEASURE", "off")
    assert not choice.may_measure(x)
    given = operands(PERMUTED)
    asked = Question.of(given[0], given[1], PERMUTED, POINTWISE, False, False)
    path = tmp_path / "choices.json"
    assert choice.best(asked, given, (SLOW, DENSE), "A GPU", Remembered(path)).name == "dense"
    assert not path.exists()
    assert not choice._known
    monkeypatch.delenv("GROUPCONV_MEASURE")

    seen = []
    torch.func.vmap(lambda part: (seen.append(choice.may_measure(part)), part)[1])(x)
    assert seen == [False]
    with torch._subclasses.FakeTensorMode():
        assert not choice.may_measure(torch.empty(1))


def test_not_while_a_graph_is_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    class OnAGpu(torch.Tensor):
        is_cuda = True

    monkeypatch.setattr(torch, "Tensor", OnAGpu)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert not choice.may_measure(OnAGpu())
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert choice.may_measure(OnAGpu())


def test_a_failure_is_told_and_left_out() -> None:
    def fail(*_: object) -> torch.Tensor:
        raise RuntimeError("no such kernel")

    def exhaust(*_: object) -> torch.Tensor:
        raise torch.OutOfMemoryError("too large")

    candidates = [
        Backend("native", lambda call: None, fail),
        Backend("triton", lambda call: None, exhaust),
        ATEN,
    ]
    with pytest.warns(
        RuntimeWarning, match="'native' failed while it was measured.*no such kernel"
    ):
        times = measure(candidates, operands(PERMUTED), needs_grad=True)
    assert set(times) == {"aten"}


# ---- on a CPU, where that is asked for ----------------------------------------------------------


@pytest.fixture
def measuring_on_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "choices.json"
    monkeypatch.setattr(choice, "remembered", lambda: Remembered(path))
    monkeypatch.setattr(choice, "measured_devices", ("cpu", "cuda"))
    return path


def test_auto_measures_on_a_cpu_where_asked(measuring_on_cpu: Path) -> None:
    x, weight, *_ = operands(PERMUTED)
    expected = gc.conv2d(x, weight, partition=PERMUTED, backend="reference")
    torch.testing.assert_close(gc.conv2d(x, weight, partition=PERMUTED), expected)
    data = json.loads(measuring_on_cpu.read_text())
    ((asked, entry),) = data["entries"].items()
    assert asked.startswith(f"{cpu_model()}, {torch.get_num_threads()} threads, ")
    assert {"aten", "dense"} <= set(entry["microseconds"]) <= {"native", "aten", "dense"}

    # What is remembered is what runs, under another number of threads not.
    entry["chosen"] = "dense"
    measuring_on_cpu.write_text(json.dumps(data))
    choice._known.clear()
    call = Call("cpu", torch.float32, needs_grad=False)
    assert backends.best(call, operands(PERMUTED)).name == "dense"
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(threads + 1)
        backends.best(call, operands(PERMUTED))
    finally:
        torch.set_num_threads(threads)
    assert len(json.loads(measuring_on_cpu.read_text())["entries"]) == 2


@needs_native
def test_on_a_cpu_native_runs_where_nothing_may_be_measured(
    measuring_on_cpu: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GROUPCONV_MEASURE", "off")
    call = Call("cpu", torch.float32, needs_grad=False)
    assert backends.best(call, operands(PERMUTED)).name == "native"
    half = Call("cpu", torch.float16, needs_grad=False)
    x, weight, *others = operands(PERMUTED)
    assert backends.best(half, (x.half(), weight.half(), *others)).name == "aten"
    compiled = torch.compile(
        lambda x, weight: gc.conv2d(x, weight, partition=PERMUTED), fullgraph=True, backend="eager"
    )
    expected = gc.conv2d(x, weight, partition=PERMUTED, backend="native")
    assert torch.equal(compiled(x, weight), expected)
    assert not measuring_on_cpu.exists()


def test_the_environment_says_where_is_measured() -> None:
    code = "from groupconv_ext.backends.choice import measured_devices; print(measured_devices)"
    for value, expected in (("all", "('cpu', 'cuda')"), ("on", "('cuda',)"), ("off", "('cuda',)")):
        environment = os.environ | {"GROUPCONV_MEASURE": value}
        command = [sys.executable, "-c", code]
        found = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        assert found.stdout.strip() == expected


# ---- on disk ------------------------------------------------------------------------------------


def test_where_it_lies(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("GROUPCONV_CACHE", raising=False)
    assert default_path() == tmp_path / "cache" / "groupconv_ext" / "choices.json"
    monkeypatch.setenv("GROUPCONV_CACHE", str(tmp_path))
    assert default_path() == tmp_path / "choices.json"


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"\xff\xfe\x00",
        b"[]",
        b'{"format": "something else", "entries": {}}',
        b'{"format": "groupconv-choices-1", "entries": {"a": {"chosen": 3, "microseconds": {}}}}',
        b'{"format": "groupconv-choices-1", "entries": {"a": "b"}}',
        b'{"format": "groupconv-choices-1"}',
        b'{"format": "groupconv-choices-1", "entries": {"a": {"chosen": "x", "microseconds": 1}}}',
    ],
)
def test_a_corrupt_file_is_ignored_and_left_alone(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "choices.json"
    path.write_bytes(content)
    store = Remembered(path)
    with pytest.warns(RuntimeWarning, match="is not a file of measured choices"):
        assert store.get("a") is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        store.add("a", Entry("aten", {"aten": 1.0}))
    assert store.get("a") == Entry("aten", {"aten": 1.0})
    assert path.read_bytes() == content


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    store = Remembered(tmp_path / "file" / "choices.json")
    with pytest.warns(RuntimeWarning, match=r"choices\.json"):
        store.add("a", Entry("aten", {}))
    assert store.get("a") == Entry("aten", {})


def add_many(path: Path, writer: int) -> None:
    for number in range(20):
        Remembered(path).add(f"{writer} {number}", Entry("aten", {"aten": float(number)}))


def test_several_processes_lose_nothing(tmp_path: Path) -> None:
    path = tmp_path / "choices.json"
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=add_many, args=(path, writer)) for writer in range(4)]
    for writer in writers:
        writer.start()
    while any(writer.is_alive() for writer in writers):
        if path.exists():
            assert json.loads(path.read_text())["format"] == FORMAT, "never half a file"
    assert all(writer.exitcode == 0 for writer in writers)
    assert len(json.loads(path.read_text())["entries"]) == 80
    assert not list(tmp_path.glob(".choices.json.*"))


# ---- the call -----------------------------------------------------------------------------------


def test_auto_asks_only_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("was asked")

    monkeypatch.setattr(choice, "best", refuse)
    x, weight, *_ = operands(PERMUTED)
    gc.conv2d(x, weight, partition=PERMUTED)


def test_one_capable_backend_is_taken_unasked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(backends._MEASURED, "cuda", (ATEN,))
    assert backends.best(Call("cuda", torch.float32, False), operands(PERMUTED)) is ATEN


# ---- a layer of several convolutions ------------------------------------------------------------


class Counted:
    """The native operations, and how often both levels were made."""

    def __init__(self) -> None:
        self.calls = 0

    def __getattr__(self, name: str) -> object:
        return getattr(NATIVE_OPERATIONS, name)

    def two_level(self, *operands: Any) -> tuple[torch.Tensor, torch.Tensor]:
        self.calls += 1
        return NATIVE_OPERATIONS.two_level(*operands)


@needs_native
@pytest.mark.parametrize("needs_grad", [False, True])
def test_the_ways_of_a_layer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, needs_grad: bool
) -> None:
    """Both levels at once by each backend that has them, or one by one; remembered as a whole."""
    layer = gc.nn.TwoLevelConv2d(8, 12, 3, padding=1, groups=4)
    x, partitions = torch.randn(2, 8, 5, 6), TwoLevelPartitions(8, 12, 4)
    tensors = (x, layer.weight, layer.restriction, layer.coarse, layer.bias)
    settings = (partitions, 1, 1, 1, "reference")
    path, window, native = tmp_path / "choices.json", Window(1, 1, 1, 1, 1, 1, 1, 1), Counted()
    monkeypatch.setattr(choice, "remembered", lambda: Remembered(path))
    monkeypatch.setattr(two_level, "device_name", lambda device: "A GPU")
    monkeypatch.setattr(two_level, "NATIVE", Backend("native", lambda call: None, slow))
    monkeypatch.setattr(two_level, "TRITON", Backend("triton", lambda call: "is off", slow))
    monkeypatch.setattr(two_level, "_fused_by", lambda name, call: {"native": native}[name])
    call = Call("cuda", torch.float32, needs_grad)

    def fastest() -> object:
        return two_level._fastest(call, tensors, window, settings)

    # The reference takes long for three convolutions.
    assert fastest() is native
    ((asked, entry),) = json.loads(path.read_text())["entries"].items()
    assert asked.startswith("A GPU; torch ")
    assert "; two levels: dtype torch.float32, " in asked
    assert set(entry["microseconds"]) == {"native", "one by one"}
    assert all(t.grad is None for t in tensors)
    calls = native.calls
    assert calls > 0

    # Neither in this process nor in another is it measured again.
    entry["chosen"] = "one by one"
    path.write_text(json.dumps({"format": FORMAT, "entries": {asked: entry}}))
    assert fastest() is native
    choice._known_ways.clear()
    assert fastest() is None
    assert native.calls == calls

    # Where nothing may be measured: one by one, and nothing is remembered.
    monkeypatch.setenv("GROUPCONV_MEASURE", "off")
    choice._known_ways.clear()
    path.unlink()
    assert fastest() is None
    assert not path.exists()
    y = two_level._at_once(*tensors, partitions, window, native)
    torch.testing.assert_close(y, two_level._one_by_one(*tensors, *settings))
