"""What a kernel may be launched with: block shapes, warps and pipeline stages, pruned by shape.

A block is no larger than the problem can fill, rounded up to the matrix units' granularity of 16,
and its operands fit the shared memory of the smallest device that is served (sm_86: 99 KiB; sm_80
has 163, sm_90 227). The first candidate is the one that is taken where nothing may be measured.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

from ..remembered import Entry, Remembered

__all__ = ["Launch", "Shape", "Tuned", "candidates"]

_GRANULARITY = 16
_SHARED_MEMORY = 96 << 10
_REGISTERS_OF_A_THREAD = 128  # float32 sums, a lane's share of the tile


class Launch(NamedTuple):
    """Rows × pixels × depth of a block, and what runs it."""

    rows: int
    pixels: int
    depth: int
    warps: int
    stages: int


class Shape(NamedTuple):
    """What decides about a launch."""

    rows: int  # of the largest group
    columns: int  # of the largest group
    pixels: int
    total_rows: int
    element_bytes: int
    single: bool  # no row has more than one column: no matrix units
    # What does not prune, but what a measurement depends on:
    taps: int = 1
    channels_last: bool = False
    gradient: bool = False  # of the weight
    transposed: bool = False
    stages: int = 0  # of a chain, whose rows and columns are those of its largest group


@cache
def candidates(shape: Shape) -> tuple[Launch, ...]:
    """Every launch worth trying, the likeliest first."""
    if shape.single:
        return _single(shape)
    if shape.gradient:
        return _of_gradients(shape)
    if shape.stages:
        return _of_chains(shape)
    return tuple(
        launch
        for rows in _rows(shape)
        for pixels in _sizes(shape.pixels, (128, 64, 256))
        for depth in _sizes(_columns_of_a_tile(shape, rows), (32, 64))
        if _fits(launch := Launch(rows, pixels, depth, _warps(pixels * max(rows, depth)), 3), shape)
    )


def _of_gradients(shape: Shape) -> tuple[Launch, ...]:
    """For a weight gradient: ``pixels`` are the columns of a block there, ``depth`` its pixels."""
    depths = (32, 64) if shape.element_bytes > 2 else (64, 32)
    return tuple(
        launch
        for rows in _rows(shape)
        for columns in _sizes(_columns_of_a_tile(shape, rows), (64, 32, 128))
        for depth in _sizes(shape.pixels, depths)
        if _fits(
            launch := Launch(rows, columns, depth, _warps(columns * max(rows, depth)), 3), shape
        )
    )


def _of_chains(shape: Shape) -> tuple[Launch, ...]:
    """Few pixels, since a program takes them through all rows of all stages.

    One stage of loads: copies that run ahead of the loop would run ahead of what it reads.
    """
    return tuple(
        launch
        for pixels in _sizes(shape.pixels, (64, 32, 128))
        for rows in _rows(shape)
        for depth in _sizes(_columns_of_a_tile(shape, rows), (32, 64))
        if _fits(launch := Launch(rows, pixels, depth, _warps(pixels * max(rows, depth)), 1), shape)
    )


def _rows(shape: Shape) -> tuple[int, ...]:
    """Rows of a tile: those of a group first, since rows of other groups multiply zeros."""
    own = min(64, _rounded(shape.rows))
    most = _rounded(shape.total_rows)
    return tuple(rows for rows in (own, 2 * own) if rows <= most)


def _sizes(extent: int, wanted: tuple[int, ...]) -> tuple[int, ...]:
    """Those of the wanted sizes that ``extent`` can fill, or the one that just holds it."""
    return tuple(size for size in wanted if size <= _rounded(extent)) or (_rounded(extent),)


def _warps(elements: int) -> int:
    """So many that a thread has registers for its part of the larger tile and its addresses."""
    return 4 if elements <= 2048 else 8


def _single(shape: Shape) -> tuple[Launch, ...]:
    found = [
        Launch(rows, pixels, 1, 4, 2)
        for rows, pixels in ((32, 64), (64, 32), (16, 128), (8, 256), (128, 16))
        if rows <= _rounded(shape.total_rows, 8) and pixels <= _rounded(shape.pixels)
    ]
    return tuple(found) or (Launch(8, 16, 1, 4, 2),)


def _columns_of_a_tile(shape: Shape, rows: int) -> int:
    """Columns under a tile: of one group, or of as many groups as share it."""
    return shape.columns * max(1, rows // max(shape.rows, 1))


def _fits(launch: Launch, shape: Shape) -> bool:
    operands = (launch.rows + launch.pixels) * launch.depth * shape.element_bytes * launch.stages
    sums = launch.rows * launch.pixels // (32 * launch.warps)
    return operands <= _SHARED_MEMORY and sums <= _REGISTERS_OF_A_THREAD


def _rounded(size: int, granularity: int = _GRANULARITY) -> int:
    """The power of two, at least ``granularity``, that holds ``size``."""
    return max(granularity, 1 << max(size - 1, 0).bit_length())


class Tuned:
    """Launches that were measured to be better than the first candidate, by shape.

    Nothing is measured unless :meth:`tune` is called; what it finds is kept in ``store``.
    """

    def __init__(self, store: Callable[[], Remembered], prefix: Callable[[], str]) -> None:
        self._store, self._prefix = store, prefix
        self._known: dict[Shape, Launch] = {}
        self._asked: list[Shape] | None = None

    def launch(self, shape: Shape) -> Launch:
        """The best launch that is known for a shape."""
        if self._asked is not None:
            self._asked.append(shape)
        known = self._known.get(shape)
        if known is None:
            known = self._known[shape] = self._remembered(shape) or candidates(shape)[0]
        return known

    def _remembered(self, shape: Shape) -> Launch | None:
        prefix = self._prefix()
        entry = self._store().get(f"{prefix}; {shape}") if prefix else None
        if entry is None:
            return None
        by_name = {str(tuple(launch)): launch for launch in candidates(shape)}
        return by_name.get(entry.chosen)  # None: written by another version of this file

    def tune(
        self, call: Callable[[], object], milliseconds: Callable[[Callable[[], object]], float]
    ) -> dict[Shape, Launch]:
        """Measure every candidate of every kernel that ``call`` launches, one kernel at a time."""
        self._asked = []
        try:
            call()
            shapes = tuple(dict.fromkeys(self._asked))
        finally:
            self._asked = None
        found = {}
        for shape in shapes:
            times: dict[str, float] = {}
            best, least = self.launch(shape), float("inf")
            for candidate in candidates(shape):
                self._known[shape] = candidate
                time = milliseconds(call)
                times[str(tuple(candidate))] = 1e3 * time
                if time < least:
                    best, least = candidate, time
            found[shape] = self._known[shape] = best
            if prefix := self._prefix():
                self._store().add(f"{prefix}; {shape}", Entry(str(tuple(best)), times))
        return found
