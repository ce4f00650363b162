"""Every network by its name.

>>> import groupconv_ext as gc
>>> network = gc.models.create("flgc_resnet50", groups=8)

A network's file registers a function that builds it, once for every name under which the papers
know it; the options of the function are the options of the name.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from .names import check_known

__all__ = ["Entry", "create", "entry", "list_models", "register"]


@dataclass(frozen=True)
class Entry:
    """A network that can be built by its name.

    Attributes:
        name: The name.
        summary: What it is, in a line.
        build: Builds it.
        preset: What the name stands for among the options of ``build``; may be overridden.
        input_size: Channels, height and width of the images it was made for.
    """

    name: str
    summary: str
    build: Callable[..., nn.Module]
    input_size: tuple[int, int, int]
    preset: dict[str, Any] = field(default_factory=dict)

    def options(self) -> dict[str, Any]:
        """The options and what they are if nobody says otherwise."""
        defaults = {
            name: parameter.default
            for name, parameter in inspect.signature(self.build).parameters.items()
        }
        return defaults | self.preset


_ENTRIES: dict[str, Entry] = {}

Builder = Callable[..., nn.Module]


def register(
    name: str, summary: str, size: int = 224, **preset: Any
) -> Callable[[Builder], Builder]:
    """Let a function that builds a network be found under ``name``."""

    def add(build: Builder) -> Builder:
        _ENTRIES[name] = Entry(name, summary, build, (3, size, size), preset)
        return build

    return add


def entry(name: str) -> Entry:
    """What is registered under ``name``.

    Raises:
        ValueError: Nothing is; the nearest name is told.
    """
    check_known("model", name, _ENTRIES, "; groupconv_ext.models.list() has all of them")
    return _ENTRIES[name]


def create(
    name: str,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    **options: Any,
) -> nn.Module:
    """Build a network.

    Args:
        name: One of :func:`list`.
        device: Where its parameters are made; ``"meta"`` for none at all, only their shapes.
        dtype: Of its parameters.
        options: Of this network, see :meth:`Entry.options`; ``classes`` is one of all networks.

    Raises:
        ValueError: There is no such network or option, or a value does not fit.
        TypeError: A value is of another kind.
    """
    found = entry(name)
    for option in options:
        check_known(f"option of {name!r}", option, found.options())
    with nullcontext() if device is None else torch.device(device):
        try:
            network = found.build(**(found.preset | options))
        except (ValueError, TypeError) as error:
            said = f" with {options}" if options else ""
            raise type(error)(f"model {name!r}{said}: {error}") from error
    return network if dtype is None else network.to(dtype)


def list_models() -> dict[str, str]:
    """Every name, and a line on what it is."""
    return {name: found.summary for name, found in sorted(_ENTRIES.items())}
