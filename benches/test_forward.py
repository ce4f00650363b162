"""The quick suite's forward problems, every contender beside its rivals: ``pytest benches``."""

from __future__ import annotations

import pytest

from groupconv_ext.bench.problems import Problem
from groupconv_ext.bench.rivals import CONTENDERS
from groupconv_ext.bench.suites import SUITES, select

PROBLEMS = select(SUITES["quick"], direction="forward")


@pytest.mark.benchmark(max_time=0.2, min_rounds=5, warmup=True)
@pytest.mark.parametrize("contender", CONTENDERS)
@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda problem: problem.name)
def test_forward(measure, problem: Problem, contender: str) -> None:
    measure(problem, contender)
