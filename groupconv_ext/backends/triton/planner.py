"""The work list of the Triton kernels: which rows of which groups a program computes.

A convolution and its input gradient are the same sum over connections, seen from either side::

                  a row is                 it sums over
    forward       an output of a group     the inputs of its group
    input grad    an input of a group      the outputs of its group

The rows of all groups stand in one list, group after group, and so do the columns they sum over. A
**tile** is a run of at most ``block`` rows, and the run of columns that any of them needs. Groups
that fit a tile together share one: their block of weights is then block diagonal, which costs no
more multiply-adds than a tile for each (its rows would be padded to ``block``) and reads and
writes whole runs of channels. A group of more rows is cut into pieces of nearly the same size.

Everything here is plain numpy on the host, made once for a partition and a block.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from ...partition import Partition

__all__ = [
    "TILE_FIELDS",
    "Tile",
    "chain_table",
    "places",
    "read_channels",
    "readers",
    "row_weights",
    "shares_tiles",
    "tile_rows",
    "tiles",
    "write_channels",
]

TILE_FIELDS = 4
"""First row, number of rows, first column, number of columns; all positions in the lists."""

Pairs: TypeAlias = Sequence[tuple[int, int]]
Table: TypeAlias = npt.NDArray[np.signedinteger]


class Tile(NamedTuple):
    """A run of rows and the run of columns that they sum over."""

    row: int
    rows: int
    column: int
    columns: int


def tiles(sizes: Pairs, block: int) -> list[Tile]:
    """Cut groups of ``(rows, columns)`` into tiles of at most ``block`` rows, in order."""
    found: list[Tile] = []
    row = column = 0
    shared: Tile | None = None  # of whole groups, with room left
    for rows_of_group, columns_of_group in sizes:
        if shared is not None and (rows_of_group == 0 or shared.rows + rows_of_group > block):
            found.append(shared)
            shared = None
        if rows_of_group > block:
            found += _pieces(row, rows_of_group, column, columns_of_group, block)
        elif rows_of_group > 0:
            first = shared or Tile(row, 0, column, 0)
            shared = Tile(
                first.row,
                first.rows + rows_of_group,
                first.column,
                first.columns + columns_of_group,
            )
        row += rows_of_group
        column += columns_of_group
    return found if shared is None else [*found, shared]


def _pieces(row: int, rows_of_group: int, column: int, columns: int, block: int) -> list[Tile]:
    """A large group in pieces whose sizes differ by one at most."""
    count = -(-rows_of_group // block)
    cuts = [row + rows_of_group * i // count for i in range(count + 1)]
    return [Tile(cuts[i], cuts[i + 1] - cuts[i], column, columns) for i in range(count)]


def tile_rows(partition: Partition, block: int, transposed: int) -> Table:
    """:func:`tiles` of a partition as the kernels read them, int32 ``[tiles, 4]``."""
    sizes = partition.sizes
    if transposed:
        sizes = tuple((ins, outs) for outs, ins in sizes)
    return np.array(tiles(sizes, block), np.int32).reshape(-1, TILE_FIELDS)


def shares_tiles(partition: Partition, block: int, transposed: int) -> bool:
    """Whether any tile holds rows of several groups, whose columns have to be told apart."""
    name = f"_shares_tiles_{block}_{transposed}"
    known: bool | None = vars(partition).get(name)
    if known is None:
        sizes = partition.sizes
        if transposed:
            sizes = tuple((ins, outs) for outs, ins in sizes)
        pieces = sum(-(-count // block) for count, _ in sizes)
        known = vars(partition)[name] = len(tiles(sizes, block)) < pieces
    return known


# A constant to torch.compile, like the partition.
shares_tiles._dynamo_marked_constant = True  # type: ignore[attr-defined]


def row_weights(partition: Partition, transposed: int) -> Table:
    """For every row where its columns begin, how many they are, and its weights: int64 ``[R, 4]``.

    The weight that connects a row to the column at position j of the list is entry
    ``base + (j - first) * step`` of the packed weight, for ``first <= j < first + count``. A row of
    ``[first, count, base, step]``.
    """
    found = []
    first_in = first_out = entry = 0
    for outs, ins in partition.sizes:
        if transposed:
            steps = np.arange(ins)
            fields = (first_out, outs, entry + steps, ins)
        else:
            steps = np.arange(outs)
            fields = (first_in, ins, entry + steps * ins, 1)
        found.append(np.stack([np.broadcast_to(field, steps.shape) for field in fields], 1))
        first_in, first_out, entry = first_in + ins, first_out + outs, entry + outs * ins
    return np.concatenate(found).astype(np.int64)


def chain_table(partition: Partition, block: int, transposed: int) -> Table:
    """A stage of a chain in one list of int64, for the tables of stages to follow each other.

    Its own length, and how many tiles, rows, columns and entries there are; then
    :func:`tile_rows`, :func:`row_weights`, and the channels of the rows and of the columns.
    """
    tiles_of_stage = tile_rows(partition, block, transposed)
    rows = row_weights(partition, transposed)
    reads, writes = read_channels(partition), write_channels(partition)
    channels = (reads, writes) if transposed else (writes, reads)
    lists = (tiles_of_stage.ravel(), rows.ravel(), *channels)
    counts = (len(tiles_of_stage), *map(len, channels), partition.entries)
    header = (1 + len(counts) + sum(map(len, lists)), *counts)
    return np.concatenate([np.array(header), *lists]).astype(np.int64)


def readers(partition: Partition) -> Table:
    """For every input channel the places where groups read it, then −1: ``[C, most]``."""
    places: list[list[int]] = [[] for _ in range(partition.in_channels)]
    position = 0
    for group in partition.inputs:
        for channel in group:
            places[channel].append(position)
            position += 1
    most = max(1, *map(len, places))
    table = np.full((partition.in_channels, most), -1, np.int32)
    for channel, found in enumerate(places):
        table[channel, : len(found)] = found
    return table


def read_channels(partition: Partition) -> Table:
    """The input channel at every place where a group reads."""
    return np.array([c for group in partition.inputs for c in group], np.int32)


def write_channels(partition: Partition) -> Table:
    """The output channel at every place where a group writes."""
    return np.array([c for group in partition.outputs for c in group], np.int32)


def places(partition: Partition) -> Table:
    """The places where groups read, by number: for sums that are kept apart for every reader."""
    return np.arange(sum(ins for _, ins in partition.sizes), dtype=np.int32)
