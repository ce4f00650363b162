"""One problem after another: check every answer, time those that are right, note it, go on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from time import monotonic
from typing import Any

import torch

from ..correctness import Oracle, WrongAnswerError
from ..methods import Case
from ..problems import Problem
from ..rivals import Attempt, Contender
from .clock import Clock, Times
from .device import Limits
from .state import Found, GpuRow, State

__all__ = ["run_layers"]

_CHECKED_BATCH = 8
"""Images on which answers are compared with float64; for 256 of them that would take minutes."""


def run_layers(
    state: State,
    problems: Sequence[Problem],
    contenders: Sequence[Contender],
    clock: Clock,
    limits: Limits,
    deadline: float,
    tell: Callable[[str], object],
) -> bool:
    """Time what is not in ``state`` yet until ``deadline``; whether nothing is left to do."""
    longest = 0.0
    for problem in problems:
        if problem.name in state.done:
            continue
        started = monotonic()
        if started + longest > deadline:
            return False
        with _best_of_the_vendor():
            found = _one(problem, contenders, clock, limits)
        state.add(found)
        if _is_lost(clock.device):
            tell(f"{problem.name}: the device is lost to this process; call again for the rest")
            return False
        longest = max(longest, monotonic() - started)
        tell(f"{problem.name}: {len(found.rows)} timed, {len(found.wrong)} wrong")
    return True


def _one(problem: Problem, contenders: Sequence[Contender], clock: Clock, limits: Limits) -> Found:
    @cache
    def case_of(question: Problem) -> Case:
        return Case.make(question, clock.device)

    @cache
    def checked(question: Problem) -> tuple[Case, Oracle]:
        small = Case.make(
            replace(question, batch=min(question.batch, _CHECKED_BATCH)), clock.device
        )
        return small, Oracle.of(small)

    attempts: dict[str, tuple[Contender, Attempt, float]] = {}
    refused: dict[str, str] = {}
    wrong: dict[str, str] = {}
    for contender in contenders:
        if reason := contender.reason_against(problem):
            refused[contender.name] = reason
            continue
        question = contender.question(problem)
        try:
            case, oracle = checked(question)
            with torch.inference_mode(not problem.trains):
                error = oracle.check(contender.attempt(case).answer())
                attempt = contender.attempt(case_of(question))
                attempt.run()
            _wait(clock.device)  # what failed there is this one's failure
        except WrongAnswerError as problem_of_it:
            wrong[contender.name] = str(problem_of_it)
        except torch.OutOfMemoryError:
            refused[contender.name] = "out of memory"
        except Exception as failure:
            # A contender that fails must not take the run with it; it fails the run's result.
            wrong[contender.name] = f"raised {failure!r}"
            if _is_lost(clock.device):
                attempts.clear()
                break
        else:
            attempts[contender.name] = contender, attempt, error
    times: dict[str, Times] = {}
    try:
        if attempts:
            with torch.inference_mode(not problem.trains):
                times = clock.time({name: call.run for name, (_, call, _) in attempts.items()})
    except Exception as failure:
        wrong["one of them"] = f"raised {failure!r} while it was timed"
    floor = problem.floor(limits.rate(problem.dtype), limits.memory)
    rows = []
    for name, t in times.items():
        contender, _, error = attempts[name]
        rows.append(
            GpuRow(
                name,
                contender.same_function,
                t.cold,
                t.cold_lower,
                t.cold_upper,
                t.warm,
                t.graph,
                t.why_no_graph,
                error,
            )
        )
    return Found(problem, floor.seconds * 1e6, floor.bound, tuple(rows), refused, wrong)


def _is_lost(device: torch.device) -> bool:
    """Whether a kernel has failed on the device, after which nothing more runs in this process."""
    try:
        _wait(device)
    except RuntimeError:
        return True
    return False


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextmanager
def _best_of_the_vendor() -> Any:
    """cuDNN looks for its best algorithm; float32 is float32, for everybody."""
    cudnn: Any = torch.backends.cudnn
    matmul: Any = torch.backends.cuda.matmul
    before = cudnn.benchmark, cudnn.allow_tf32, matmul.allow_tf32
    cudnn.benchmark, cudnn.allow_tf32, matmul.allow_tf32 = True, False, False
    try:
        yield
    finally:
        cudnn.benchmark, cudnn.allow_tf32, matmul.allow_tf32 = before
