"""What was measured once, kept on disk: a small JSON file that people can read, and may delete.

    {
     "format": "groupconv-choices-1",
     "entries": {
      "<what was asked>": {"chosen": "triton", "microseconds": {"triton": 41.2, "aten": 120.5}}
     }
    }

What was asked names the device and the versions of everything that could change the answer, so that
an entry is never wrong, at worst unused. Entries are only ever added. A writer takes a lock, reads
what others have added since, and renames a whole new file into place, so readers need no lock and
never see half a file. A file that is not such a file is left alone, with a warning.

It lies in ``$GROUPCONV_CACHE``, else in ``groupconv_ext`` below ``$XDG_CACHE_HOME`` or
``~/.cache``.
"""

from __future__ import annotations

import fcntl
import json
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import torch

__all__ = ["FORMAT", "Entry", "Remembered", "default_path", "remembered", "versions"]

FORMAT = "groupconv-choices-1"


class Entry(NamedTuple):
    """An answer, and the times it rests on."""

    chosen: str
    microseconds: Mapping[str, float]


def default_path() -> Path:
    """Where choices are kept on this machine."""
    if folder := os.environ.get("GROUPCONV_CACHE"):
        return Path(folder) / "choices.json"
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "groupconv_ext" / "choices.json"


class Remembered:
    """The entries of one file; read once, written through."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._entries: dict[str, Entry] | None = None
        self._usable = True

    def get(self, asked: str) -> Entry | None:
        """The entry for a question, if there is one."""
        if self._entries is None:
            self._entries = self._read()
        return self._entries.get(asked)

    def add(self, asked: str, entry: Entry) -> None:
        """Remember an answer, here and on disk where that can be written."""
        if self._entries is None:
            self._entries = self._read()
        self._entries[asked] = entry
        if not self._usable:
            return
        try:
            with self._locked():
                self._entries = self._read() | self._entries
                if self._usable:
                    self._write(self._entries)
        except OSError as error:
            self._usable = False
            _warn(f"cannot keep measured choices in {self.path}: {error}; they last for this run")

    def _read(self) -> dict[str, Entry]:
        try:
            text = self.path.read_text(encoding="utf-8")
        except FileNotFoundError:
            return {}
        except (OSError, UnicodeDecodeError) as error:
            return self._ignore(str(error))
        try:
            return _parse(json.loads(text))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            return self._ignore(f"{type(error).__name__}: {error}")

    def _ignore(self, reason: str) -> dict[str, Entry]:
        self._usable = False
        _warn(
            f"{self.path} is not a file of measured choices ({reason}); it is ignored and left as "
            "it is. Delete it to have choices remembered again"
        )
        return {}

    def _write(self, entries: Mapping[str, Entry]) -> None:
        data = {"format": FORMAT, "entries": {k: v._asdict() for k, v in sorted(entries.items())}}
        partial = self.path.with_name(f".{self.path.name}.{os.getpid()}")
        try:
            partial.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
            partial.replace(self.path)
        finally:
            partial.unlink(missing_ok=True)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """One writer at a time, in any process."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield


@cache
def remembered() -> Remembered:
    """The file of this machine, opened once."""
    return Remembered(default_path())


@cache
def versions() -> str:
    """Of everything that a measurement depends on."""
    found = [f"torch {torch.__version__}"]
    for package in ("groupconv-ext", "triton", "nvidia-cudnn-cu13", "nvidia-cudnn-cu12"):
        try:
            found.append(f"{package} {metadata.version(package)}")
        except metadata.PackageNotFoundError:
            continue
    return ", ".join(found)


def _parse(data: Any) -> dict[str, Entry]:
    if data["format"] != FORMAT:
        raise ValueError(f"format is {data['format']!r}, expected {FORMAT!r}")
    entries = {}
    for asked, entry in data["entries"].items():
        chosen = entry["chosen"]
        if not isinstance(chosen, str):
            raise TypeError(f"chosen is {chosen!r}, expected a string")
        times = {str(name): float(time) for name, time in entry["microseconds"].items()}
        entries[asked] = Entry(chosen, times)
    return entries


def _warn(message: str) -> None:
    warnings.warn(message, RuntimeWarning, stacklevel=2)
