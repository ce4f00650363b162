"""The benchmark: its arithmetic, its clockwork, its honesty, and what it leaves behind."""

from __future__ import annotations

import csv
import itertools
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import get_args

import pytest
import torch
from torch.nn.functional import conv2d

from groupconv_ext import _ops, functional
from groupconv_ext.bench import (
    correctness,
    html,
    machine,
    overhead,
    plots,
    problems,
    publish,
    results,
    rivals,
    runner,
    summary,
    terminal,
)
from groupconv_ext.bench.methods import Case, Method
from groupconv_ext.bench.problems import LAYERS, Problem
from groupconv_ext.bench.results import Absent, Report
from groupconv_ext.bench.rivals import CONTENDERS, Contender
from groupconv_ext.bench.suites import GRID_NETWORK, SUITES, select
from groupconv_ext.bench.timing import Plan

TINY = Problem("tiny", 12, 8, 6, 5, 3, 1, 1, groups=4, kind="permuted", batch=2)
TINY_POINTWISE = Problem("tiny", 12, 24, 5, 5, 1, 2, 0, groups=4, kind="permuted")
MACHINE = machine.Machine(
    cpu="a <b>fast</b> processor",
    threads=1,
    flops_per_second=100e9,
    levels=(machine.Level("L2", 1 << 20, 100e9), machine.Level("DRAM", None, 20e9)),
)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny convolutions would spend their time waking threads, above all on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def reference_method(case: Case) -> Method:
    problem = case.problem

    def function(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return functional.conv2d(
            x,
            weight,
            partition=case.partition,
            stride=problem.stride,
            padding=problem.padding,
            backend="reference",
        )

    return Method(function, case.weight)


def off_by(change: Callable[[torch.Tensor], torch.Tensor]) -> Contender:
    def method(case: Case) -> Method:
        right = reference_method(case)
        return Method(lambda x, w: change(right.function(x, w)), right.weight)

    return Contender("broken", "a contender that is not right", method)


def raising(_: Case) -> Method:
    raise MemoryError("too large")


# A stand-in for the native kernels, so that these tests do not need them.
OURS = Contender(rivals.OURS, "the reference in place of our kernels", reference_method)
RIVALS = [contender for name, contender in CONTENDERS.items() if not name.startswith("native")]


def run(chosen: list[Problem], contenders: list[Contender]) -> Report:
    quick = Plan(seconds=0, least_rounds=3, sample_seconds=1e-5)
    return runner.run(
        "tiny",
        chosen,
        contenders,
        runner.Options(plan=quick, show_progress=False),
        measure_machine=lambda threads: replace(MACHINE, threads=threads),
        measure_peak=lambda seconds, threads, dtype: 80e9,
        measure_overhead=lambda plan: (overhead.Overhead("inference", 1, 3.0, 2.0, 1.5),),
    )


@pytest.fixture(scope="module")
def report() -> Report:
    variants = [
        replace(TINY, kind=kind, layout=layout, direction=direction)
        for kind in ("permuted", "ragged")
        for layout in ("NCHW", "NHWC")
        for direction in ("forward", "forward+backward")
    ]
    return run(variants, [OURS, *RIVALS])


# ---- problems ------------------------------------------------------------------------------------


def test_the_promised_rows_are_in_both_suites() -> None:
    promised = [
        "1x1 256-256 56x56 G4",
        "1x1 256-256 56x56 G8",
        "1x1 256-256 56x56 G32",
        "1x1 512-512 28x28 G8",
        "1x1 1024-1024 14x14 G8",
        "1x1 2048-2048 7x7 G8",
        "1x1 2048-2048 7x7 G32",
        "3x3 128-128 56x56 G32",
        "3x3 256-256 28x28 G32",
        "3x3 256-256 28x28 G8",
        "3x3 1024-1024 7x7 G32",
        "3x3 256-256 28x28 G256",
    ]
    for suite in (SUITES["quick"], SUITES["full"]):
        names = [problem.name for problem in suite]
        for row in promised:
            variant = f" {row} permuted N1 NCHW float32 forward"
            assert any(name.endswith(variant) for name in names), row


def test_names_are_unique_plain_and_found_by_their_words() -> None:
    for suite in SUITES.values():
        names = [problem.name for problem in suite]
        assert len(set(names)) == len(names)
        assert all(name.isascii() for name in names)
    found = select(SUITES["full"], words=["SHUFFLENET", "n16 "], layout="NHWC", direction="forward")
    assert found
    assert {problem.network for problem in found} == {"shufflenet-g3"}
    assert {(problem.batch, problem.layout, problem.trains) for problem in found} == {
        (16, "NHWC", False)
    }


def test_problems_in_another_dtype_come_once() -> None:
    quick, full = SUITES["quick"], SUITES["full"]
    assert {p.dtype for p in select(quick, dtype="bfloat16")} == {"bfloat16"}
    assert len(select(quick, dtype="bfloat16")) == len(quick)
    assert len({p.dtype for p in full}) == 2
    found = select(full, dtype="bfloat16")
    assert len(found) == len(set(found)) == len({p for p in full if p.dtype == "float32"})


def test_the_grid_has_every_cell_once() -> None:
    cells = [(p.kernel, p.height, p.channels_per_group, p.layout) for p in SUITES["grid"]]
    assert len(set(cells)) == len(cells) == 2 * 4 * 7 * 2


def test_random_layers_are_like_no_networks() -> None:
    drawn = SUITES["random"]
    assert len(set(drawn)) == len(drawn)
    assert sum(p.in_channels % 8 != 0 for p in drawn) > len(drawn) // 3
    assert {p.kind for p in drawn} == {"permuted", "ragged"}
    assert {p.trains for p in drawn} == {True, False}


def test_full_covers_every_network_batch_kind_layout_and_direction() -> None:
    full = SUITES["full"]
    assert {p.batch for p in full} == {1, 16}
    assert {p.layout for p in full} == {"NCHW", "NHWC"}
    assert {p.trains for p in full} == {True, False}
    assert {p.kind for p in full} == set(get_args(problems.Kind))
    assert {layer.network for layer in LAYERS} == {p.network for p in full}


@pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: layer.name)
def test_multiply_adds_and_output_size_by_another_way(layer: Problem) -> None:
    x = torch.empty(16, layer.in_channels, layer.height, layer.width, device="meta")
    weight = torch.empty(
        layer.out_channels, layer.in_channels, layer.kernel, layer.kernel, device="meta"
    )
    y = conv2d(x, weight, stride=layer.stride, padding=layer.padding)
    connections = int(layer.partition.mask().sum())
    forward = connections * layer.kernel * layer.kernel * 16 * y[0, 0].numel()
    assert y.shape[2:] == layer.output_size
    assert replace(layer, batch=16).multiply_adds == forward
    assert replace(layer, batch=16, direction="forward+backward").multiply_adds == 3 * forward


