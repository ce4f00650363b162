"""One run: for each problem make its data, check every answer, and time those that are right."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from statistics import median

import torch

from . import overhead
from .correctness import Oracle, WrongAnswerError
from .machine import Machine, conditions, fma_peak
from .methods import Case
from .overhead import Overhead
from .problems import Problem
from .progress import progress
from .results import Absent, Report, Row
from .rivals import OURS, Attempt, Contender
from .timing import Plan, Timing, interleave

_PEAK_SAMPLE_SECONDS = 1e-3


@dataclass(frozen=True)
class Options:
    """How to run."""

    threads: int = 1
    plan: Plan = field(default_factory=Plan)
    show_progress: bool = True


@dataclass(frozen=True)
class Checked:
    """A contender whose answer is right, ready to be timed."""

    contender: Contender
    attempt: Attempt
    error_over_bound: float


def run(
    suite: str,
    problems: Sequence[Problem],
    contenders: Iterable[Contender],
    options: Options,
    *,
    measure_machine: Callable[[int], Machine] = Machine.measure,
    measure_peak: Callable[[float, int, torch.dtype], float] = fma_peak,
    measure_overhead: Callable[[Plan], tuple[Overhead, ...]] = overhead.measure,
) -> Report:
    """Time ``contenders`` on ``problems``. A wrong answer is reported and never timed."""
    contenders = tuple(contenders)
    rows: list[Row] = []
    refused: list[Absent] = []
    wrong: list[Absent] = []
    peaks: dict[str, float] = {}

    with _torch_threads(options.threads):
        machine = measure_machine(options.threads)
        shown = options.show_progress
        for problem in progress(problems, lambda problem: problem.name, enabled=shown):
            checked = _check(problem, contenders, refused, wrong)
            if not checked:
                continue
            timings, peak = _time(problem, checked, options, measure_peak)
            peaks[problem.name] = peak
            rows += _rows(problem, checked, timings, machine, peak)
        has_ours = any(row.contender == OURS for row in rows)
        call_overhead = measure_overhead(options.plan) if has_ours else ()
    return Report(
        suite=suite,
        conditions=conditions(options.threads),
        machine=machine,
        peaks=peaks,
        overhead=call_overhead,
        rows=tuple(rows),
        refused=tuple(refused),
        wrong=tuple(wrong),
    )


def _check(
    problem: Problem,
    contenders: Iterable[Contender],
    refused: list[Absent],
    wrong: list[Absent],
) -> list[Checked]:
    """Ask every contender once; those without a place or without the right answer are noted."""

    @cache
    def prepared(question: Problem) -> tuple[Case, Oracle]:
        case = Case.make(question)
        return case, Oracle.of(case)

    checked = []
    for contender in contenders:
        if reason := contender.reason_against(problem):
            refused.append(Absent(problem, contender.name, reason))
            continue
        case, oracle = prepared(contender.question(problem))
        try:
            attempt = contender.attempt(case)
            with torch.inference_mode(not problem.trains):
                answer = attempt.answer()
            checked.append(Checked(contender, attempt, oracle.check(answer)))
        except WrongAnswerError as error:
            wrong.append(Absent(problem, contender.name, str(error)))
        except Exception as error:
            # A contender that fails must not take the whole run with it; it fails the run's result.
            wrong.append(Absent(problem, contender.name, f"raised {error!r}"))
    return checked


def _time(
    problem: Problem,
    checked: Sequence[Checked],
    options: Options,
    measure_peak: Callable[[float, int, torch.dtype], float],
) -> tuple[dict[str, Timing], float]:
    """Every contender's timing, and the FMA peak in between: the clock may have moved since."""
    peaks: list[float] = []
    with torch.inference_mode(not problem.trains):
        timings = interleave(
            {entry.contender.name: entry.attempt.run for entry in checked},
            options.plan,
            after_round=lambda: peaks.append(
                measure_peak(_PEAK_SAMPLE_SECONDS, options.threads, problem.torch_dtype)
            ),
        )
    return timings, median(peaks)


def _rows(
    problem: Problem,
    checked: Sequence[Checked],
    timings: Mapping[str, Timing],
    machine: Machine,
    flops_per_second: float,
) -> Iterator[Row]:
    """Times turned into rates and shares. All contenders are held to the problem's own work."""
    bandwidth = machine.level_for(problem.bytes).bytes_per_second
    floor = problem.floor(flops_per_second, bandwidth)
    flops = 2 * problem.multiply_adds
    ours = timings.get(OURS)
    for entry in checked:
        timing = timings[entry.contender.name]
        lower, upper = timing.quartiles
        yield Row(
            problem=problem,
            contender=entry.contender.name,
            same_function=entry.contender.same_function,
            rounds=len(timing.samples),
            calls=timing.calls,
            median_us=timing.median * 1e6,
            lower_us=lower * 1e6,
            upper_us=upper * 1e6,
            gflops=flops / timing.median / 1e9,
            share_of_peak=flops / timing.median / flops_per_second,
            floor_us=floor.seconds * 1e6,
            bound=floor.bound,
            share_of_floor=floor.seconds / timing.median,
            ours_is_faster=timing.times_slower_than(ours) if ours else None,
            error_over_bound=entry.error_over_bound,
        )


@contextmanager
def _torch_threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
