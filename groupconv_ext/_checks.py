"""What users pass, checked: whole numbers, lists of them, and the rules of a Partition.

Everything here either returns plain integers or raises ``TypeError`` or ``ValueError`` with the
offending value, what was expected, and what to do, before anything is built from it.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence, Sized
from itertools import accumulate, chain
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import torch

Integers: TypeAlias = Sequence[int] | npt.NDArray[np.generic] | torch.Tensor
"""What stands for a list of integers: a list, tuple or range, an array, or a tensor."""

IndexArray: TypeAlias = npt.NDArray[np.int64]

LARGEST = 2**31 - 1
"""Channels and reads are stored as 32-bit integers in the tables that the kernels see."""


def count(name: str, value: int) -> int:
    """A number of channels or groups."""
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"{name} must be an int, got {value!r} of type {type(value).__name__}")
    if not 1 <= value <= LARGEST:
        raise ValueError(f"{name} is {value}; expected 1 ≤ {name} ≤ 2³¹ − 1")
    return int(value)


def integers(
    name: str, values: Integers, *, bools: bool = False, expected: str = "a whole number"
) -> IndexArray:
    """``values`` as int64; floats only where they are whole, booleans only where asked for."""
    if isinstance(values, (np.ndarray, torch.Tensor)):
        if values.ndim != 1:
            raise ValueError(f"{name} has shape {list(values.shape)}; expected one dimension")
        found: Sequence[object] = values.tolist()
    elif isinstance(values, Sequence) and not isinstance(values, (str, bytes)):
        found = values
    else:
        raise TypeError(
            f"{name} must be a list, tuple, range, array or tensor of integers, got {values!r} of "
            f"type {type(values).__name__}"
        )
    if not set(map(type, found)) <= ({int, bool} if bools else {int}):
        found = [_whole(f"{name}[{i}]", value, bools, expected) for i, value in enumerate(found)]
    try:
        return np.array(found, np.int64)
    except OverflowError:
        raise ValueError(f"{name} holds an integer beyond 64 bits; expected {expected}") from None


def _whole(name: str, value: object, bools: bool, expected: str) -> int:
    if isinstance(value, (float, np.floating)):
        if not math.isfinite(value) or value != int(value):
            raise ValueError(f"{name} is {value}; expected {expected}")
        return int(value)
    if isinstance(value, (bool, np.bool_)) and not bools:
        raise TypeError(f"{name} is {value}, a bool; expected an int")
    try:
        return operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise TypeError(
            f"{name} is {value!r} of type {type(value).__name__}; expected an int"
        ) from None


def groups(inputs: object, outputs: object) -> int:
    """The number of groups: of lists on either side."""
    lengths = []
    for name, lists in (("inputs", inputs), ("outputs", outputs)):
        if not isinstance(lists, (Sequence, np.ndarray, torch.Tensor)) or isinstance(lists, str):
            raise TypeError(f"{name} is {lists!r}; expected a list of channels for every group")
        lengths.append(len(lists))
    if lengths[0] != lengths[1]:
        raise ValueError(
            f"inputs has {lengths[0]} lists and outputs has {lengths[1]}; expected one of each for "
            "every group (an empty list is allowed)"
        )
    return count("groups", lengths[0])


def concatenate(name: str, lists: Sequence[Integers]) -> tuple[IndexArray, IndexArray]:
    """All lists one after another, and where each starts and the last one ends."""
    for i, group in enumerate(lists):
        if not isinstance(group, Sized):
            raise TypeError(f"{name}[{i}] is {group!r}; expected a list of channels")
    offsets = [0, *accumulate(map(len, lists))]
    # Before anything of that length is built.
    if offsets[-1] > LARGEST:
        raise ValueError(f"{name} lists {offsets[-1]} channels in total; expected at most 2³¹ − 1")
    if all(type(group) in (range, tuple, list) for group in lists):
        flat = list(chain.from_iterable(lists))
        if set(map(type, flat)) <= {int}:
            return integers(name, flat), np.array(offsets)
    parts = [integers(f"{name}[{i}]", group) for i, group in enumerate(lists)]
    return np.concatenate(parts), np.array(offsets)


def _entry_name(name: str, offsets: IndexArray, position: int) -> str:
    """``inputs[2][5]`` for a position in the concatenated lists."""
    group = int(np.searchsorted(offsets, position, side="right")) - 1
    return f"{name}[{group}][{position - int(offsets[group])}]"


def check_range(
    name: str, channels: IndexArray, offsets: IndexArray, limit_name: str, limit: int
) -> None:
    """Every listed channel exists."""
    wrong = np.flatnonzero((channels < 0) | (channels >= limit))
    if len(wrong):
        first = int(wrong[0])
        raise ValueError(
            f"{_entry_name(name, offsets, first)} is {channels[first]}; expected "
            f"0 ≤ channel < {limit_name} = {limit}"
        )


def check_no_repeats(reads: IndexArray, offsets: IndexArray, in_channels: int) -> None:
    """No group reads a channel twice: a packed weight has one entry for a connection."""
    group = np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))
    keys = np.sort(group * in_channels + reads)
    repeated = keys[1:][keys[1:] == keys[:-1]]
    if len(repeated):
        owner, channel = divmod(int(repeated[0]), in_channels)
        raise ValueError(
            f"inputs[{owner}] reads channel {channel} twice; expected each channel at most once in "
            "a group (only different groups may share one)"
        )


def check_cover(writes: IndexArray, out_channels: int) -> None:
    """Every output channel is written by exactly one group."""
    ordered = np.sort(writes)
    repeated = ordered[1:][ordered[1:] == ordered[:-1]]
    if len(repeated):
        raise ValueError(
            f"outputs writes channel {repeated[0]} twice; expected every output channel in exactly "
            "one group"
        )
    if len(ordered) < out_channels:
        gaps = np.flatnonzero(ordered != np.arange(len(ordered)))
        missing = int(gaps[0]) if len(gaps) else len(ordered)
        raise ValueError(
            f"outputs never writes channel {missing}; expected all of 0 … {out_channels - 1} (a "
            "channel that only gets its bias belongs to a group without inputs)"
        )


def even_sizes(in_channels: int, out_channels: int, groups: int) -> tuple[int, int]:
    """Inputs and outputs of each of ``groups`` equal groups."""
    in_channels = count("in_channels", in_channels)
    out_channels = count("out_channels", out_channels)
    groups = count("groups", groups)
    for name, channels in (("in_channels", in_channels), ("out_channels", out_channels)):
        if channels % groups:
            raise ValueError(
                f"groups = {groups} does not divide {name} = {channels}; for uneven groups use "
                "from_labels, from_lists or random(uneven=True)"
            )
    return in_channels // groups, out_channels // groups


def labels(name: str, values: Integers, groups: int) -> IndexArray:
    """A group for every channel."""
    found = integers(name, values)
    wrong = np.flatnonzero((found < 0) | (found >= groups))
    if len(wrong):
        first = int(wrong[0])
        raise ValueError(
            f"{name}[{first}] is {found[first]}; expected 0 ≤ label < groups = {groups}"
        )
    return found


def gates(values: Integers, radices: tuple[int, ...]) -> list[int]:
    """0 or 1 for every factor of the channels."""
    expected = "0 or 1 (a learned, real gate g stands for g >= 0)"
    found: list[int] = integers("gates", values, bools=True, expected=expected).tolist()
    if len(found) != len(radices):
        raise ValueError(
            f"gates has length {len(found)}; expected {len(radices)}, one for each of the prime "
            f"factors {radices} of gcd(in_channels, out_channels)"
        )
    for i, gate in enumerate(found):
        if gate not in (0, 1):
            raise ValueError(f"gates[{i}] is {gate}; expected {expected}")
    return found


def permutation(name: str, values: Integers, channels: int) -> IndexArray:
    """Every one of 0 … channels − 1 exactly once."""
    order = integers(name, values)
    if not np.array_equal(np.sort(order), np.arange(channels)):
        raise ValueError(
            f"{name} has {len(order)} entries and is not a permutation; expected each of "
            f"0 … {channels - 1} exactly once"
        )
    return order


def table(values: Integers) -> tuple[int, int, IndexArray, IndexArray, IndexArray, IndexArray]:
    """The parts of a table: channels in and out, and on both sides the lists and their offsets."""
    flat = integers("table", values)
    header = flat[:4].tolist()
    if (
        len(header) < 4
        or min(header[:3]) < 1
        or header[3] < 0
        or len(flat) != _table_length(header)
    ):
        raise ValueError(
            f"table has {len(flat)} entries, beginning with {header}; expected what "
            "Partition.table() returns"
        )
    in_channels, out_channels, groups, reads = header
    read_offsets, write_offsets, ins, outs = np.split(
        flat[4:], np.cumsum([groups + 1, groups + 1, reads])
    )
    for offsets, total in ((read_offsets, reads), (write_offsets, out_channels)):
        if offsets[0] != 0 or offsets[-1] != total or np.any(np.diff(offsets) < 0):
            raise ValueError(
                f"table has offsets {offsets.tolist()}; expected them to rise from 0 to {total}"
            )
    return in_channels, out_channels, ins, read_offsets, outs, write_offsets


def _table_length(header: Sequence[int]) -> int:
    _, out_channels, groups, reads = header
    return 4 + 2 * (groups + 1) + reads + out_channels
