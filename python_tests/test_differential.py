"""Thousands of random convolutions, every instruction set against one dense oracle.

Case s is drawn from seed s alone. A run takes the seeds from ``GROUPCONV_SEED`` on, by default the
time; it shows that at its beginning and, with the number of cases, at its end. A failure names its
own: start a run from there and the case comes first.

The oracle is a dense convolution in float64 whose weight is zero off the mask: nothing of the
library's but ``Partition.unpack`` and ``pack``.
"""

import hashlib
import multiprocessing
import os
import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import pytest
import torch
from conftest import RANDOM_CASES
from helpers import (
    DTYPES,
    ISAS,
    LAYOUTS,
    PARTITIONS,
    Exact,
    Geometry,
    assert_within_rounding,
    dense_reference,
    exact,
    forced_isa,
    needs_native,
    window_of,
)
from torch.nn.grad import conv2d_input, conv2d_weight

from groupconv_ext import Partition, Prologue, _ops
from groupconv_ext._layout import compute_dtype
from groupconv_ext.autograd import ACTIVATIONS, convolve, input_grad, weight_grad
from groupconv_ext.prologue import convolve_after

pytestmark = [needs_native, pytest.mark.native]

FIRST_SEED = int(os.environ["GROUPCONV_SEED"])
CASES = 2000
SECONDS = 45  # a slow or instrumented build stops there


# ---- drawing ------------------------------------------------------------------------------------


def draw_partition(rng: random.Random, most_channels: int) -> Partition:
    groups = rng.choice((1, 1, 2, 3, 4, 7))
    outs, ins = (rng.choice((1, 8, 16, rng.randint(1, most_channels))) for _ in range(2))
    kind = rng.randrange(7)
    if kind == 0:
        return rng.choice(list(PARTITIONS.values()))
    if kind == 1:  # depthwise, in place, permuted or with a channel multiplier
        many = rng.choice((outs, outs * 3))
        return rng.choice(
            (
                Partition.contiguous(outs, many, outs),
                Partition.random(outs, many, outs, seed=rng.randrange(99)),
            )
        )
    if kind == 2:
        return Partition.contiguous(ins * groups, outs * groups, groups)
    if kind == 3:
        return Partition.random(ins * groups, outs * groups, groups, seed=rng.randrange(99))
    if kind == 4:
        return Partition.random(ins, outs, groups, seed=rng.randrange(99), uneven=True)
    if kind == 5:  # small groups that share vectors
        size, count = rng.randint(1, 8), rng.randint(1, 12)
        return Partition.random(size * count, size * count, count, seed=rng.randrange(99))
    # Overlapping, empty, ragged groups, inputs in any order or read by nobody.
    labels = [rng.randrange(groups) for _ in range(outs)]
    return Partition(
        ins,
        outs,
        [rng.sample(range(ins), rng.randint(0, ins)) for _ in range(groups)],
        [[n for n, label in enumerate(labels) if label == g] for g in range(groups)],
    )


