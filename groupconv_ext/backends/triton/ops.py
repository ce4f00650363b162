"""The convolution kernels as operations, ``torch.ops.groupconv_triton``: check, allocate, launch.

An operation launches on the current stream and waits for nothing, and nothing is measured, so a
call can be captured in a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton

from ..._layout import empty_image
from ...window import Window
from . import convolve_kernels, gradient_kernels, single_kernels
from .planner import TILE_FIELDS
from .registration import launch_kernel, register

__all__ = [
    "as_rows",
    "check_channels",
    "check_operands",
    "collect_readers",
    "convolve",
    "is_large",
    "precision",
    "rows_join",
    "strides",
    "weight_gradient",
]

_LARGEST = 2**31 - 1
_PIXELS_OF_A_COPY = 64


# ---- what is refused ----------------------------------------------------------------------------


def _refuse(condition: bool, message: str) -> None:
    if condition:
        raise RuntimeError(message)


def check_operands(x: torch.Tensor, **others: torch.Tensor | None) -> None:
    """Refuse what is not on the device of x, and an x that is no batch of images."""
    for name, tensor in others.items():
        if tensor is not None and tensor.device != x.device:
            raise RuntimeError(f"{name} is on {tensor.device}; expected {x.device}, where x is")
    _refuse(x.dim() != 4, f"x has shape {list(x.shape)}; expected [B, C, H, W]")


def _check_plan(
    tiles: torch.Tensor,
    rows: torch.Tensor,
    row_channels: torch.Tensor,
    column_channels: torch.Tensor,
) -> None:
    """Shapes and types only: what the tables say is masked in the kernels."""
    count = row_channels.numel()
    for name, table, dtype, shape in (
        ("tiles", tiles, torch.int32, (tiles.shape[0], TILE_FIELDS)),
        ("rows", rows, torch.int64, (count, 4)),
        ("row_channels", row_channels, row_channels.dtype, (count,)),
        ("column_channels", column_channels, row_channels.dtype, (column_channels.numel(),)),
    ):
        if table.dtype != dtype or table.shape != shape or not table.is_contiguous():
            raise RuntimeError(
                f"{name} is {table.dtype} {list(table.shape)}; expected contiguous {dtype} "
                f"{list(shape)}"
            )
    _refuse(
        row_channels.dtype not in (torch.int32, torch.int64),
        f"row_channels is {row_channels.dtype}; expected int32 or int64",
    )


def check_channels(name: str, tensor: torch.Tensor | None, channels: int) -> None:
    """Refuse what is not one number for each channel, or nothing."""
    if tensor is not None and (tensor.shape != (channels,) or not tensor.is_contiguous()):
        raise RuntimeError(f"{name} has shape {list(tensor.shape)}; expected [{channels}]")


def is_large(*tensors: torch.Tensor) -> bool:
    """Whether an offset or a pixel's number may not fit 32 bits."""
    return any(
        sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))
        > _LARGEST - (1 << 16)
        for t in tensors
        if t.numel()
    )


def strides(name: str, tensor: torch.Tensor) -> dict[str, int]:
    """Those of an image, as kernels call them."""
    values = zip("nchw", tensor.stride(), strict=True)
    return {f"{name}_{letter}_stride": stride for letter, stride in values}


def _window(window: Sequence[int], weight_h: int, weight_w: int) -> dict[str, int]:
    w = Window(*window)
    return {
        "KERNEL_H": weight_h,
        "KERNEL_W": weight_w,
        "STRIDE_H": w.stride_h,
        "STRIDE_W": w.stride_w,
        "PAD_TOP": w.pad_top,
        "PAD_LEFT": w.pad_left,
        "DILATION_H": w.dilation_h,
        "DILATION_W": w.dilation_w,
    }


def _is_pointwise(window: Sequence[int], kernel: Sequence[int]) -> bool:
    """One tap at the pixel itself."""
    w = Window(*window)
    return tuple(kernel) == (1, 1) and w.stride == (1, 1) and not any(w.padding)


