"""The quick suite's training problems: output and both gradients, every contender."""

from __future__ import annotations

import pytest

from groupconv_ext.bench.problems import Problem
from groupconv_ext.bench.rivals import CONTENDERS
from groupconv_ext.bench.suites import SUITES, select

PROBLEMS = select(SUITES["quick"], direction="forward+backward")


@pytest.mark.benchmark(max_time=0.5, min_rounds=5, warmup=True, warmup_iterations=1)
@pytest.mark.parametrize("contender", CONTENDERS)
@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda problem: problem.name)
def test_forward_and_backward(measure, problem: Problem, contender: str) -> None:
    measure(problem, contender)