def draw_geometry(rng: random.Random, largest_side: int) -> Geometry:
    kernel = rng.choice(((1, 1), (1, 1), (3, 3), (rng.randint(1, 5), rng.randint(1, 5))))
    stride = rng.choice(((1, 1), (1, 1), (2, 2), (rng.randint(1, 3), rng.randint(1, 3))))
    dilation = rng.choice(((1, 1), (1, 1), (rng.randint(1, 3), rng.randint(1, 3))))
    around = (kernel[0] // 2, kernel[0] // 2, kernel[1] // 2, kernel[1] // 2)
    anyhow = tuple(rng.choice((0, 0, 1, 2, 4)) for _ in range(4))
    padding = rng.choice((around, (0, 0, 0, 0), anyhow))
    least = [
        max(1, dilation[i] * (kernel[i] - 1) + 1 - padding[2 * i] - padding[2 * i + 1])
        for i in range(2)
    ]
    more = (0, 0, rng.randrange(4), rng.randrange(4, largest_side))  # kernel = map in a quarter
    height, width = rng.choice(
        ((least[0], least[1]), tuple(size + rng.choice(more) for size in least))
    )
    return Geometry((height, width), kernel, stride, padding, dilation)


def draw_prologue(rng: random.Random, channels: int, dtype: torch.dtype) -> Prologue | None:
    if rng.random() < 0.6:
        return None

    def numbers() -> torch.Tensor | None:
        kind = rng.choice((dtype, torch.float32 if dtype == torch.bfloat16 else dtype))
        values = torch.randn(2 * channels).to(kind)
        values[rng.randrange(channels)] = 0
        return rng.choice((None, values[:channels], off_lines(values[:channels]), values[::2]))

    return Prologue(numbers(), numbers(), rng.choice((None, "relu", "relu")))


def off_lines(values: torch.Tensor) -> torch.Tensor:
    """The same numbers, contiguous, at an address that no vector begins at."""
    memory = torch.full((values.numel() + 1,), torch.nan, dtype=values.dtype)
    return memory[1:].view(values.shape).copy_(values)


class Case(NamedTuple):
    """A convolution with everything that goes into it and its gradients."""

    partition: Partition
    geometry: Geometry
    x: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None
    residual: torch.Tensor | None
    grad: torch.Tensor
    activation: str
    layouts: tuple[str, str]  # of x and of the gradient
    prologue: Prologue | None = None

    def run(self, x: torch.Tensor, grad: torch.Tensor) -> dict[str, torch.Tensor]:
        """The native operations on these images."""
        partition, geometry, window = self.partition, self.geometry, window_of(self.geometry)
        weight, kernel = self.weight, geometry.kernel_size
        if self.prologue is not None:
            return self.run_after(self.prologue, x, grad)
        last = LAYOUTS["channels_last"](x).stride() == x.stride()
        return {
            "y": convolve(x, weight, self.bias, self.residual, partition, window, self.activation),
            "∂x": input_grad(grad, weight, partition, window, geometry.input_size, last),
            "∂weight": weight_grad(grad, x, partition, window, kernel),
        }

    def run_after(
        self, prologue: Prologue, x: torch.Tensor, grad: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        partition, window = self.partition, window_of(self.geometry)
        weight, entries, kernel = self.weight, self.partition.entries, self.geometry.kernel_size
        before = (prologue.scale, prologue.shift, prologue.activation == "relu")
        call = (weight, self.bias, self.residual, partition, window, self.activation)
        by_x, by_scale, by_shift = _ops.prologue_conv2d_input_grad(
            grad, weight, x, *before, partition.cpu_table, *window
        )
        return {
            "y": convolve_after(prologue, x, *call),
            "∂x": by_x,
            "∂weight": _ops.prologue_conv2d_weight_grad(
                grad, x, *before, partition.cpu_table, entries, *kernel, *window
            ),
            "∂scale": by_scale,
            "∂shift": by_shift,
        }


def draw_case(rng: random.Random) -> Case:
    # Now and then a map as networks have them, or many channels; the rest is small.
    large = rng.random()
    partition = draw_partition(rng, 160 if large > 0.97 else 24)
    geometry = draw_geometry(rng, 112 if large < 0.03 else 14)
    dtype = rng.choice(DTYPES)
    batch = rng.choice((0, 1, 1, 2, 2, 3, 5)) if 0.03 < large < 0.97 else 1
    names = list(LAYOUTS)
    common = ("NCHW", "channels_last")
    layouts = tuple(rng.choice((*common, rng.choice(names))) for _ in range(3))

    def image(channels: int, size: tuple[int, int], layout: str) -> torch.Tensor:
        return LAYOUTS[layout](torch.randn(batch, channels, *size, dtype=dtype))

    x = image(partition.in_channels, geometry.input_size, layouts[0])
    weight = torch.randn(partition.entries, *geometry.kernel_size, dtype=dtype)
    out_size = window_of(geometry).output_size(*geometry.input_size, *geometry.kernel_size)
    return Case(
        partition,
        geometry,
        x,
        rng.choice((weight, off_lines(weight))),
        rng.choice((None, off_lines(torch.randn(partition.out_channels, dtype=dtype)))),
        rng.choice((None, image(partition.out_channels, out_size, layouts[2]))),
        image(partition.out_channels, out_size, layouts[1]),
        rng.choice(ACTIVATIONS),
        layouts[:2],
        draw_prologue(rng, partition.in_channels, dtype),
    )


# ---- the oracle ---------------------------------------------------------------------------------


class Prepared(NamedTuple):
    """What a prologue makes of x, in float64."""

    value: torch.Tensor
    magnitude: torch.Tensor  # of the terms whose sum it is
    on: torch.Tensor  # where a gradient passes
    unsure: torch.Tensor  # where rounding decides whether it does


def prepared(case: Case) -> Prepared:
    x = case.x.double()
    every = torch.ones(x.shape, dtype=torch.bool)
    if case.prologue is None:
        return Prepared(x, x.abs(), every, ~every)
    scale, shift = scale_and_shift(case)
    value, magnitude = x * scale + shift, (x * scale).abs() + shift.abs()
    if case.prologue.activation is None:
        return Prepared(value, magnitude, every, ~every)
    unsure = value.abs() < 1e-5 * magnitude
    return Prepared(value.relu(), magnitude, ~(value <= 0), unsure)


def scale_and_shift(case: Case) -> list[torch.Tensor]:
    assert case.prologue is not None
    given = (case.prologue.scale, case.prologue.shift)
    channels = case.partition.in_channels
    return [
        (torch.full((channels,), float(i == 0)) if numbers is None else numbers).double()[
            :, None, None
        ]
        for i, numbers in enumerate(given)
    ]


def after_prologue(case: Case, results: dict[str, Exact]) -> dict[str, Exact]:
    """With the roundings of x' in y and ∂weight, and ∂x, ∂scale and ∂shift from ∂x'."""
    if case.prologue is None:
        return results
    # Of x' itself; bfloat16 may hold x' and does hold ∂x', both rounded, in sums of float32.
    narrow = case.x.dtype == torch.bfloat16
    eps = torch.finfo(torch.float32 if narrow else case.x.dtype).eps
    more = 4 + (torch.finfo(torch.bfloat16).eps / eps if narrow else 0)
    before, x = prepared(case), case.x.double()
    scale, _ = scale_and_shift(case)
    given = results["∂x"]
    value = given.value * before.on
    # What may be counted or not is an error by itself, whatever the sums.
    magnitude = given.magnitude * (before.on | before.unsure)
    magnitude = magnitude + given.value.abs() * before.unsure / eps
    terms = given.terms + more
    each = float(x.shape[0] * x.shape[2] * x.shape[3])
    most = (terms.max() if terms.numel() else terms.sum()) + each

    def summed(factor: torch.Tensor) -> Exact:
        total = (value * factor).sum((0, 2, 3))
        size = (magnitude * factor.abs()).sum((0, 2, 3))
        return Exact(total, size, most.expand_as(total))

    for name in ("y", "∂weight"):
        results[name] = results[name]._replace(terms=results[name].terms + more)
    results["∂x"] = Exact(value * scale, magnitude * scale.abs(), terms)
    return results | {"∂scale": summed(x), "∂shift": summed(torch.ones_like(x))}


def oracle(case: Case) -> dict[str, Exact]:
    """Sums of products, their magnitudes and lengths; the forward pass before its activation."""
    partition, geometry = case.partition, case.geometry
    top, bottom, left, right = geometry.padding
    height, width = geometry.input_size
    padded_size = (height + top + bottom, width + left + right)
    shape = (partition.out_channels, partition.in_channels, *geometry.kernel_size)

    def forward(
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        residual: torch.Tensor | None,
    ) -> torch.Tensor:
        return dense_reference(x, weight, partition, geometry, bias, None, residual)

    def by_x(grad: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        padded = conv2d_input(  # type: ignore[no-untyped-call]
            (len(grad), partition.in_channels, *padded_size),
            partition.unpack(weight),
            grad,
            geometry.stride,
            0,
            geometry.dilation,
        )
        return padded[:, :, top : top + height, left : left + width]

    def by_weight(grad: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        padded = torch.nn.functional.pad(x, (left, right, top, bottom)).contiguous()
        dense = conv2d_weight(  # type: ignore[no-untyped-call]
            padded, shape, grad.contiguous(), geometry.stride, 0, geometry.dilation
        )
        return partition.pack(dense)

    before = prepared(case)

    def of_prepared(operation: Callable[..., torch.Tensor], place: int, *others: Any) -> Exact:
        """With x' as that operand; its magnitude is not that of its value."""
        found, larger = (
            exact(operation, *others[:place], x, *others[place:])
            for x in (before.value, before.magnitude)
        )
        return found._replace(magnitude=larger.magnitude)

    results = {
        "y": of_prepared(forward, 0, case.weight, case.bias, case.residual),
        "∂x": exact(by_x, case.grad, case.weight),
        "∂weight": of_prepared(by_weight, 1, case.grad),
    }
    return after_prologue(case, results)


def only_at(images: torch.Tensor, where: tuple[int, ...], layout: str) -> torch.Tensor:
    marks = torch.zeros(images.shape, dtype=images.dtype)
    marks[where] = 1
    return LAYOUTS[layout](marks)


def spoil(case: Case, rng: random.Random) -> tuple[Case, Case]:
    """The case with a NaN in each image, and one whose images are zero but for a 1 there."""
    spoiled, marked = {}, {}
    for name, layout in zip(("x", "grad"), case.layouts, strict=True):
        images = getattr(case, name)
        where = tuple(rng.randrange(size) for size in images.shape)
        marks = only_at(images, where, layout)
        values = LAYOUTS[layout](images.clone().masked_fill(marks != 0, torch.nan))
        spoiled[name], marked[name] = values, marks
    ones = torch.ones_like(case.weight)
    return case._replace(**spoiled), marked_case(case, marked, ones)


def marked_case(case: Case, marked: dict[str, torch.Tensor], weight: torch.Tensor) -> Case:
    return case._replace(**marked, weight=weight, bias=None, residual=None, prologue=None)


def reached_by_nan(spoiled: Case, marks: Case) -> dict[str, torch.Tensor]:
    """Where a product has the marked element of x (in y and ∂weight) or of the gradient."""
    by_x = oracle(marks._replace(grad=torch.ones_like(marks.grad)))
    by_grad = oracle(marks._replace(x=torch.ones_like(marks.x)))
    # A ReLU that is off lets no gradient through; one of NaN does.
    in_x = (by_grad["∂x"].value != 0) & prepared(spoiled).on
    return {
        "y": by_x["y"].value != 0,
        "∂x": in_x,
        "∂weight": (by_x["∂weight"].value != 0) | (by_grad["∂weight"].value != 0),
        "∂scale": (in_x | spoiled.x.isnan()).any(3).any(2).any(0),
        "∂shift": in_x.any(3).any(2).any(0),
    }


# ---- the tests ----------------------------------------------------------------------------------


def check_case(seed: int) -> None:
    rng = random.Random(seed)
    torch.manual_seed(seed)
    case = draw_case(rng)
    expected = oracle(case)
    spoiled = reached = None
    sure = not prepared(case).unsure.any()
    if rng.random() < 0.25 and case.x.numel() and case.grad.numel() and sure:
        spoiled, marks = spoil(case, rng)
        reached = reached_by_nan(spoiled, marks)
    for isa in ISAS:
        with forced_isa(isa):
            for name, actual in case.run(case.x, case.grad).items():
                activation = case.activation if name == "y" else None
                try:
                    own = name not in ("∂scale", "∂shift")
                    assert actual.dtype == (case.x.dtype if own else compute_dtype(case.x))
                    assert_within_rounding(actual, expected[name], activation)
                except AssertionError as error:
                    raise AssertionError(f"{name} by {isa}: {error}") from None
            if spoiled is None or reached is None:
                continue
            for name, actual in spoiled.run(spoiled.x, spoiled.grad).items():
                assert torch.equal(actual.isnan(), reached[name]), (
                    f"{name} by {isa}: NaN at {actual.isnan().nonzero().tolist()[:4]} …, "
                    f"expected at {reached[name].nonzero().tolist()[:4]} …"
                )


@contextmanager
def replayable(seed: int) -> Iterator[None]:
    try:
        yield
    except BaseException as error:
        error.add_note(f"replay with GROUPCONV_SEED={seed} python -m pytest {__file__}")
        raise


def test_every_instruction_set_against_the_oracle(
    record_property: Callable[[str, object], None],
) -> None:
    end, checked = time.monotonic() + SECONDS, 0
    while checked < CASES and time.monotonic() < end:
        with replayable(FIRST_SEED + checked):
            check_case(FIRST_SEED + checked)
        checked += 1
    record_property(RANDOM_CASES, checked)


def draw_long_case(rng: random.Random) -> Case:
    """Enough work for several threads, with channels and maps that divide nothing."""
    while True:
        partition = draw_partition(rng, 60)
        geometry = draw_geometry(rng, 40)
        size = window_of(geometry).output_size(*geometry.input_size, *geometry.kernel_size)
        batch = rng.randint(1, 6)
        work = partition.entries * geometry.kernel_size[0] * geometry.kernel_size[1]
        if 2**17 <= work * size[0] * size[1] * batch < 2**23:
            break
    dtype, layout = rng.choice(DTYPES), rng.choice(("NCHW", "channels_last"))

    def image(channels: int, size: tuple[int, int]) -> torch.Tensor:
        return LAYOUTS[layout](torch.randn(batch, channels, *size, dtype=dtype))

    return Case(
        partition,
        geometry,
        image(partition.in_channels, geometry.input_size),
        torch.randn(partition.entries, *geometry.kernel_size, dtype=dtype),
        None,
        None,
        image(partition.out_channels, size),
        rng.choice(ACTIVATIONS),
        (layout, layout),
        draw_prologue(rng, partition.in_channels, dtype),
    )


def long_cases(count: int) -> Iterator[tuple[int, str, Case]]:
    for seed in range(FIRST_SEED, FIRST_SEED + count):
        rng = random.Random(seed)
        torch.manual_seed(seed)
        yield seed, rng.choice(ISAS), draw_long_case(rng)


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def bits(case: Case) -> list[torch.Tensor]:
    return list(case.run(case.x, case.grad).values())


def same(left: list[torch.Tensor], right: list[torch.Tensor]) -> bool:
    return all(torch.equal(one, other) for one, other in zip(left, right, strict=True))


def test_the_same_bits_on_any_number_of_threads() -> None:
    for seed, isa, case in long_cases(60):
        with replayable(seed), forced_isa(isa):
            with threads(1):
                alone = bits(case)
            for count in (2, 3, 8):
                with threads(count):
                    assert same(bits(case), alone), f"{count} threads, {isa}"


def test_the_same_bits_from_several_python_threads() -> None:
    cases = list(long_cases(12))
    expected = [bits(case) for _, _, case in cases]
    wrong: list[int] = []

    def work(turn: int) -> None:
        for k in range(len(cases)):
            at = (k + turn) % len(cases)  # every thread somewhere else
            if not same(bits(cases[at][2]), expected[at]):
                wrong.append(cases[at][0])

    workers = [threading.Thread(target=work, args=(3 * turn,)) for turn in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong, f"replay with GROUPCONV_SEED={wrong[0]}"


def digest(results: list[torch.Tensor]) -> str:
    found = hashlib.sha256()
    for result in results:
        found.update(repr(result.flatten().tolist()).encode())
    return found.hexdigest()


def _compute_in_child(cases: list[Case], send: Callable[[list[str]], None]) -> None:
    torch.set_num_threads(1)  # as a DataLoader does; torch's own operations would wait forever
    send([digest(bits(case)) for case in cases])


def test_the_same_bits_in_forked_workers() -> None:
    """As a DataLoader has them: forked after the parent's threads have run, several at once."""
    cases = [case for _, _, case in long_cases(12)]
    expected = [digest(bits(case)) for case in cases]
    context = multiprocessing.get_context("fork")
    pipes = [context.Pipe(duplex=False) for _ in range(3)]
    children = [
        context.Process(target=_compute_in_child, args=(cases, send.send)) for _, send in pipes
    ]
    try:
        for child in children:
            child.start()
        for receive, _ in pipes:
            assert receive.poll(30), "a forked worker does not answer"
            for n, (actual, wanted) in enumerate(zip(receive.recv(), expected, strict=True)):
                with replayable(FIRST_SEED + n):
                    assert actual == wanted
    finally:
        for child in children:
            child.join(5)
            child.kill()
