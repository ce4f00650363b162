import os
import re
import subprocess
import sys

import pytest
import torch

import groupconv_ext
from groupconv_ext import _ops, backends, doctor

needs_native = pytest.mark.skipif(_ops.unavailable is not None, reason=str(_ops.unavailable))


def line(report: str, label: str) -> str:
    found = re.search(rf"^  {re.escape(label)} +(.*)$", report, re.MULTILINE)
    assert found, f"no {label!r} in:\n{report}"
    return found[1]


def in_new_process(**environment: str) -> str:
    command = [sys.executable, "-c", "from groupconv_ext.doctor import doctor; print(doctor())"]
    return subprocess.run(
        command, env=os.environ | environment, check=True, capture_output=True, text=True
    ).stdout


def test_names_the_versions() -> None:
    report = doctor()
    assert groupconv_ext.__version__ in line(report, "groupconv-ext")
    assert line(report, "torch") == torch.__version__


def test_every_backend_answers() -> None:
    report = doctor()
    for name in backends.names():
        label = name if torch.cuda.device_count() == 0 else f"{name} (cpu)"
        assert line(report, label).startswith(("yes", "no: it "))


@needs_native
def test_says_which_instruction_set_and_why() -> None:
    report = doctor()
    assert re.match(
        r"(scalar|avx2|avx512|avx512_(vnni|bf16|amx)): \w", line(report, "instruction set")
    )
    assert "scalar" in line(report, "kernels")


@needs_native
def test_a_forced_instruction_set() -> None:
    report = in_new_process(GROUPCONV_ISA="scalar")
    assert line(report, "instruction set").startswith("scalar: ")
    assert "GROUPCONV_ISA" in line(report, "instruction set")
    assert line(report, "GROUPCONV_ISA") == "scalar"


@needs_native
def test_an_instruction_set_that_cannot_be() -> None:
    chosen = line(in_new_process(GROUPCONV_ISA="abacus"), "instruction set")
    assert chosen.startswith("none: ")
    assert "abacus" in chosen


def test_without_the_native_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_ops, "unavailable", "the library is on holiday")
    report = doctor()
    assert line(report, "loaded") == "no: the library is on holiday"
    assert line(report, "native").startswith("no: it ")
    with pytest.raises(RuntimeError, match="on holiday"):
        groupconv_ext.native_library()


@needs_native
def test_where_the_library_lies() -> None:
    assert groupconv_ext.native_library().is_file()
    assert line(doctor(), "loaded") == f"yes, {groupconv_ext.native_library()}"


def test_without_the_introspection_module(monkeypatch: pytest.MonkeyPatch) -> None:
    # By its name: the package's attribute `doctor` is the function.
    monkeypatch.setattr(sys.modules[doctor.__module__], "_introspect", None)
    monkeypatch.setattr(_ops, "unavailable", None)
    assert line(doctor(), "loaded").startswith("no: ")
