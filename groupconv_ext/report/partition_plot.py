"""A Partition drawn twice: as its channels are numbered, and sorted into its groups.

Left, the connections of outputs (rows) and inputs (columns) in channel order, where a learned
structure looks like noise. Right, the same connections with rows and columns sorted by group:
the blocks that are computed stand on the diagonal, and the white around them is work not done.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate, chain, pairwise
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import numpy.typing as npt

from groupconv_ext.partition import Partition

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["draw_sorted_blocks", "group_colours", "plot_partition"]

Lists: TypeAlias = Sequence[Sequence[int]]
Colours: TypeAlias = npt.NDArray[np.float64]
"""Red, green and blue in [0, 1], one row a group."""

# Paul Tol's muted colours, told apart under every common colour blindness, in an order that keeps
# neighbours unlike each other. Above that many groups, viridis: as safe, and it ascends with them.
FEW_GROUPS = "332288 CC6677 44AA99 DDCC77 882255 88CCEE 117733 AA4499 999933"

LARGEST_IMAGE = 512  # cells on a side: about what a panel resolves
COUNTABLE = 24  # channels up to which cells are ruled and numbered
FAINTEST = 0.5  # opacity of a cell with one of its connections, so that none is lost
GREY = "#6B6B6B"
PALE = "#F4F4F4"


def plot_partition(partition: Partition, ax: Axes | None = None) -> Figure:
    """Draw ``partition``, into ``ax`` if given and else into a new figure, and return the figure.

    Right, an input channel that several groups read has a column in each of their blocks; columns
    that nobody reads, and rows that only get their bias, are hatched. Needs matplotlib.
    """
    try:
        from matplotlib import pyplot  # noqa: PLC0415 (optional, and slow to import)
    except ImportError as error:
        raise ImportError(
            "plot_partition needs matplotlib: pip install groupconv-ext[plots]"
        ) from error

    if not isinstance(partition, Partition):
        raise TypeError(f"partition is {partition!r}; expected a groupconv_ext.Partition")
    if ax is None:
        ax = pyplot.figure(figsize=(11.5, 6.4)).add_axes((0.055, 0.085, 0.925, 0.74))
    ax.set_axis_off()
    ax.set_title(_description(partition), loc="left", fontsize=13, linespacing=1.5, pad=28)
    colours = _colours(partition.groups, pyplot.get_cmap("viridis"))
    _draw_as_numbered(ax.inset_axes((0, 0, 0.47, 1)), partition, colours)
    _draw_by_group(ax.inset_axes((0.53, 0, 0.47, 1)), partition, colours)
    return ax.figure.figure


def _description(partition: Partition) -> str:
    percent = 100 * partition.entries / (partition.in_channels * partition.out_channels)
    groups = "1 group" if partition.groups == 1 else f"{partition.groups} groups"
    if partition.is_even and partition.groups > 1:
        outs, ins = partition.sizes[0]
        groups += f", each {outs}×{ins}"
    return (
        f"{partition.in_channels} → {partition.out_channels} channels, {groups}\n"
        f"{partition.entries:,} connections, {percent:.3g} % of dense"
    )


def _colours(groups: int, colour_map: Callable[[Colours], Colours]) -> Colours:
    few = [list(bytes.fromhex(name)) for name in FEW_GROUPS.split()]
    if groups <= len(few):
        return np.array(few[:groups]) / 255
    # The lightest tenth would vanish on white.
    return colour_map(np.linspace(0, 0.9, groups))[:, :3]


def group_colours(groups: int) -> Colours:
    """A colour for each of so many things, one row each."""
    from matplotlib import pyplot  # noqa: PLC0415 (optional, and slow to import)

    return _colours(groups, pyplot.get_cmap("viridis"))


def draw_sorted_blocks(ax: Axes, partition: Partition) -> None:
    """The blocks of a partition, rows and columns sorted by group, and nothing written on them."""
    rows, columns = partition.out_channels, sum(map(len, partition.inputs))
    outputs, inputs = _runs(partition.outputs), _runs(partition.inputs)
    image = _image(outputs, inputs, rows, max(columns, 1), group_colours(partition.groups))
    ax.imshow(image, aspect="auto", interpolation="antialiased")
    ax.set_xticks([])
    ax.set_yticks([])
    ax.spines[:].set_color("#B0B0B0")


def _draw_as_numbered(ax: Axes, partition: Partition, colours: Colours) -> None:
    rows, columns = range(partition.out_channels), range(partition.in_channels)
    image = _image(partition.outputs, partition.inputs, len(rows), len(columns), colours)
    _draw_cells(ax, image, rows, columns)
    ax.set_title("as the channels are numbered", loc="left", fontsize=11, color=GREY)
    ax.set_xlabel("input channel")
    ax.set_ylabel("output channel")


def _draw_by_group(ax: Axes, partition: Partition, colours: Colours) -> None:
    written = list(chain.from_iterable(partition.outputs))
    read = list(chain.from_iterable(partition.inputs))
    unread = sorted(set(range(partition.in_channels)).difference(read))
    rows, columns = len(written), len(read) + len(unread)
    outputs, inputs = _runs(partition.outputs), _runs(partition.inputs)
    image = _image(outputs, inputs, rows, columns, colours)
    _draw_cells(ax, image, written, [*read, *unread])
    for outs, ins, colour in zip(outputs, inputs, colours, strict=True):
        if outs and not ins:
            _hatch(ax, outs, range(columns), "bias only" if len(outs) > rows / 20 else "")
        elif len(outs) > rows / 16 and len(ins) > columns / 9 and max(rows, columns) > COUNTABLE:
            _label(ax, outs, ins, f"{len(outs)}×{len(ins)}", _readable_on(colour))
    if unread:
        label = "unread" if len(unread) > columns / 20 else ""
        _hatch(ax, range(rows), range(len(read), columns), label)
    ax.set_title("sorted by group", loc="left", fontsize=11, color=GREY)
    ax.set_xlabel("input channels, group after group")
    ax.set_ylabel("output channels, group after group")


def _runs(lists: Lists) -> list[range]:
    """Where each list's members stand when the lists are written one after another."""
    return [range(start, stop) for start, stop in pairwise(accumulate(map(len, lists), initial=0))]


