"""The benchmark's instruments: the interleaved clock, the progress bar, the machine's limits."""

from __future__ import annotations

import io
from collections.abc import Callable

import pytest
import torch

from groupconv_ext import _ops
from groupconv_ext.bench import machine
from groupconv_ext.bench.progress import progress
from groupconv_ext.bench.timing import Plan, Timing, interleave

# ---- timing --------------------------------------------------------------------------------------


class Clock:
    """Time that passes only when a call says so."""

    def __init__(self) -> None:
        self.now = 0.0
        self.pace = 1.0
        self.calls: list[str] = []

    def __call__(self) -> float:
        return self.now

    def call(self, name: str, seconds: float) -> Callable[[], None]:
        def run() -> None:
            self.calls.append(name)
            self.now += seconds * self.pace

        return run


def test_times_and_ratios_on_a_clock_that_is_known() -> None:
    clock = Clock()
    plan = Plan(seconds=1.0, least_rounds=5, most_rounds=9, sample_seconds=1e-3)
    calls = {"short": clock.call("short", 1e-5), "long": clock.call("long", 2e-2)}
    rounds = []
    timings = interleave(calls, plan, after_round=lambda: rounds.append(None), clock=clock)
    assert timings["short"].median == pytest.approx(1e-5)
    assert timings["long"].median == pytest.approx(2e-2)
    assert timings["short"].calls in (100, 101)
    assert timings["long"].calls == 1
    assert len(timings["long"].samples) == len(rounds) == 9
    assert timings["long"].times_slower_than(timings["short"]) == pytest.approx(2000)


def test_a_machine_that_slows_down_moves_times_but_no_ratio() -> None:
    clock = Clock()
    plan = Plan(seconds=0, least_rounds=9, sample_seconds=1e-3)

    def slow_down() -> None:
        clock.pace *= 1.5

    calls = {"one": clock.call("one", 1e-3), "three": clock.call("three", 3e-3)}
    timings = interleave(calls, plan, after_round=slow_down, clock=clock)
    assert timings["three"].times_slower_than(timings["one"]) == pytest.approx(3)
    lower, upper = timings["one"].quartiles
    assert lower < timings["one"].median < upper


def test_contenders_take_turns_and_turns_at_being_first() -> None:
    clock = Clock()
    plan = Plan(seconds=0, least_rounds=3, sample_seconds=1e-3)
    calls = {name: clock.call(name, 1e-2) for name in "abc"}
    interleave(calls, plan, clock=clock)
    warm_up = 2 * 3
    assert "".join(clock.calls[warm_up:]) == "abcbcacab"


def test_a_single_sample_has_quartiles() -> None:
    assert Timing((2.0,), 1).quartiles == (2.0, 2.0)


def test_rounds_are_odd_and_within_the_plan() -> None:
    plan = Plan(seconds=1.0, least_rounds=5, most_rounds=31)
    assert plan.rounds(10.0) == 5
    assert plan.rounds(0.1) == 11
    assert plan.rounds(1e-9) == 31


# ---- progress ------------------------------------------------------------------------------------


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_counts_and_clears_up() -> None:
    stream = Terminal()
    now = iter(range(0, 100, 10))
    items = list(progress(["a", "b"], str.upper, stream=stream, clock=lambda: next(now)))
    assert items == ["a", "b"]
    assert "0/2  A" in stream.getvalue()
    assert "1/2 0:10 left  B" in stream.getvalue()
    assert stream.getvalue().endswith("\r\x1b[K")


@pytest.mark.parametrize(("stream", "enabled"), [(Terminal(), False), (io.StringIO(), True)])
def test_progress_is_silent_when_off_or_not_on_a_terminal(
    stream: io.StringIO, enabled: bool
) -> None:
    assert list(progress([1, 2], str, enabled=enabled, stream=stream)) == [1, 2]
    assert stream.getvalue() == ""


# ---- machine -------------------------------------------------------------------------------------


def test_the_smallest_level_that_holds_the_data() -> None:
    levels = (machine.Level("L2", 1 << 20, 100e9), machine.Level("DRAM", None, 20e9))
    measured = machine.Machine("a processor", 1, 100e9, levels)
    assert measured.level_for(1 << 20).name == "L2"
    assert measured.level_for((1 << 20) + 1).name == "DRAM"


def test_copy_bandwidth_is_plausible() -> None:
    assert 1e6 < machine.copy_bandwidth(1 << 16) < 1e13


def test_caches_have_sizes() -> None:
    assert all(size >= 1 << 15 for size in machine.cache_sizes().values())


@pytest.mark.skipif(_ops.unavailable is not None, reason=str(_ops.unavailable))
def test_fma_peak_of_two_threads_is_more_than_nothing() -> None:
    assert machine.fma_peak(0.001) > 1e8
    assert machine.fma_peak(0.001, threads=2) > 1e8


def test_conditions_say_what_ran() -> None:
    said = machine.conditions(threads=3)
    assert said["torch"] == torch.__version__
    assert said["threads"] == "3"
    assert all(said.values())