def test_counts_worked_out_by_hand() -> None:
    layer = next(p for p in LAYERS if p.shape == "1×1 256→256 56² G8")
    pixels = 3136
    assert layer.multiply_adds == 256 * 32 * pixels == 25_690_112
    assert layer.bytes == 4 * (256 * pixels + 256 * pixels + 8192)
    trained = replace(layer, batch=16, direction="forward+backward")
    activations = 16 * 256 * pixels
    assert trained.bytes == 4 * (5 * activations + 3 * 8192)
    assert replace(layer, dtype="bfloat16").bytes == layer.bytes // 2

    strided = next(p for p in LAYERS if p.shape == "1×1 256→512 56² s2 G8")
    assert strided.bytes == 4 * (256 * 28 * 28 + 512 * 28 * 28 + 512 * 32)
    skipping = replace(TINY, kernel=3, stride=4, padding=0, height=7, width=8)
    assert skipping.output_size == (2, 2)
    assert skipping.bytes == 4 * (2 * 12 * (6 * 6) + 2 * 8 * 4 + 8 * 3 * 9)


def test_bytes_leave_out_channels_that_nobody_reads() -> None:
    overlapping = Problem("tiny", 40, 8, 3, 3, 1, 1, 0, groups=4, kind="overlapping")
    read = {channel for group in overlapping.partition.inputs for channel in group}
    assert len(read) < 40
    assert overlapping.partition.has_overlap
    assert overlapping.bytes == 4 * (len(read) * 9 + 8 * 9 + 8 * 10)


def test_the_floor_is_the_larger_time() -> None:
    layer = next(p for p in LAYERS if p.shape == "1×1 256→256 56² G8")
    assert layer.floor(1e9, 1e18) == (2 * layer.multiply_adds / 1e9, "compute")
    assert layer.floor(1e18, 1e9) == (layer.bytes / 1e9, "memory")


