"""The suites: which layers are timed, under which partitions, batches, layouts and directions.

``quick`` and ``full`` are layers of published networks. ``grid`` is not: one width, every map size
and every number of channels in a group, for a picture of where which kernel is how good. ``random``
is what nobody tuned for: odd channel counts, odd maps, ragged splits, drawn once and for all.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import product

from .problems import (
    CONDENSENET,
    IGC,
    LAYERS,
    MOBILENETV2,
    PROMISED,
    SHUFFLENET,
    Direction,
    Dtype,
    Kind,
    Layout,
    Problem,
    depthwise,
    pointwise,
    spatial,
)

LAYOUTS: tuple[Layout, Layout] = ("NCHW", "NHWC")


def kinds(layer: Problem) -> tuple[Kind, ...]:
    """The partitions a layer is timed under: its network's own, contiguous, permuted and ragged.

    A depthwise layer has no ragged split. Overlapping lists are timed as they are.
    """
    if layer.kind == "overlapping":
        return ("overlapping",)
    ragged: tuple[Kind, ...] = () if layer.is_depthwise else ("ragged",)
    return tuple(dict.fromkeys((layer.kind, "contiguous", "permuted", *ragged)))


def _vary(
    layers: Iterable[Problem],
    *,
    kind: Kind | None = None,
    batch: int = 1,
    layouts: Sequence[Layout] = ("NCHW",),
    direction: Direction = "forward",
) -> Iterator[Problem]:
    for layer, layout in product(layers, layouts):
        yield replace(
            layer, kind=kind or layer.kind, batch=batch, layout=layout, direction=direction
        )


def _quick() -> Iterator[Problem]:
    """The promised rows, permuted, and a taste of everything else."""
    promised = [layer for layer in PROMISED if layer.kernel == 1]
    g8_56, g8_28, g8_14, g8_7 = (promised[i] for i in (1, 3, 4, 5))
    resnext = spatial("resnext50", 256, 28, 8)
    yield from _vary(PROMISED, kind="permuted")
    yield from _vary(promised, layouts=["NHWC"])
    yield from _vary([resnext, depthwise("resnet50-flgc", 256, 28)], layouts=["NHWC"])
    yield from _vary([g8_56, g8_14, resnext], kind="ragged")
    yield from _vary([g8_28], kind="ragged", layouts=["NHWC"])
    yield from (SHUFFLENET[2], CONDENSENET[1], MOBILENETV2[4], MOBILENETV2[6], *IGC[2:4])
    yield from _vary([g8_14, PROMISED[8]], kind="permuted", batch=16)
    trained = pointwise("resnet50-flgc", (256, 256), 28, 8, "permuted")
    training: Direction = "forward+backward"
    yield from _vary([trained], batch=16, layouts=["NCHW", "NHWC"], direction=training)
    yield from _vary([g8_14, g8_7], batch=16, direction=training)
    yield from _vary([g8_14], kind="ragged", batch=16, direction=training)
    yield from _vary(
        [spatial("resnext50", 512, 14, 32)], kind="permuted", batch=16, direction=training
    )
    yield from _vary([CONDENSENET[2], MOBILENETV2[4]], batch=16, direction=training)


def _full() -> Iterator[Problem]:
    """Every layer under every partition that suits it, in both layouts."""
    for layer in LAYERS:
        for kind in kinds(layer):
            for batch, direction in _BATCHES:
                yield from _vary(
                    [layer], kind=kind, batch=batch, layouts=LAYOUTS, direction=direction
                )
    for problem in _vary(PROMISED, kind="permuted", layouts=LAYOUTS):
        yield replace(problem, dtype="bfloat16")


GRID_CHANNELS = 256
GRID_NETWORK = "grid"


def _grid() -> Iterator[Problem]:
    """Every map size and number of channels in a group, 1×1 and 3×3, permuted."""
    for kernel, size, per_group in product((1, 3), (7, 14, 28, 56), (1, 2, 4, 8, 16, 32, 64)):
        groups = GRID_CHANNELS // per_group
        layer = Problem(
            GRID_NETWORK,
            *(GRID_CHANNELS,) * 2,
            size,
            size,
            kernel,
            1,
            kernel // 2,
            groups,
            "permuted",
        )
        yield from _vary([layer], layouts=LAYOUTS)


def _random() -> Iterator[Problem]:
    """Layers like no network's: channels off every vector width, any map, ragged or permuted."""
    draw = random.Random(20261121)
    drawn = 0
    while drawn < 40:
        groups = draw.choice([1, 2, 3, 4, 5, 6, 7, 8, 12, 16, 20, 32, 64])
        sizes = [round(2 ** draw.uniform(0, 8)), round(2 ** draw.uniform(0, 8))]
        in_channels, out_channels = (groups * size for size in sizes)
        kernel = draw.choice([1, 1, 3, 3, 5])
        size = round(2 ** draw.uniform(2.4, 6.8))
        problem = Problem(
            "random",
            in_channels,
            out_channels,
            size,
            draw.choice([size, size, max(5, size - draw.randint(0, 4))]),
            kernel,
            draw.choice([1, 1, 1, 2]),
            kernel // 2,
            groups,
            draw.choice(["permuted", "permuted", "ragged"]) if min(sizes) > 2 else "permuted",
            layout=draw.choice(LAYOUTS),
        )
        in_range = all(12 <= channels <= 2048 for channels in (in_channels, out_channels))
        if not in_range or not 1_000_000 <= problem.multiply_adds <= 400_000_000:
            continue
        drawn += 1
        yield problem
        yield replace(problem, batch=4, direction="forward+backward")


_BATCHES: tuple[tuple[int, Direction], ...] = (
    (1, "forward"),
    (16, "forward"),
    (16, "forward+backward"),
)

SUITES: Mapping[str, tuple[Problem, ...]] = {
    "quick": tuple(dict.fromkeys(_quick())),
    "full": tuple(dict.fromkeys(_full())),
    "grid": tuple(_grid()),
    "random": tuple(_random()),
}


def select(
    problems: Iterable[Problem],
    *,
    words: Sequence[str] = (),
    direction: Direction | None = None,
    layout: Layout | None = None,
    dtype: Dtype | None = None,
) -> tuple[Problem, ...]:
    """The problems whose names hold all the ``words``, in any case, and which match the rest.

    Of a ``dtype`` there are all problems once, whatever they were written in.
    """
    if dtype is not None:
        problems = dict.fromkeys(replace(problem, dtype=dtype) for problem in problems)
    return tuple(
        problem
        for problem in problems
        if all(word.lower() in problem.name.lower() for word in words)
        and direction in (None, problem.direction)
        and layout in (None, problem.layout)
    )
