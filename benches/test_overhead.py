"""What a call costs on a layer of one pixel, ours beside ``F.conv2d``."""

from __future__ import annotations

import pytest
import torch

from groupconv_ext import _ops
from groupconv_ext.bench.overhead import GROUPS, Pair, measure, pairs
from groupconv_ext.bench.timing import Plan

PAIRS = [pair for groups in GROUPS for pair in pairs(groups)]

pytestmark = pytest.mark.skipif(_ops.unavailable is not None, reason=str(_ops.unavailable))


@pytest.mark.benchmark(max_time=0.3, warmup=True)
@pytest.mark.parametrize("whose", ["ours", "theirs"])
@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: f"{pair.mode}, {pair.groups} groups")
def test_overhead(benchmark, pair: Pair, whose: str) -> None:
    benchmark.group = f"one pixel, {pair.mode}, {pair.groups} groups"
    with torch.inference_mode(pair.inference):
        benchmark(getattr(pair, whose))


def test_an_inference_call_takes_at_most_twice_as_long() -> None:
    measured = [entry for entry in measure(Plan(seconds=0.5)) if entry.mode == "inference"]
    assert all(entry.ratio <= 2 for entry in measured), measured
