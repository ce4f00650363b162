"""What the pytest-benchmark tests share: one thread, and how a contender is put on the stand."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from groupconv_ext.bench.correctness import Oracle
from groupconv_ext.bench.methods import Case
from groupconv_ext.bench.problems import Problem
from groupconv_ext.bench.rivals import CONTENDERS

Measure = Callable[[Problem, str], None]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def measure(benchmark: BenchmarkFixture) -> Measure:
    """Check a contender's answer, then time it in the group of its problem."""

    def run(problem: Problem, name: str) -> None:
        contender = CONTENDERS[name]
        if reason := contender.reason_against(problem):
            pytest.skip(reason)
        case = Case.make(contender.question(problem))
        attempt = contender.attempt(case)
        benchmark.group = problem.name
        benchmark.extra_info["GFLOP"] = 2 * problem.multiply_adds / 1e9
        with torch.inference_mode(not problem.trains):
            Oracle.of(case).check(attempt.answer())
            benchmark(attempt.run)

    return run
