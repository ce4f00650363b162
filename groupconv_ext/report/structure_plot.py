"""All groups of a network in one picture, and how they came to be.

Top, how many groups every layer has (DGConv's figure 5) and how large they are. Middle, every
layer's mask with its rows and columns sorted by group: what is computed stands on the diagonal.
Bottom, for layers that recorded their gates while they learned, the number of groups over the
training steps and the gates themselves (figure 6).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt
from torch import nn

from groupconv_ext.nn import DGConv2d, structure
from groupconv_ext.partition import Partition

from .partition_plot import GREY, PALE, draw_sorted_blocks, group_colours

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["plot_structure"]

Picture = npt.NDArray[np.float64]

MOST_BLOCKS = 24  # layers whose masks are drawn; of more, these evenly spaced
BLOCKS_ACROSS = 8
BLUE, ORANGE = "#4477AA", "#EE7733"


def plot_structure(model: nn.Module) -> Figure:
    """Draw the groups of every layer of ``model`` into a new figure, and return it.

    Needs matplotlib.

    Raises:
        ValueError: No layer has a partition.
    """
    try:
        from matplotlib import pyplot  # noqa: PLC0415 (optional, and slow to import)
    except ImportError as error:
        raise ImportError(
            "plot_structure needs matplotlib: pip install groupconv-ext[plots]"
        ) from error
    partitions = structure(model)
    if not partitions:
        raise ValueError("the model has no layer with a partition; expected at least one")
    shown = _evenly(list(partitions), MOST_BLOCKS)
    histories = {
        name: _history(layer)
        for name, layer in model.named_modules()
        if isinstance(layer, DGConv2d) and len(layer.gate_history) > 0
    }
    across = min(BLOCKS_ACROSS, max(4, len(shown)))
    block_rows = math.ceil(len(shown) / across)
    heights = [2.8, 1.9 * block_rows, *([2.8] if histories else [])]
    figure = pyplot.figure(figsize=(13, sum(heights) + 1.2), layout="constrained")
    figure.suptitle(_summary(partitions), x=0.01, ha="left", fontsize=13)
    parts = figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
    counts, sizes = parts[0].subplots(1, 2)
    _draw_counts(counts, partitions)
    _draw_sizes(sizes, partitions)
    for axis in (grid := parts[1].subplots(block_rows, across, squeeze=False)).flat:
        axis.set_axis_off()
    for axis, name in zip(grid.flat, shown, strict=False):
        _draw_blocks(axis, name, partitions[name])
    if histories:
        dynamics, gates = parts[2].subplots(1, 2)
        _draw_dynamics(dynamics, histories)
        _draw_gates(gates, histories)
    return figure


def _summary(partitions: dict[str, Partition]) -> str:
    entries = sum(p.entries for p in partitions.values())
    dense = sum(p.in_channels * p.out_channels for p in partitions.values())
    layers = "1 layer" if len(partitions) == 1 else f"{len(partitions)} layers"
    return f"{layers}, {entries:,} connections, {100 * entries / dense:.3g} % of dense"


def _used(partition: Partition) -> list[tuple[int, int]]:
    return [size for size in partition.sizes if min(size) > 0]


def _draw_counts(ax: Axes, partitions: dict[str, Partition]) -> None:
    heights = [max(1, len(_used(partition))) for partition in partitions.values()]
    ax.bar(range(len(heights)), heights, color=BLUE, width=0.7)
    ax.set_yscale("log", base=2)
    ax.set_ylim(0.9, 1.3 * max(2, *heights))
    _name_layers(ax, [f"{p.in_channels}→{p.out_channels}" for p in partitions.values()])
    ax.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    _style(ax, "groups that compute something")


def _draw_sizes(ax: Axes, partitions: dict[str, Partition]) -> None:
    """A bar a layer: its outputs, in the shares of its groups, the largest below."""
    for at, partition in enumerate(partitions.values()):
        shares = np.sort([outs for outs, _ in partition.sizes if outs])[::-1]
        shares = shares / partition.out_channels
        bottoms = np.cumsum(shares) - shares
        # Lines between the groups, but not where they would be all there is to see.
        line = 0.5 if len(shares) <= 32 else 0.0
        colours = [BLUE if i % 2 == 0 else ORANGE for i in range(len(shares))]
        ax.bar(
            [at] * len(shares),
            shares,
            0.7,
            bottoms,
            color=colours,
            edgecolor="white",
            linewidth=line,
        )
    ax.set_ylim(0, 1)
    _name_layers(ax, [str(at) for at in range(len(partitions))])
    _style(ax, "share of the outputs in every group, the largest below")


def _draw_blocks(ax: Axes, name: str, partition: Partition) -> None:
    ax.set_axis_on()
    draw_sorted_blocks(ax, partition)
    shortened = name if len(name) <= 22 else "…" + name[-21:]
    used, plural = len(_used(partition)), "" if partition.groups == 1 else "s"
    some = f"{used} of " if used < partition.groups else ""
    ax.set_title(f"{shortened}\n{some}{partition.groups} group{plural}", fontsize=8, color=GREY)


class _History(NamedTuple):
    steps: list[int]  # at which the gates changed
    gates: Picture  # from there on
    groups: list[int]
    end: int  # the number of training steps


def _history(layer: DGConv2d) -> _History:
    steps = [step for step, _ in layer.gate_history]
    gates = np.array([values for _, values in layer.gate_history], dtype=float)
    radices = np.array(layer.radices, dtype=float)
    groups = [round(float(np.prod(np.where(row > 0, 1.0, radices)))) for row in gates]
    return _History(steps, gates, groups, max(layer.steps, 1 + steps[-1]))


def _draw_dynamics(ax: Axes, histories: dict[str, _History]) -> None:
    for (name, (steps, _, groups, end)), colour in zip(
        histories.items(), group_colours(len(histories)), strict=True
    ):
        ax.step([*steps, end], [*groups, groups[-1]], where="post", color=colour, label=name)
    ax.set_yscale("log", base=2)
    ax.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    _name_steps(ax)
    if len(histories) <= 9:
        ax.legend(fontsize=7, frameon=False)
    _style(ax, "groups while they are learned")


def _draw_gates(ax: Axes, histories: dict[str, _History]) -> None:
    """A row a gate, layer below layer: dark where it is open and channels are joined."""
    end = max(history.end for history in histories.values())
    columns = min(end, 512)
    at = np.arange(columns) * end // columns
    rows: list[Picture] = []
    ticks: list[float] = []
    for steps, gates, *_ in histories.values():
        ticks.append(len(rows) + (gates.shape[1] - 1) / 2)
        rows.extend(gates[np.searchsorted(steps, at, side="right") - 1].T)
        rows.append(np.full(columns, np.nan))
    ax.set_facecolor("white")
    extent = (0, end, len(rows) - 1.5, -0.5)
    ax.imshow(
        np.array(rows[:-1]),
        aspect="auto",
        interpolation="nearest",
        extent=extent,
        cmap=_two(),
        vmin=0,
        vmax=1,
    )
    few = len(ticks) <= 24
    ax.set_yticks(ticks if few else [], list(histories) if few else [])
    _name_steps(ax)
    _style(ax, "gates: dark = 1, the channels it tells apart are joined")


def _two() -> Any:
    from matplotlib.colors import ListedColormap  # noqa: PLC0415 (optional)

    return ListedColormap([PALE, BLUE])


def _name_steps(ax: Axes) -> None:
    ax.locator_params(axis="x", integer=True)
    ax.set_xlabel("training step", color=GREY, fontsize=8)


def _name_layers(ax: Axes, names: Sequence[str]) -> None:
    kept = _evenly(list(range(len(names))), 24)
    ax.set_xticks(kept, [names[at] for at in kept], rotation=90 if len(names) > 8 else 0)
    ax.set_xlabel("layers from input to output", color=GREY, fontsize=8)


def _style(ax: Axes, title: str) -> None:
    ax.set_title(title, loc="left", fontsize=10, color=GREY)
    ax.tick_params(labelsize=8, labelcolor=GREY, length=0)
    ax.spines[["top", "right"]].set_visible(False)
    ax.spines[["left", "bottom"]].set_color("#B0B0B0")


def _evenly(items: list[Any], most: int) -> list[Any]:
    if len(items) <= most:
        return items
    return [items[round(i * (len(items) - 1) / (most - 1))] for i in range(most)]