@pytest.mark.parametrize("channels", [(256, 256), (240, 60), (64, 384), (96, 96)])
@pytest.mark.parametrize("groups", [2, 3, 4, 6, 8])
def test_ragged_is_uneven_without_empty_groups_and_costs_what_even_does(
    channels: tuple[int, int], groups: int
) -> None:
    in_channels, out_channels = (size - size % groups for size in channels)
    layer = Problem("tiny", in_channels, out_channels, 4, 4, 1, 1, 0, groups, kind="ragged")
    even = replace(layer, kind="contiguous")
    assert layer.multiply_adds == even.multiply_adds
    assert not layer.partition.is_even
    assert all(n_out > 0 and n_in > 0 for n_out, n_in in layer.partition.sizes)
    assert any(n_in % 8 for _, n_in in layer.partition.sizes)


# ---- contenders ----------------------------------------------------------------------------------

EVERY_KIND = [
    TINY,
    replace(TINY, kind="contiguous"),
    replace(TINY, kind="interleaved"),
    replace(TINY, kind="shuffled"),
    replace(TINY, kind="ragged"),
    replace(TINY, kind="overlapping"),
    replace(TINY, in_channels=8, groups=8),
    TINY_POINTWISE,
    replace(TINY_POINTWISE, kind="ragged"),
    replace(TINY, dtype="bfloat16"),
]


@pytest.mark.parametrize("direction", ["forward", "forward+backward"])
@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
@pytest.mark.parametrize("problem", EVERY_KIND, ids=lambda problem: problem.name)
def test_every_rival_is_right_or_says_why_it_has_no_place(
    problem: Problem, layout: problems.Layout, direction: problems.Direction
) -> None:
    problem = replace(problem, layout=layout, direction=direction)
    for contender in [OURS, *RIVALS]:
        if reason := contender.reason_against(problem):
            assert len(reason) > 10
            continue
        question = contender.question(problem)
        assert contender.same_function == (question.kind == problem.kind)
        case = Case.make(question)
        answer = contender.attempt(case).answer()
        assert correctness.Oracle.of(case).check(answer) <= 1
        if contender is not OURS:  # the reference makes no promise about layout
            assert answer[0].is_contiguous(memory_format=question.memory_format), contender.name


def test_each_problem_has_a_rival_that_computes_the_same_function() -> None:
    for problem in SUITES["full"]:
        same = [c for c in RIVALS if c.same_function and not c.reason_against(problem)]
        assert same, problem.name


def test_nobody_walks_into_the_heap_corruption_of_torch() -> None:
    dangerous = replace(TINY_POINTWISE, layout="NHWC", direction="forward+backward")
    allowed = [c.name for c in RIVALS if not c.reason_against(dangerous)]
    assert allowed == ["aten-other-layout", "dense-other-layout"]
    assert "heap" in (CONTENDERS["aten"].reason_against(dangerous) or "")


@pytest.mark.skipif(_ops.unavailable is not None, reason=str(_ops.unavailable))
@pytest.mark.parametrize("name", ["native", "native-contiguous"])
def test_our_kernels_answer_as_contenders(name: str) -> None:
    for direction in ("forward", "forward+backward"):
        question = CONTENDERS[name].question(replace(TINY, direction=direction))
        case = Case.make(question)
        correctness.Oracle.of(case).check(CONTENDERS[name].attempt(case).answer())


# ---- correctness ---------------------------------------------------------------------------------


def test_accumulation_lengths() -> None:
    ragged = Problem("tiny", 16, 8, 6, 6, 3, 2, 1, groups=4, kind="ragged", batch=5)
    sizes = ragged.partition.sizes
    assert correctness.accumulation_lengths(ragged) == (
        9 * max(n_in for _, n_in in sizes),
        9 * max(n_out for n_out, _ in sizes),
        5 * 3 * 3,
    )


