"""The Triton kernel of the weight gradient.

The sum over the pixels is split among programs; each writes a partial sum of its own in float32,
and they are added in order afterwards. No atomics anywhere: equal inputs give equal bits.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .tiles import (
    WIDENED,
    channel_at,
    entries_of,
    locate_pixels,
    moved,
    numbered,
    prepared,
    row_weights,
)

__all__ = ["weight_gradient"]


@triton.jit
def weight_gradient(
    grad,
    x,
    scale,
    shift,
    partial,
    tiles,
    rows,
    row_channels,
    column_channels,
    column_blocks,
    pixel_count,
    pixels_of_split,
    row_count,
    column_count,
    grad_channel_count,
    x_channel_count,
    weight_count,
    grad_h,
    grad_w,
    x_h,
    x_w,
    grad_n_stride,
    grad_c_stride,
    grad_h_stride,
    grad_w_stride,
    x_n_stride,
    x_c_stride,
    x_h_stride,
    x_w_stride,
    KERNEL_H: tl.constexpr,
    KERNEL_W: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    PAD_TOP: tl.constexpr,
    PAD_LEFT: tl.constexpr,
    DILATION_H: tl.constexpr,
    DILATION_W: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    BY_CHANNEL: tl.constexpr,
    SHARED: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_SHIFT: tl.constexpr,
    RELU: tl.constexpr,
    PRECISION: tl.constexpr,
    ONE_ROW: tl.constexpr,
    LARGE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """Rows of a tile × a block of its columns under one tap, summed over a split of the pixels.

    The split writes its own partial sums, float32; another pass adds the splits in order.
    """
    TAPS: tl.constexpr = KERNEL_H * KERNEL_W
    tile = tiles + tl.program_id(0) * 4
    first_row = tl.load(tile)
    rows_here = tl.load(tile + 1)
    first_column = tl.load(tile + 2)
    columns_here = tl.load(tile + 3)
    tap = tl.program_id(1) // column_blocks
    column_start = (tl.program_id(1) % column_blocks) * COLUMNS
    split = tl.program_id(2)

    if (rows_here > 0) & (column_start < columns_here):
        row_index = tl.arange(0, ROWS)
        row_place = first_row + row_index
        row_channel, row_exists = channel_at(
            row_channels, row_place, row_index < rows_here, row_count, grad_channel_count
        )
        column_index = column_start + tl.arange(0, COLUMNS)
        place = first_column + column_index
        channel, exists = channel_at(
            column_channels, place, column_index < columns_here, column_count, x_channel_count
        )
        scales = 1.0
        shifts = 0.0
        if HAS_SCALE:
            scales = tl.load(scale + channel, mask=exists, other=0.0).to(tl.float32)[None, :]
        if HAS_SHIFT:
            shifts = tl.load(shift + channel, mask=exists, other=0.0).to(tl.float32)[None, :]
        if LARGE:
            row_offset = row_channel.to(tl.int64) * grad_c_stride
            column_offset = channel.to(tl.int64) * x_c_stride
        else:
            row_offset = row_channel * grad_c_stride
            column_offset = channel * x_c_stride

        total = tl.zeros((ROWS, COLUMNS), tl.float32)
        start = numbered(split, LARGE) * pixels_of_split
        stop = tl.minimum(start + pixels_of_split, pixel_count)
        for first_pixel in range(start, stop, DEPTH):
            image, row_y, row_x, pixel_exists = locate_pixels(
                first_pixel, stop, grad_h, grad_w, DEPTH, ONE_ROW, LARGE
            )
            grad_offset = image * grad_n_stride + row_y * grad_h_stride + row_x * grad_w_stride
            y_from, x_from, inside = moved(
                row_y,
                row_x,
                tap,
                x_h,
                x_w,
                TAPS,
                KERNEL_W,
                STRIDE_H,
                STRIDE_W,
                PAD_TOP,
                PAD_LEFT,
                DILATION_H,
                DILATION_W,
                False,
            )
            x_offset = image * x_n_stride + y_from * x_h_stride + x_from * x_w_stride
            inside = inside & pixel_exists
            # Each operand is loaded the way it lies in memory and turned on the way to the product.
            if CHANNELS_LAST:
                grads = tl.load(
                    grad + grad_offset[:, None] + row_offset[None, :],
                    mask=pixel_exists[:, None] & row_exists[None, :],
                    other=0.0,
                )
                grads = tl.trans(grads)
                here = inside[:, None] & exists[None, :]
                values = tl.load(
                    x + x_offset[:, None] + column_offset[None, :], mask=here, other=0.0
                )
            else:
                grads = tl.load(
                    grad + row_offset[:, None] + grad_offset[None, :],
                    mask=row_exists[:, None] & pixel_exists[None, :],
                    other=0.0,
                )
                here = exists[:, None] & inside[None, :]
                values = tl.load(
                    x + column_offset[:, None] + x_offset[None, :], mask=here, other=0.0
                )
                values = tl.trans(values)
            if HAS_SCALE or HAS_SHIFT or RELU:
                values = prepared(values, scales, shifts, HAS_SCALE, HAS_SHIFT, RELU)
                values = tl.where(inside[:, None] & exists[None, :], values, 0.0)
            if WIDENED:
                grads = grads.to(tl.float32)
                values = values.to(tl.float32)
            total = tl.dot(grads, values, total, input_precision=PRECISION)

        row_first, row_columns, row_base, row_step, row_safe = row_weights(
            rows,
            row_place,
            row_exists,
            first_column,
            columns_here,
            weight_count,
            x_channel_count,
            TAPS,
            BY_CHANNEL,
            SHARED,
        )
        entry, own = entries_of(
            place[None, :],
            channel[None, :],
            row_first[:, None],
            row_columns[:, None],
            row_base[:, None],
            row_step[:, None],
            BY_CHANNEL,
            SHARED,
        )
        entry = entry * TAPS + tap
        connected = own & row_safe[:, None] & exists[None, :]
        tl.store(partial + split.to(tl.int64) * weight_count + entry, total, mask=connected)
