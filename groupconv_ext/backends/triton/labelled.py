"""FLGC and DGConv by the Triton kernels: the operations of :mod:`groupconv_ext.masked`.

The groups are labels on the device and change at every step, so the work list is made there too,
by a sort and a few sums, with room for as many tiles as there could be: a group has at most one
that is not full. Nothing waits for the device.

    tiles ≤ ⌈rows / block⌉ + groups

The weight is dense, and the selected blocks are read where they lie.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import torch
from torch.utils._pytree import register_constant

from ..._layout import is_channels_last
from ..._ops import tf32_allowed
from ...partition import kronecker_radices
from ...window import Window
from .operations import choose_launch, count_pixels, splits
from .tuning import Shape

__all__ = ["TRITON_LABELLED", "TritonLabelledOperations"]

Pair = tuple[torch.Tensor, torch.Tensor]
Triple = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


class _Plan(NamedTuple):
    tiles: torch.Tensor
    rows: torch.Tensor
    row_channels: torch.Tensor
    column_channels: torch.Tensor


def _plan(
    row_labels: torch.Tensor,
    column_labels: torch.Tensor,
    groups: int,
    block: int,
    base_step: int,
    column_step: int,
) -> _Plan:
    """The work list of :mod:`.planner` for labels; entries are those of the dense weight."""
    every = torch.arange(groups + 1, device=row_labels.device, dtype=torch.int32)
    sorted_rows, row_channels = row_labels.sort(stable=True)
    sorted_columns, column_channels = column_labels.sort(stable=True)
    row_starts = torch.searchsorted(sorted_rows, every)
    column_starts = torch.searchsorted(sorted_columns, every)
    row_sizes, column_sizes = row_starts.diff(), column_starts.diff()

    first, columns = column_starts[sorted_rows], column_sizes[sorted_rows]
    step = torch.full_like(first, column_step)
    rows = torch.stack((first, columns, row_channels * base_step, step), 1)

    tiles_of_group = (row_sizes + block - 1) // block
    ends = tiles_of_group.cumsum(0)
    count = -(-len(row_labels) // block) + min(groups, len(row_labels))
    tile = torch.arange(count, device=row_labels.device)
    group = torch.searchsorted(ends, tile, right=True).clamp(max=groups - 1)
    start = (tile - ends[group] + tiles_of_group[group]) * block
    here = torch.where(tile < ends[-1], (row_sizes[group] - start).clamp(0, block), 0)
    tiles = torch.stack(
        (row_starts[group] + start, here, column_starts[group], column_sizes[group]), 1
    )
    return _Plan(
        tiles.to(torch.int32),
        rows,
        row_channels.to(torch.int32),
        column_channels.to(torch.int32),
    )


@cache
def _digits(in_channels: int, out_channels: int, device: torch.device) -> torch.Tensor:
    """A row for every gate: its radix, and the stride of its digit among inputs and outputs."""
    rows = []
    in_stride, out_stride = in_channels, out_channels
    for radix in kronecker_radices(in_channels, out_channels):
        in_stride, out_stride = in_stride // radix, out_stride // radix
        rows.append([radix, in_stride, out_stride])
    with torch.inference_mode(False):
        return torch.tensor(rows, dtype=torch.int32, device=device).view(len(rows), 3)


@dataclass(frozen=True)
class TritonLabelledOperations:
    """The operations of :mod:`groupconv_ext.masked`, under the names of the native ones."""

    def row_labels(self, logits: torch.Tensor, owner: str) -> torch.Tensor:
        """The largest entry of every row, the first among equals."""
        return logits.argmax(1).to(torch.int32)

    def kronecker_labels(
        self, gates: torch.Tensor, in_channels: int, out_channels: int, owner: str
    ) -> Pair:
        """Every channel's digits at the zero gates, read as a number."""
        digits = _digits(in_channels, out_channels, gates.device)
        label = torch.ops.groupconv_triton.gate_labels
        return label(gates, digits, in_channels, False), label(gates, digits, out_channels, True)

    def labelled_conv2d(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        in_labels: torch.Tensor,
        out_labels: torch.Tensor,
        groups: int,
        *window: int,
    ) -> torch.Tensor:
        """The convolution in the groups of the labels."""
        outs, ins = weight.shape[:2]
        kernel = (weight.shape[2], weight.shape[3])
        size = Window(*window).output_size(x.shape[2], x.shape[3], *kernel)
        plan_of = (out_labels, in_labels, groups, ins, 1)
        return self._convolve(
            x, weight, bias, plan_of, outs, size, window, False, is_channels_last(x)
        )

    def labelled_conv2d_input_grad(
        self,
        grad: torch.Tensor,
        weight: torch.Tensor,
        in_labels: torch.Tensor,
        out_labels: torch.Tensor,
        groups: int,
        height: int,
        width: int,
        *window_and_layout: int,
    ) -> torch.Tensor:
        """∂L/∂x."""
        *window, last = window_and_layout
        ins = weight.shape[1]
        plan_of = (in_labels, out_labels, groups, 1, ins)
        size = (height, width)
        return self._convolve(grad, weight, None, plan_of, ins, size, window, True, bool(last))

    def _convolve(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        plan_of: tuple[torch.Tensor, torch.Tensor, int, int, int],
        channels: int,
        size: tuple[int, int],
        window: tuple[int, ...] | list[int],
        transposed: bool,
        last: bool,
    ) -> torch.Tensor:
        row_labels, column_labels, groups, base_step, column_step = plan_of
        shape = _shape(x, row_labels, column_labels, groups, count_pixels(x.shape[0], *size))
        launch = choose_launch(shape)
        plan = _plan(row_labels, column_labels, groups, launch.rows, base_step, column_step)
        result: torch.Tensor = torch.ops.groupconv_triton.convolve(
            x,
            weight,
            bias,
            *(None,) * 3,
            False,
            None,
            None,
            *plan,
            channels,
            *size,
            list(window),
            transposed,
            last,
            True,
            False,
            False,
            True,
            False,
            0,
            tf32_allowed(),
            list(launch),
        )
        return result

    def labelled_conv2d_weight_grad(
        self,
        grad: torch.Tensor,
        x: torch.Tensor,
        in_labels: torch.Tensor,
        out_labels: torch.Tensor,
        groups: int,
        kernel_h: int,
        kernel_w: int,
        *window: int,
    ) -> torch.Tensor:
        """∂L/∂weight, dense, zero where labels differ."""
        outs, ins = grad.shape[1], x.shape[1]
        pixels = count_pixels(grad.shape[0], grad.shape[2], grad.shape[3])
        shape = _shape(x, out_labels, in_labels, groups, pixels)._replace(gradient=True)
        launch = choose_launch(shape)
        plan = _plan(out_labels, in_labels, groups, launch.rows, ins, 1)
        taps = kernel_h * kernel_w
        programs = -(-outs // launch.rows) * taps * -(-ins // (groups * launch.pixels))
        result: torch.Tensor = torch.ops.groupconv_triton.weight_gradient(
            grad,
            x,
            None,
            None,
            False,
            *plan,
            [outs, ins, kernel_h, kernel_w],
            list(window),
            is_channels_last(x),
            True,
            False,
            False,
            ins,
            splits(programs, outs * ins * taps, shape, launch),
            tf32_allowed(),
            x.dtype,
            list(launch),
        )
        return result

    def dense_conv2d_weight_grad(
        self, grad: torch.Tensor, x: torch.Tensor, kernel_h: int, kernel_w: int, *window: int
    ) -> torch.Tensor:
        """∂L/∂weight of one group of all channels."""
        in_labels = torch.zeros(x.shape[1], dtype=torch.int32, device=x.device)
        out_labels = torch.zeros(grad.shape[1], dtype=torch.int32, device=x.device)
        labels = (in_labels, out_labels, 1)
        return self.labelled_conv2d_weight_grad(grad, x, *labels, kernel_h, kernel_w, *window)

    def mask_weight(
        self, weight: torch.Tensor, in_labels: torch.Tensor, out_labels: torch.Tensor
    ) -> torch.Tensor:
        """The weight where labels agree, zero elsewhere."""
        masked: torch.Tensor = torch.ops.groupconv_triton.mask_by_labels(
            weight, in_labels, out_labels
        )
        return masked

    def label_grad(
        self,
        grad: torch.Tensor,
        weight: torch.Tensor,
        input_logits: torch.Tensor,
        output_logits: torch.Tensor,
        in_labels: torch.Tensor,
        out_labels: torch.Tensor,
        winner: bool,
        masked: bool,
    ) -> Triple:
        """The weight's gradient where it is masked (else empty), and the logits'."""
        learn = torch.ops.groupconv_triton.label_gradient
        labels = (in_labels, out_labels)
        return (
            self.mask_weight(grad, *labels) if masked else grad.new_empty(0),
            learn(grad, weight, input_logits, *labels, False, winner),
            learn(grad, weight, output_logits, *labels, True, winner),
        )

    def kronecker_grad(self, grad: torch.Tensor, weight: torch.Tensor, gates: torch.Tensor) -> Pair:
        """The weight's gradient and the gates', from that of the masked weight."""
        outs, ins = weight.shape[:2]
        labels = self.kronecker_labels(gates, ins, outs, "")
        digits = _digits(ins, outs, gates.device)
        learned: torch.Tensor = torch.ops.groupconv_triton.gate_gradient(
            grad, weight, gates, digits
        )
        return self.mask_weight(grad, *labels), learned

    def kronecker_conv2d_grad(
        self,
        grad: torch.Tensor,
        x: torch.Tensor,
        weight: torch.Tensor,
        gates: torch.Tensor,
        *window: int,
    ) -> Pair:
        """The same from the convolution's operands; all of the dense gradient is computed."""
        kernel = (weight.shape[2], weight.shape[3])
        dense = self.dense_conv2d_weight_grad(grad, x, *kernel, *window)
        return self.kronecker_grad(dense.to(weight.dtype), weight, gates)


def _shape(
    x: torch.Tensor,
    row_labels: torch.Tensor,
    column_labels: torch.Tensor,
    groups: int,
    pixels: int,
) -> Shape:
    """The shape of even groups: how they lie is known to the device alone."""
    rows, columns = len(row_labels), len(column_labels)
    size = x.element_size()
    return Shape(max(rows // groups, 1), max(columns // groups, 1), pixels, rows, size, False)


# To torch.compile a set of operations is a constant, like a Partition.
register_constant(TritonLabelledOperations)

TRITON_LABELLED = TritonLabelledOperations()