def rows_join(*images: torch.Tensor) -> bool:
    """Whether the rows of every image follow each other, so that it may be read as one long row."""
    return all(t.stride(2) == t.shape[3] * t.stride(3) for t in images)


def as_rows(size: int, *images: str) -> dict[str, Any]:
    """The settings that turn the named images into images of one row."""
    found: dict[str, Any] = {"ONE_ROW": True}
    for name in images:
        found |= {f"{name}_h": 1, f"{name}_w": size}
    return found


def _prologue(
    x: torch.Tensor, scale: torch.Tensor | None, shift: torch.Tensor | None, relu: bool
) -> dict[str, Any]:
    return {
        "scale": x if scale is None else scale,
        "shift": x if shift is None else shift,
        "HAS_SCALE": scale is not None,
        "HAS_SHIFT": shift is not None,
        "RELU": relu,
    }


def precision(x: torch.Tensor, tf32: bool) -> str:
    """How matrix units multiply float32; other dtypes as they are."""
    return "tf32" if tf32 and x.dtype == torch.float32 else "ieee"


# ---- convolution and input gradient -------------------------------------------------------------


def _convolve(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    scale: torch.Tensor | None,
    shift: torch.Tensor | None,
    relu: bool,
    coarse: torch.Tensor | None,
    level: torch.Tensor | None,
    tiles: torch.Tensor,
    rows: torch.Tensor,
    row_channels: torch.Tensor,
    column_channels: torch.Tensor,
    out_channels: int,
    height: int,
    width: int,
    window: Sequence[int],
    transposed: bool,
    channels_last: bool,
    by_channel: bool,
    single: bool,
    shared: bool,
    all_written: bool,
    wide: bool,
    activation: int,
    tf32: bool,
    launch: Sequence[int],
) -> torch.Tensor:
    check_operands(
        x,
        weight=weight,
        bias=bias,
        residual=residual,
        scale=scale,
        shift=shift,
        coarse=coarse,
        level=level,
        tiles=tiles,
        rows=rows,
    )
    _check_plan(tiles, rows, row_channels, column_channels)
    check_channels("bias", bias, out_channels)
    check_channels("scale", scale, x.shape[1])
    check_channels("shift", shift, x.shape[1])
    out = _convolve_result(
        x, out_channels, height, width, channels_last, wide=wide, filled=not all_written
    )
    if residual is not None and residual.shape != out.shape:
        raise RuntimeError(f"residual has shape {list(residual.shape)}; expected {list(out.shape)}")
    count = row_channels.numel()
    if out.numel() == 0 or count == 0:
        return out
    weight = weight.contiguous()
    added = out if residual is None else residual
    seen = out if level is None else level
    rows_of, pixels_of, depth, warps, stages = launch
    pixel_count = x.shape[0] * height * width
    settings: dict[str, Any] = {
        "x": x,
        "weight": weight,
        "bias": x if bias is None else bias,
        "residual": x if residual is None else residual,
        "out": out,
        "rows": rows,
        "row_channels": row_channels,
        "column_channels": column_channels,
        "pixel_count": pixel_count,
        "row_count": count,
        "column_count": column_channels.numel(),
        "x_channel_count": x.shape[1],
        "out_channel_count": out_channels,
        "weight_count": weight.numel(),
        "x_h": x.shape[2],
        "x_w": x.shape[3],
        "out_h": height,
        "out_w": width,
        **strides("x", x),
        **strides("out", out),
        **strides("residual", added),
        **strides("level", seen),
        **_window(window, weight.shape[-2], weight.shape[-1]),
        **_prologue(x, scale, shift, relu),
        "TRANSPOSED": transposed,
        "CHANNELS_LAST": channels_last,
        "HAS_BIAS": bias is not None,
        "HAS_RESIDUAL": residual is not None,
        "ACTIVATION": activation,
        "ONE_ROW": False,
        "LARGE": is_large(x, out, added),
        "ROWS": rows_of,
        "PIXELS": pixels_of,
        "num_warps": warps,
        "num_stages": stages,
    }
    if _is_pointwise(window, weight.shape[-2:]) and rows_join(x, out, added, seen):
        settings |= as_rows(height * width, "x", "out")
    pixel_blocks = triton.cdiv(pixel_count, pixels_of)
    if single:
        row_blocks = triton.cdiv(count, rows_of)
        settings = {k: v for k, v in settings.items() if not k.startswith("level_")}
        settings["row_blocks"] = row_blocks
        launch_kernel(single_kernels.convolve_single, (row_blocks * pixel_blocks,), x, settings)
        return out
    settings |= {
        "tiles": tiles,
        "tile_count": tiles.shape[0],
        "coarse": x if coarse is None else coarse.contiguous(),
        "level": seen,
        "level_count": 0 if level is None else level.shape[1],
        "HAS_LEVEL": level is not None,
        "BY_CHANNEL": by_channel,
        "SHARED": shared,
        "UNIT_STEPS": not (transposed or by_channel),
        "LARGE_WEIGHT": weight.numel() > _LARGEST,
        "PRECISION": precision(x, tf32),
        "DEPTH": depth,
    }
    launch_kernel(convolve_kernels.convolve, (tiles.shape[0] * pixel_blocks,), x, settings)
    return out