def _image(outputs: Lists, inputs: Lists, rows: int, columns: int, colours: Colours) -> Colours:
    """The mask in colours, reduced to a size that can be shown.

    A cell that stands for many connections has the colour of the group with most of them, and is
    the paler the fewer there are.
    """
    height, width = min(rows, LARGEST_IMAGE), min(columns, LARGEST_IMAGE)
    row_cells = np.arange(rows) * height // rows
    column_cells = np.arange(columns) * width // columns
    total = np.zeros((height, width))
    most = np.zeros((height, width))
    strongest = np.ones((height, width, 3))
    for outs, ins, colour in zip(outputs, inputs, colours, strict=True):
        # A group connects each of its outputs with each of its inputs, so the counts multiply.
        hit_rows, row_counts = np.unique(row_cells[list(outs)], return_counts=True)
        hit_columns, column_counts = np.unique(column_cells[list(ins)], return_counts=True)
        hit = np.ix_(hit_rows, hit_columns)
        hits = np.multiply.outer(row_counts, column_counts)
        total[hit] += hits
        strongest[hit] = np.where((hits > most[hit])[..., None], colour, strongest[hit])
        most[hit] = np.maximum(hits, most[hit])
    coverage = total / np.multiply.outer(np.bincount(row_cells), np.bincount(column_cells))
    opacity = np.where(total > 0, FAINTEST + (1 - FAINTEST) * coverage, 0)[..., None]
    return 1 - opacity + opacity * strongest


def _draw_cells(
    ax: Axes, image: Colours, row_names: Sequence[int], column_names: Sequence[int]
) -> None:
    rows, columns = len(row_names), len(column_names)
    extent = (-0.5, columns - 0.5, rows - 0.5, -0.5)
    ax.imshow(image, extent=extent, aspect="auto", interpolation="nearest")
    ax.spines[:].set_color("#B0B0B0")
    ax.tick_params(length=0, labelsize=8, labelcolor=GREY)
    for axis, names in ((ax.xaxis, column_names), (ax.yaxis, row_names)):
        if len(names) <= COUNTABLE:
            axis.set_ticks(range(len(names)), [str(name) for name in names])
        elif not isinstance(names, range):  # numbers out of order say nothing at this density
            axis.set_ticks([])
    if max(rows, columns) <= COUNTABLE:
        ax.vlines(np.arange(columns - 1) + 0.5, -0.5, rows - 0.5, colors="white", linewidths=1.5)
        ax.hlines(np.arange(rows - 1) + 0.5, -0.5, columns - 0.5, colors="white", linewidths=1.5)


def _hatch(ax: Axes, rows: range, columns: range, label: str) -> None:
    """Cover cells where there is nothing to compute."""
    ax.fill_between(
        [columns.start - 0.5, columns.stop - 0.5],
        rows.start - 0.5,
        rows.stop - 0.5,
        facecolor=PALE,
        edgecolor="#D0D0D0",
        hatch="////",
        linewidth=0,
        zorder=3,
    )
    if label:
        _label(ax, rows, columns, label, GREY, background=PALE)


def _label(
    ax: Axes, rows: range, columns: range, text: str, colour: str, background: str = "none"
) -> None:
    ax.text(
        (columns.start + columns.stop - 1) / 2,
        (rows.start + rows.stop - 1) / 2,
        text,
        color=colour,
        fontsize=9,
        ha="center",
        va="center",
        rotation="vertical" if background != "none" and len(columns) < len(rows) else "horizontal",
        bbox={"facecolor": background, "edgecolor": "none", "pad": 2},
        zorder=4,
    )


def _readable_on(colour: npt.NDArray[np.float64]) -> str:
    return "white" if colour @ (0.299, 0.587, 0.114) < 0.55 else "black"
