"""What people write today: gather the channels, convolve in groups, put the channels back."""

from __future__ import annotations

import torch

from .._layout import is_channels_last
from ..partition import Partition
from ..prologue import Prologue
from ..window import Window
from .registry import Backend, Call
from .vendor import finish, grouped_conv2d

__all__ = ["ATEN"]


def _why_not(call: Call) -> str | None:
    return None


def _convolve(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    partition: Partition,
    window: Window,
    activation: str,
    prologue: Prologue | None = None,
) -> torch.Tensor:
    if prologue is not None:
        x = prologue.apply(x)
    channels_last = is_channels_last(x)
    if not partition.is_contiguous:
        x = _gather(x, partition.read_order(x.device))
    outs, ins = partition.sizes[0]
    if partition.is_even and outs and ins:
        blocks = weight.contiguous().view(partition.out_channels, ins, *weight.shape[1:])
        y = grouped_conv2d(x, blocks, None, window, partition.groups)
    else:
        y = _ragged(x, weight, partition, window)
    if not partition.is_contiguous:
        y = _gather(y, partition.write_order(x.device))
    if channels_last:  # a copy only where groups without inputs brought another format
        y = y.contiguous(memory_format=torch.channels_last)
    if bias is not None:
        y = y + bias[:, None, None]
    return finish(y, residual, activation)


def _gather(x: torch.Tensor, channels: torch.Tensor) -> torch.Tensor:
    """``index_select`` of channels; by itself it returns NCHW, whatever it is given."""
    if is_channels_last(x):
        return x.movedim(1, -1).index_select(-1, channels).movedim(-1, 1)
    return x.index_select(1, channels)


def _ragged(
    x: torch.Tensor, weight: torch.Tensor, partition: Partition, window: Window
) -> torch.Tensor:
    """One convolution a group, since groups of different sizes fit no single call."""
    size = window.output_size(x.shape[2], x.shape[3], weight.shape[1], weight.shape[2])
    reads = torch.split(x, [ins for _, ins in partition.sizes], 1)
    blocks = torch.split(weight.contiguous(), [outs * ins for outs, ins in partition.sizes])
    results = []
    for read, block, (outs, ins) in zip(reads, blocks, partition.sizes, strict=True):
        if outs and ins:
            kernel = block.view(outs, ins, *block.shape[1:])
            results.append(grouped_conv2d(read, kernel, None, window, 1))
        else:
            results.append(x.new_zeros(x.shape[0], outs, *size))
    return torch.cat(results, 1)


ATEN = Backend("aten", _why_not, _convolve)
