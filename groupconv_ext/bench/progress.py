"""A progress bar for a terminal, on stderr, so that stdout can be piped."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from time import monotonic
from typing import TextIO, TypeVar

T = TypeVar("T")

_BAR_WIDTH = 24


def progress(
    items: Sequence[T],
    describe: Callable[[T], str],
    *,
    enabled: bool = True,
    stream: TextIO | None = None,
    clock: Callable[[], float] = monotonic,
) -> Iterator[T]:
    """Yield ``items``, drawing how far it has come and how long the rest may take.

    Nothing is drawn when ``enabled`` is false or the stream is not a terminal.
    """
    stream = sys.stderr if stream is None else stream
    if not (enabled and stream.isatty()):
        yield from items
        return
    start = clock()
    try:
        for done, item in enumerate(items):
            left = (clock() - start) / done * (len(items) - done) if done else None
            _draw(stream, done, len(items), left, describe(item))
            yield item
    finally:
        stream.write("\r\x1b[K")
        stream.flush()


def _draw(stream: TextIO, done: int, total: int, left: float | None, text: str) -> None:
    filled = _BAR_WIDTH * done // total
    bar = "█" * filled + "░" * (_BAR_WIDTH - filled)
    remaining = "" if left is None else f" {_minutes(left)} left"
    line = f"{bar} {done}/{total}{remaining}  {text}"
    columns = shutil.get_terminal_size().columns - 1
    stream.write(f"\r\x1b[K{line[:columns]}")
    stream.flush()


def _minutes(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02d}"
