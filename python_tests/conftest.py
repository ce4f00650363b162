"""What every test may rely on.

Fresh memory is poisoned: whatever PyTorch allocates without filling holds NaN (integers: their
largest value), so a result that was never written cannot pass for a right one. Every test starts
from the same random state, and every Hypothesis example replays with its own.
"""

import ctypes
import os
import random
import time
from collections import defaultdict
from collections.abc import Iterator
from importlib import import_module
from typing import Any

import hypothesis
import pytest

# Both are read once, when torch is loaded. Deterministic mode, which the poison needs, asks for the
# first. The second: threads that spin while they wait make small tensors ten times slower as soon
# as anything else runs on the machine, another worker of pytest-xdist for example.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch
from cuda_on_cpu import build as builder
from pairs import cover

# Without a GPU the Triton kernels run in Triton's interpreter; Triton looks when they are loaded.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


class TorchRandom:
    """PyTorch's global generator as Hypothesis wants to see it: seeded anew for each example."""

    def seed(self, seed: int) -> None:
        torch.manual_seed(seed)

    def getstate(self) -> torch.Tensor:
        return torch.get_rng_state()

    def setstate(self, state: torch.Tensor) -> None:
        torch.set_rng_state(state)


TORCH_RANDOM = TorchRandom()  # Hypothesis itself holds it weakly only
hypothesis.register_random(TORCH_RANDOM)

# No deadlines: the first example of a test pays for what the others find loaded.
hypothesis.settings.register_profile("dev", deadline=None)
# The same examples in every run, and a failing one printed so that it can be replayed anywhere.
hypothesis.settings.register_profile("ci", deadline=None, derandomize=True, print_blob=True)
hypothesis.settings.load_profile(
    os.environ.get("HYPOTHESIS_PROFILE", "ci" if os.environ.get("CI") else "dev")
)


# Where the random tests begin; one seed for the run, in all of its processes.
os.environ.setdefault("GROUPCONV_SEED", str(time.time_ns() % 2**31))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--pairs",
        action="store_true",
        help="of each test so many cases that every two arguments meet, others with each seed",
    )


def pytest_report_header() -> str:
    return f"random tests replay with GROUPCONV_SEED={os.environ['GROUPCONV_SEED']}"


RANDOM_CASES = "random cases"
"""The property of a test that tells how many it has checked."""


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for report in terminalreporter.getreports("passed"):
        for name, count in report.user_properties:
            if name == RANDOM_CASES:
                seed = os.environ["GROUPCONV_SEED"]
                terminalreporter.write_line(f"{count} {name} from GROUPCONV_SEED={seed} on")


def pytest_configure(config: pytest.Config) -> None:
    # What deterministic mode has to say about CUDA operations without such a version.
    config.addinivalue_line(
        "filterwarnings", "ignore:.*does not have a deterministic implementation:UserWarning"
    )


def arguments(item: pytest.Item) -> dict[str, Any]:
    return getattr(getattr(item, "callspec", None), "params", {})


def is_again(item: pytest.Item) -> bool:
    """Sets without kernels of their own for float32 and float64 are not tested with those."""
    dtype = arguments(item).get("dtype", torch.bfloat16)
    return arguments(item).get("isa") in ("avx512_bf16", "avx512_amx") and dtype != torch.bfloat16


def pairs_of(items: list[pytest.Item]) -> set[pytest.Item]:
    """Of each test the cases in which every two arguments meet."""
    tests = defaultdict(dict)
    for item in items:
        # Told apart as the objects that they are: pytest hands the same ones to all cases.
        told_apart = {name: id(value) for name, value in arguments(item).items()}
        tests[item.nodeid.partition("[")[0]][item] = told_apart
    chosen = {item for item in items if not arguments(item)}
    for name, cases in tests.items():
        chosen |= cover(cases, random.Random(f"{os.environ['GROUPCONV_SEED']} {name}"))
    return chosen


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    kept = [item for item in items if not is_again(item)]
    if config.getoption("pairs"):
        pairs = pairs_of(kept)
        kept = [item for item in kept if item in pairs]
    config.hook.pytest_deselected(items=[*set(items).difference(kept)])
    items[:] = kept


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """Fill fresh memory with NaN; a side effect of deterministic mode, which only warns here."""
    enabled = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(enabled, warn_only=warn_only)


@pytest.fixture(autouse=True)
def float32_is_float32() -> Iterator[None]:
    """On a GPU PyTorch lets convolutions round their factors to TF32, unless it is told not to."""
    # In the older of the two ways: after the newer one torch.export cannot ask for the older.
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    torch.manual_seed(0)


# ---- the CUDA kernels on the CPU ----------------------------------------------------------------


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    path = builder.build(tmp_path_factory.getbasetemp().parent)
    torch.ops.load_library(path)
    return ctypes.CDLL(str(path))


@pytest.fixture(params=[False, True], ids=["forwards", "backwards"])
def ops(library: ctypes.CDLL, request: pytest.FixtureRequest) -> Any:
    """The ops, with the threads of a block taking their turns in either order."""
    library.take_turns_backwards(ctypes.c_bool(request.param))
    return getattr(torch.ops, builder.NAMESPACE)


@pytest.fixture
def in_their_place(ops: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything above the ops uses those of the CUDA kernels."""
    # Imported when asked for: the rules of the house are tested where the package is not.
    above = import_module("groupconv_ext._ops")
    labelled = import_module("groupconv_ext.operations").NativeLabelledOperations
    for name in above.__all__:
        if hasattr(ops, name):
            operation = getattr(ops, name).default
            monkeypatch.setattr(above, name, operation)
            if hasattr(labelled, name):
                monkeypatch.setattr(labelled, name, staticmethod(operation))
