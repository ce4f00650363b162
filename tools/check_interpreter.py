"""What an interpreter lacks to build the package, for `make VENV=none`, which installs nothing."""

from __future__ import annotations

import contextlib
import importlib
import shutil
import sys
from importlib import metadata


def release(package: str) -> tuple[int, ...] | None:
    """Major and minor version of an installed package."""
    try:
        return tuple(map(int, metadata.version(package).split(".")[:2]))
    except metadata.PackageNotFoundError:
        return None


def can_build_wheels() -> bool:
    """Since 70.1 setuptools does by itself; before, an older `wheel` package taught it."""
    for module in ("setuptools.command.bdist_wheel", "wheel.bdist_wheel"):
        with contextlib.suppress(ImportError):
            importlib.import_module(module)
            return True
    return False


def missing() -> list[str]:
    """One line for each thing that has to be installed first."""
    lacks = []
    if sys.version_info < (3, 11):  # noqa: UP036 (the interpreter may be any)
        lacks.append("Python 3.11 or later")
    torch = release("torch")
    if torch is None or torch < (2, 11):
        lacks.append("torch 2.11 or later")
    if release("numpy") is None:
        lacks.append("numpy")
    if not can_build_wheels():
        lacks.append("setuptools 70.1 or later")
    if release("cmake") is None and shutil.which("cmake") is None:
        lacks.append("cmake 3.25 or later")
    return lacks


if __name__ == "__main__":
    if lacks := missing():
        sys.exit(f"{sys.executable} lacks: {'; '.join(lacks)}")
