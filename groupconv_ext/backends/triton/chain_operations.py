"""The Triton kernel of a chain as :mod:`groupconv_ext.chain` calls it.

The gradient of its input is a chain as well: the stages backwards, each with its rows and columns
swapped. That holds where every channel between two stages, and of x, has one reader; elsewhere, and
where the weights learn too, which need every stage's gradient, it is taken stage by stage.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..._layout import is_channels_last
from ..._ops import tf32_allowed
from ...operations import ACTIVATIONS
from ...partition import Partition
from . import planner
from .operations import choose_launch, count_pixels
from .tuning import Shape

__all__ = ["chain", "chain_input_grad", "has_input_grad"]


def chain(
    x: torch.Tensor,
    weights: Sequence[torch.Tensor],
    bias: torch.Tensor | None,
    partitions: Sequence[Partition],
    activation: str,
) -> torch.Tensor:
    """``activation(W_S … W_1 x + bias)``, weights packed."""
    return _run(x, weights, bias, partitions, activation, is_channels_last(x), 0)


def chain_input_grad(
    grad: torch.Tensor,
    weights: Sequence[torch.Tensor],
    partitions: Sequence[Partition],
    channels_last: bool,
) -> torch.Tensor:
    """``W_1ᵀ … W_Sᵀ grad``."""
    return _run(grad, weights[::-1], None, partitions[::-1], "none", channels_last, 1)


def has_input_grad(partitions: Sequence[Partition]) -> bool:
    """Whether :func:`chain_input_grad` can make the gradient."""
    return all(p.reads_all and not p.has_overlap for p in partitions)


def _run(
    x: torch.Tensor,
    weights: Sequence[torch.Tensor],
    bias: torch.Tensor | None,
    partitions: Sequence[Partition],
    activation: str,
    channels_last: bool,
    transposed: int,
) -> torch.Tensor:
    def swapped(pair: tuple[int, int]) -> tuple[int, int]:
        return pair[::-1] if transposed else pair

    written = [swapped((p.out_channels, p.in_channels))[0] for p in partitions]
    widest = [swapped(p.widest) for p in partitions]
    rows, columns = (max(sizes) for sizes in zip(*widest, strict=True))
    pixels = count_pixels(x.shape[0], x.shape[2], x.shape[3])
    shape = Shape(
        *(rows, columns, pixels, max(written), x.element_size(), False),
        channels_last=channels_last,
        transposed=bool(transposed),
        stages=len(partitions),
    )
    launch = choose_launch(shape)
    tables = [
        p.derived(planner.chain_table, launch.rows, transposed, device=x.device) for p in partitions
    ]
    result: torch.Tensor = torch.ops.groupconv_triton.chain(
        x,
        list(weights),
        bias,
        tables,
        written[-1],
        max(written),
        channels_last,
        any(planner.shares_tiles(p, launch.rows, transposed) for p in partitions),
        ACTIVATIONS.index(activation),
        tf32_allowed(),
        list(launch),
    )
    return result