def _convolve_result(
    x: torch.Tensor,
    out_channels: int,
    height: int,
    width: int,
    channels_last: bool,
    *,
    wide: bool,
    filled: bool,
) -> torch.Tensor:
    like = x.new_empty(0, dtype=torch.float32) if wide else x
    out = empty_image(like, (x.shape[0], out_channels, height, width), channels_last)
    return out.zero_() if filled else out


def _fake_convolve(x: torch.Tensor, *rest: Any) -> torch.Tensor:
    out_channels, height, width = rest[12:15]
    channels_last, wide = rest[17], rest[22]
    return _convolve_result(x, out_channels, height, width, channels_last, wide=wide, filled=False)


convolve = register("convolve", _convolve, _fake_convolve)


# ---- weight gradient ----------------------------------------------------------------------------


def _weight_gradient(
    grad: torch.Tensor,
    x: torch.Tensor,
    scale: torch.Tensor | None,
    shift: torch.Tensor | None,
    relu: bool,
    tiles: torch.Tensor,
    rows: torch.Tensor,
    row_channels: torch.Tensor,
    column_channels: torch.Tensor,
    shape: Sequence[int],
    window: Sequence[int],
    channels_last: bool,
    by_channel: bool,
    single: bool,
    shared: bool,
    widest: int,
    splits: int,
    tf32: bool,
    dtype: torch.dtype,
    launch: Sequence[int],
) -> torch.Tensor:
    check_operands(x, grad=grad, scale=scale, shift=shift, tiles=tiles, rows=rows)
    _check_plan(tiles, rows, row_channels, column_channels)
    check_channels("scale", scale, x.shape[1])
    check_channels("shift", shift, x.shape[1])
    _refuse(
        grad.dim() != 4 or grad.shape[0] != x.shape[0],
        f"grad has shape {list(grad.shape)}; expected as many images as x, {x.shape[0]}",
    )
    kernel_h, kernel_w = shape[-2:]
    taps = kernel_h * kernel_w
    pixel_count = grad.shape[0] * grad.shape[2] * grad.shape[3]
    entries = 1
    for size in shape:
        entries *= size
    if entries == 0 or pixel_count == 0 or row_channels.numel() == 0:
        return x.new_zeros(shape, dtype=dtype)
    rows_of, columns_of, depth, warps, stages = launch
    unit = columns_of if single else depth
    pixels_of_split = triton.cdiv(triton.cdiv(pixel_count, splits), unit) * unit
    make = x.new_zeros if by_channel else x.new_empty
    partial = make((splits, entries), dtype=torch.float32)
    settings: dict[str, Any] = {
        "grad": grad,
        "x": x,
        "partial": partial,
        "rows": rows,
        "row_channels": row_channels,
        "column_channels": column_channels,
        "pixel_count": pixel_count,
        "pixels_of_split": pixels_of_split,
        "row_count": row_channels.numel(),
        "column_count": column_channels.numel(),
        "grad_channel_count": grad.shape[1],
        "x_channel_count": x.shape[1],
        "weight_count": entries,
        "grad_h": grad.shape[2],
        "grad_w": grad.shape[3],
        "x_h": x.shape[2],
        "x_w": x.shape[3],
        **strides("grad", grad),
        **strides("x", x),
        **_window(window, kernel_h, kernel_w),
        **_prologue(x, scale, shift, relu),
        "CHANNELS_LAST": channels_last,
        "ONE_ROW": False,
        "LARGE": is_large(x, grad),
        "ROWS": rows_of,
        "num_warps": warps,
        "num_stages": stages,
    }
    if _is_pointwise(window, shape[-2:]) and rows_join(grad, x):
        size = grad.shape[2] * grad.shape[3]
        settings |= as_rows(size, "grad", "x")
    if single:
        grid = (triton.cdiv(row_channels.numel(), rows_of), taps, splits)
        settings["PIXELS"] = columns_of
        launch_kernel(single_kernels.weight_gradient_single, grid, x, settings)
    else:
        column_blocks = triton.cdiv(widest, columns_of)
        settings |= {
            "tiles": tiles,
            "column_blocks": column_blocks,
            "BY_CHANNEL": by_channel,
            "SHARED": shared,
            "PRECISION": precision(x, tf32),
            "COLUMNS": columns_of,
            "DEPTH": depth,
        }
        launch_kernel(
            gradient_kernels.weight_gradient,
            (tiles.shape[0], taps * column_blocks, splits),
            x,
            settings,
        )
    return partial.sum(0).view(shape).to(dtype)


