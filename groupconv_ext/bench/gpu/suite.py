"""The layers that are timed on a GPU: batch 256, the most telling first.

Nearly all of them are bound by memory. They come permuted, in both layouts, forward and with a
backward pass; the 1×1 ones ragged as well; a few contiguous, where the vendor is at its best; a few
in float32.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

from ..problems import CONDENSENET, Direction, Dtype, Kind, Layout, Problem, pointwise, spatial
from ..problems import depthwise as depthwise_layer

__all__ = ["DRY", "SUITE"]

_POINTWISE = (
    pointwise("resnet50-flgc", (256, 256), 56, 8, "permuted"),
    pointwise("resnet50-flgc", (512, 512), 28, 4, "permuted"),
    pointwise("resnet50-flgc", (1024, 1024), 14, 8, "permuted"),
    pointwise("resnet50-flgc", (256, 256), 56, 2, "permuted"),
    pointwise("resnet50-flgc", (1024, 1024), 14, 2, "permuted"),
    pointwise("resnet50-flgc", (1024, 1024), 7, 16, "permuted"),
)
_SPATIAL = (
    spatial("resnext50", 256, 28, 32),
    spatial("resnext50", 128, 56, 32),
    spatial("resnext50", 512, 14, 32),
    spatial("resnext50", 512, 14, 8),
)
_DEPTHWISE = (depthwise_layer("resnet50-flgc", 256, 28),)
_LAYERS = (*_POINTWISE, *_SPATIAL, *_DEPTHWISE)
_BOTH: tuple[Layout, Layout] = ("NHWC", "NCHW")
_BATCH = 256


def _vary(
    layers: Iterable[Problem],
    direction: Direction,
    *,
    kind: Kind = "permuted",
    layouts: Sequence[Layout] = _BOTH,
    dtype: Dtype = "bfloat16",
    batch: int = _BATCH,
) -> Iterator[Problem]:
    for layout in layouts:
        for layer in layers:
            yield replace(
                layer, kind=kind, batch=batch, layout=layout, dtype=dtype, direction=direction
            )


def _suite() -> Iterator[Problem]:
    training: Direction = "forward+backward"
    yield from _vary(_LAYERS, "forward")
    yield from _vary(_LAYERS, training)
    yield from _vary(_POINTWISE[:3], "forward", kind="ragged")
    yield from _vary(_POINTWISE[:3], training, kind="ragged")
    yield from _vary((*_POINTWISE[:2], *_SPATIAL, *_DEPTHWISE), "forward", kind="contiguous")
    yield from _vary((*_SPATIAL, *_DEPTHWISE), training, kind="contiguous", layouts=["NHWC"])
    yield from _vary(CONDENSENET[:2], "forward", kind="overlapping")
    yield from _vary(CONDENSENET[:2], training, kind="overlapping")
    yield from _vary((_POINTWISE[0], _SPATIAL[0]), "forward", dtype="float32")
    yield from _vary((_POINTWISE[0], _SPATIAL[0]), training, dtype="float32")
    yield from _vary((_POINTWISE[0], _SPATIAL[0]), "forward", dtype="float16")


SUITE: tuple[Problem, ...] = tuple(_suite())

DRY: tuple[Problem, ...] = (
    replace(pointwise("dry-run", (16, 16), 4, 2, "permuted"), layout="NHWC"),
    replace(pointwise("dry-run", (16, 16), 4, 2, "ragged"), direction="forward+backward"),
    replace(spatial("dry-run", 8, 4, 2), kind="permuted", direction="forward+backward"),
)
"""Layers of a moment, for a run that shows that everything works."""
