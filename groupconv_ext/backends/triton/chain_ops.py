"""The chain of pointwise stages as an operation, ``torch.ops.groupconv_triton.chain``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton

from ..._layout import empty_image
from . import chain_kernels
from .ops import as_rows, check_channels, check_operands, is_large, precision, rows_join, strides
from .registration import launch_kernel, register

__all__ = ["chain"]

_MOST_PROGRAMS = 1024  # a few on each multiprocessor of a large GPU
_SCRATCH_BYTES = 32 << 20  # of all programs: what an L2 cache holds
_LARGEST_TABLE = 1 << 28


def _chain(
    x: torch.Tensor,
    weights: Sequence[torch.Tensor],
    bias: torch.Tensor | None,
    tables: Sequence[torch.Tensor],
    out_channels: int,
    widest: int,
    channels_last: bool,
    shared: bool,
    activation: int,
    tf32: bool,
    launch: Sequence[int],
) -> torch.Tensor:
    named = {f"weights[{s}]": weight for s, weight in enumerate(weights)}
    named |= {f"tables[{s}]": table for s, table in enumerate(tables)}
    check_operands(x, bias=bias, **named)
    check_channels("bias", bias, out_channels)
    if not tables or len(weights) != len(tables):
        raise RuntimeError(
            f"a chain has a weight and a table for every stage and at least one stage, got "
            f"{len(weights)} weights and {len(tables)} tables"
        )
    for s, (weight, table) in enumerate(zip(weights, tables, strict=True)):
        if weight.dtype != x.dtype:
            raise RuntimeError(f"weights[{s}] is {weight.dtype} and x is {x.dtype}")
        if table.dtype != torch.int64 or table.dim() != 1:
            raise RuntimeError(
                f"tables[{s}] is {table.dtype} {list(table.shape)}; expected int64, one-dimensional"
            )
    if widest < 1:
        raise RuntimeError(f"widest is {widest}; expected the most channels between two stages")
    out = _fake_chain(x, weights, bias, tables, out_channels, widest, channels_last)
    if out.numel() == 0:
        return out
    weight = torch.cat([weight.flatten() for weight in weights])
    table = torch.cat(list(tables))
    if max(table.numel(), weight.numel()) > _LARGEST_TABLE:
        raise RuntimeError(
            f"the stages have {weight.numel()} weights and tables of {table.numel()} numbers; "
            f"expected at most {_LARGEST_TABLE}"
        )
    rows, pixels, depth, warps, stages = launch
    pixel_count = x.shape[0] * x.shape[2] * x.shape[3]
    strip = 2 * widest * pixels
    programs = min(_MOST_PROGRAMS, max(1, _SCRATCH_BYTES // (strip * x.element_size())))
    programs = min(programs, triton.cdiv(pixel_count, pixels))
    settings: dict[str, Any] = {
        "x": x,
        "weight": weight,
        "bias": x if bias is None else bias,
        "table": table,
        "scratch": x.new_empty(programs * strip if len(tables) > 1 else 1),
        "out": out,
        "table_count": table.numel(),
        "weight_count": weight.numel(),
        "pixel_count": pixel_count,
        "x_channel_count": x.shape[1],
        "out_channel_count": out_channels,
        "widest": widest,
        "size_h": x.shape[2],
        "size_w": x.shape[3],
        **strides("x", x),
        **strides("out", out),
        "STAGES": len(tables),
        "SHARED": shared,
        "HAS_BIAS": bias is not None,
        "ACTIVATION": activation,
        "PRECISION": precision(x, tf32),
        "ONE_ROW": False,
        "LARGE": is_large(x, out),
        "ROWS": rows,
        "PIXELS": pixels,
        "DEPTH": depth,
        "num_warps": warps,
        "num_stages": stages,
    }
    if rows_join(x, out):
        settings |= as_rows(x.shape[2] * x.shape[3], "size")
    launch_kernel(chain_kernels.chain, (programs,), x, settings)
    return out


def _fake_chain(
    x: torch.Tensor,
    weights: Sequence[torch.Tensor],
    bias: torch.Tensor | None,
    tables: Sequence[torch.Tensor],
    out_channels: int,
    widest: int,
    channels_last: bool,
    *_: Any,
) -> torch.Tensor:
    return empty_image(x, (x.shape[0], out_channels, x.shape[2], x.shape[3]), channels_last)


chain = register("chain", _chain, _fake_chain)