def _fake_weight_gradient(grad: torch.Tensor, x: torch.Tensor, *rest: Any) -> torch.Tensor:
    return x.new_empty(rest[7], dtype=rest[16])


weight_gradient = register("weight_gradient", _weight_gradient, _fake_weight_gradient)


# ---- the input gradient where groups overlap ----------------------------------------------------


def _collect_readers(
    partial: torch.Tensor, readers: torch.Tensor, channels_last: bool, dtype: torch.dtype
) -> torch.Tensor:
    check_operands(partial, readers=readers)
    if readers.dim() != 2 or readers.dtype != torch.int32 or not readers.is_contiguous():
        raise RuntimeError(
            f"readers is {readers.dtype} {list(readers.shape)}; expected contiguous int32 "
            "[channels, most readers]"
        )
    out = _fake_collect_readers(partial, readers, channels_last, dtype)
    if out.numel() == 0:
        return out
    batch, channels, height, width = out.shape
    block = 32
    channel_blocks = triton.cdiv(channels, block)
    pixel_count = batch * height * width
    settings = {
        "partial": partial,
        "readers": readers,
        "out": out,
        "channel_blocks": channel_blocks,
        "pixel_count": pixel_count,
        "channel_count": channels,
        "reader_count": readers.shape[1],
        "partial_channel_count": partial.shape[1],
        "size_h": height,
        "size_w": width,
        **strides("partial", partial),
        **strides("out", out),
        "CHANNELS_LAST": channels_last,
        "ONE_ROW": False,
        "LARGE": is_large(partial, out),
        "CHANNELS": block,
        "PIXELS": _PIXELS_OF_A_COPY,
    }
    if rows_join(partial, out):
        settings |= {"ONE_ROW": True, "size_h": 1, "size_w": height * width}
    grid = (channel_blocks * triton.cdiv(pixel_count, _PIXELS_OF_A_COPY),)
    launch_kernel(convolve_kernels.collect_readers, grid, partial, settings)
    return out


def _fake_collect_readers(
    partial: torch.Tensor, readers: torch.Tensor, channels_last: bool, dtype: torch.dtype
) -> torch.Tensor:
    batch, _, height, width = partial.shape
    like = partial.new_empty(0, dtype=dtype)
    return empty_image(like, (batch, readers.shape[0], height, width), channels_last)


collect_readers = register("collect_readers", _collect_readers, _fake_collect_readers)