@pytest.mark.parametrize("taps", [1, 3])
def test_one_wrong_weight_is_caught(taps: int) -> None:
    problem = Problem("tiny", 512, 64, 7, 7, taps, 1, taps // 2, groups=1, kind="contiguous")
    case = Case.make(problem)
    oracle = correctness.Oracle.of(case)
    wrong = case.weight.clone()
    wrong[1234, 0, 0] = 0
    answer = reference_method(replace(case, weight=wrong)).function(case.x, wrong)
    with pytest.raises(correctness.WrongAnswerError, match="output is off by"):
        oracle.check((answer,))


def test_nan_and_wrong_shapes_are_wrong_answers() -> None:
    case = Case.make(TINY)
    oracle = correctness.Oracle.of(case)
    right = oracle.expected[0]
    with pytest.raises(correctness.WrongAnswerError, match="nan"):
        oracle.check((torch.where(right == right.max(), torch.nan, right),))
    with pytest.raises(correctness.WrongAnswerError, match="shape"):
        oracle.check((right[:1],))


def test_a_wrong_contender_is_reported_and_not_timed() -> None:
    slightly_off = off_by(lambda y: y * 1.001)
    failing = Contender("failing", "a contender that raises", raising)
    found = run([TINY], [OURS, slightly_off, failing, CONTENDERS["aten"]])
    assert [row.contender for row in found.rows] == [rivals.OURS, "aten"]
    assert [entry.contender for entry in found.wrong] == ["broken", "failing"]
    assert "off by" in found.wrong[0].reason
    assert "too large" in found.wrong[1].reason
    assert "WRONG: broken on tiny 3x3" in terminal.text(found)
    assert "Wrong answers" in html.page(found, {})


# ---- results -------------------------------------------------------------------------------------


def test_rows_hold_together(report: Report) -> None:
    for row in report.rows:
        seconds = row.median_us / 1e6
        assert row.gflops == pytest.approx(2 * row.problem.multiply_adds / seconds / 1e9)
        assert row.share_of_peak == pytest.approx(row.gflops / 80)
        assert row.share_of_floor == pytest.approx(row.floor_us / row.median_us)
        assert row.lower_us <= row.median_us <= row.upper_us
        assert row.error_over_bound <= 1
        assert (row.contender == rivals.OURS) <= (row.ours_is_faster == 1)
    assert not report.wrong
    assert {row.contender for row in report.rows} | {x.contender for x in report.refused} == {
        contender.name for contender in [OURS, *RIVALS]
    }


def test_json_round_trip_and_csv(report: Report, tmp_path: Path) -> None:
    json_path, csv_path = results.save(report, tmp_path / "new" / "folder")
    assert results.load(json_path) == report
    with csv_path.open(encoding="utf-8", newline="") as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == len(report.rows)
    for line, row in zip(lines, report.rows, strict=True):
        assert line["name"] == row.problem.name
        assert line["kind"] == row.problem.kind
        assert float(line["median_us"]) == row.median_us
    assert sorted(path.name for path in json_path.parent.iterdir()) == ["bench.csv", "bench.json"]


def test_foreign_and_truncated_files_are_refused(report: Report, tmp_path: Path) -> None:
    path, _ = results.save(report, tmp_path)
    whole = path.read_text(encoding="utf-8")
    older = json.dumps({**json.loads(whole), "format": "groupconv-bench-0"})
    for text in (whole[: len(whole) // 2], "", "[]", "{}", '"text"', older):
        path.write_text(text, encoding="utf-8")
        with pytest.raises(ValueError, match="not a benchmark report"):
            results.load(path)


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    results.write_whole(path, "old")
    with pytest.raises(UnicodeEncodeError):
        results.write_whole(path, "\ud800")
    assert path.read_text(encoding="utf-8") == "old"
    assert list(tmp_path.iterdir()) == [path]


# ---- summary -------------------------------------------------------------------------------------


def timed(report: Report, contender: str, **changes: object) -> results.Row:
    row = next(row for row in report.rows if row.contender == contender)
    return replace(row, **changes)


def test_geometric_means_the_worst_and_the_best_rival(report: Report) -> None:
    other = replace(TINY, batch=7)
    rows = (
        timed(report, rivals.OURS, median_us=10.0, problem=TINY),
        timed(report, "aten", median_us=40.0, ours_is_faster=4.0, problem=TINY),
        timed(report, "dense", median_us=20.0, ours_is_faster=2.0, problem=TINY),
        timed(report, "aten-contiguous", median_us=5.0, ours_is_faster=0.5, problem=TINY),
        timed(report, rivals.OURS, median_us=10.0, problem=other),
        timed(report, "aten", median_us=2.5, ours_is_faster=0.25, problem=other),
    )
    made = replace(report, rows=rows)
    assert summary.best_rival(made.by_problem[TINY].values()) == rows[2]
    found = {entry.contender: entry for entry in summary.versus(made)}
    assert found["aten"].geometric_mean == pytest.approx(1)
    assert (found["aten"].least, found["aten"].least_problem) == (0.25, other)
    assert (found["aten"].count, found["aten"].losses) == (2, 1)
    assert found[summary.BEST_RIVAL].geometric_mean == pytest.approx((2 * 0.25) ** 0.5)
    assert not found["aten-contiguous"].same_function


def test_every_layer_belongs_to_a_class() -> None:
    assert {summary.family(layer) for layer in LAYERS} <= set(summary.FAMILIES)
    of = {layer.shape: summary.family(layer) for layer in LAYERS}
    assert of["1×1 256→256 56² G8"] == "1×1, ≥ 32 channels/group"
    assert of["1×1 256→256 56² G32"] == "1×1, 8–15 channels/group"
    assert of["3×3 128→128 56² G32"] == "K×K, < 8 channels/group"
    assert of["3×3 256→256 28² G256"] == "depthwise"


def test_the_text_has_a_line_for_each_problem(report: Report) -> None:
    text = terminal.text(report)
    table = text.partition("\n\nclass of layers")[0]
    assert table.count("3×3 12→8 6×5 G4") == 8
    assert "best of PyTorch" in text
    assert "FMA peak 100 GFLOP/s" in text
    assert "1.50×" in text


# ---- pictures and the page -----------------------------------------------------------------------


class Page(HTMLParser):
    """Collects what could load something, and checks that elements close in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.links: list[str] = []
        self.tags: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [
            value or ""
            for name, value in attrs
            if name.split(":")[-1] in ("href", "src", "srcset", "data", "action")
        ]
        if tag not in ("meta", "input", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def assert_self_contained(text: str) -> Page:
    page = Page(text)
    assert page.open == []
    assert all(link.startswith("#") for link in page.links)
    assert not re.search(r"https?:|//\w|@import|\burl\((?!#)", text)
    return page


def test_the_page_is_self_contained_with_and_without_pictures(report: Report) -> None:
    bare = assert_self_contained(html.page(report, {}))
    assert "svg" not in bare.tags
    assert "groupconv-ext[plots]" in html.page(report, {})
    pytest.importorskip("matplotlib")
    pictures = {name: plots.svg(figure) for name, figure in plots.draw(report).items()}
    illustrated = assert_self_contained(html.page(report, pictures))
    assert illustrated.tags.count("svg") == 3


def test_the_page_escapes_what_it_is_told(report: Report) -> None:
    odd = replace(report, wrong=(Absent(TINY, "<script>", "a < b & c"),))
    text = html.page(odd, {})
    assert "<b>fast</b>" not in text
    assert "&lt;script&gt;" in text
    assert "a &lt; b &amp; c" in text


def test_pictures_take_the_ink_of_the_page(report: Report) -> None:
    pytest.importorskip("matplotlib")
    figures = plots.draw(report)
    assert set(figures) == {"speed-up", "share-of-peak", "roofline"}
    for figure in figures.values():
        assert "currentColor" in plots.svg(figure)
        assert plots.png(figure).startswith(b"\x89PNG")


def test_a_heat_map_has_every_share_and_says_of_what() -> None:
    pytest.importorskip("matplotlib")
    layers = [
        replace(TINY, network=GRID_NETWORK, groups=groups, height=size, width=size)
        for groups, size in itertools.product((2, 4), (5, 6))
    ]
    grid = run(layers, [OURS, CONTENDERS["aten"], CONTENDERS["aten-contiguous"]])
    figures = plots.draw(grid)
    assert "heat-map-nhwc" not in figures
    figure = figures["heat-map-nchw"]
    ours, best, unpermuted = figure.axes
    shown = {(text.get_position(), text.get_text()) for text in ours.texts}
    for problem, rows in grid.by_problem.items():
        place = ((3, 6).index(problem.channels_per_group), (6, 5).index(problem.height))
        assert (place, f"{100 * rows[rivals.OURS].share_of_peak:.0f}") in shown
    assert [len(axes.texts) for axes in (ours, best, unpermuted)] == [4, 4, 4]
    said = figure.get_supxlabel()
    for part in (MACHINE.cpu, "one thread", grid.conditions["date"][:10], "FMA peak 100 GFLOP/s"):
        assert part in said


def test_nothing_to_draw_without_ours() -> None:
    pytest.importorskip("matplotlib")
    alone = run([TINY], [CONTENDERS["aten"]])
    assert plots.draw(alone) == {}
    assert alone.rows[0].ours_is_faster is None
    assert_self_contained(html.page(alone, {}))
    assert "aten" in terminal.text(alone)


def test_without_matplotlib_everything_but_the_pictures(
    report: Report, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plots, "HAVE_MATPLOTLIB", False)
    with pytest.raises(ImportError, match=r"groupconv-ext\[plots\]"):
        plots.draw(report)
    paths = publish.publish(report, tmp_path)
    assert [path.name for path in paths] == ["bench.json", "bench.csv", "report.html"]
    assert "No pictures" in paths[-1].read_text(encoding="utf-8")


def test_a_run_leaves_tables_pictures_and_a_page(report: Report, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    paths = publish.publish(report, tmp_path)
    assert all(path.stat().st_size > 500 for path in paths)
    assert {path.suffix for path in paths} == {".json", ".csv", ".png", ".html"}
