"""The Triton kernels where no row has more than one column, depthwise above all.

There is nothing to sum over but the taps and no matrix to multiply: a program computes its rows
directly. No atomics anywhere: equal inputs give equal bits.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .tiles import channel_at, finish, locate_pixels, moved, numbered, prepared

__all__ = ["convolve_single", "weight_gradient_single"]


@triton.jit
def convolve_single(
    x,
    weight,
    bias,
    residual,
    scale,
    shift,
    out,
    rows,
    row_channels,
    column_channels,
    row_blocks,
    pixel_count,
    row_count,
    column_count,
    x_channel_count,
    out_channel_count,
    weight_count,
    x_h,
    x_w,
    out_h,
    out_w,
    x_n_stride,
    x_c_stride,
    x_h_stride,
    x_w_stride,
    out_n_stride,
    out_c_stride,
    out_h_stride,
    out_w_stride,
    residual_n_stride,
    residual_c_stride,
    residual_h_stride,
    residual_w_stride,
    KERNEL_H: tl.constexpr,
    KERNEL_W: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    PAD_TOP: tl.constexpr,
    PAD_LEFT: tl.constexpr,
    DILATION_H: tl.constexpr,
    DILATION_W: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_SHIFT: tl.constexpr,
    RELU: tl.constexpr,
    ACTIVATION: tl.constexpr,
    ONE_ROW: tl.constexpr,
    LARGE: tl.constexpr,
    ROWS: tl.constexpr,
    PIXELS: tl.constexpr,
):
    """Rows of one column at most, depthwise above all: multiply-adds without matrix units.

    A program takes ROWS rows × PIXELS pixels through all taps; a value is one load, one
    multiply-add, and neighbouring taps find their lines in the L1 cache.
    """
    ROW_AXIS: tl.constexpr = 0 if CHANNELS_LAST else 1
    PIXEL_AXIS: tl.constexpr = 1 if CHANNELS_LAST else 0
    TAPS: tl.constexpr = KERNEL_H * KERNEL_W

    program = numbered(tl.program_id(0), LARGE)
    pixel_block = program // row_blocks
    row_place = (program % row_blocks) * ROWS + tl.arange(0, ROWS)
    image, row_y, row_x, pixel_exists = locate_pixels(
        pixel_block * PIXELS, pixel_count, out_h, out_w, PIXELS, ONE_ROW, LARGE
    )
    row_channel, row_exists = channel_at(
        row_channels, row_place, row_place < row_count, row_count, out_channel_count
    )
    row = rows + row_place * 4
    place = tl.load(row, mask=row_exists, other=0).to(tl.int32)
    columns = tl.load(row + 1, mask=row_exists, other=0)
    entry = tl.load(row + 2, mask=row_exists, other=0) * TAPS
    channel, exists = channel_at(
        column_channels, place, row_exists & (columns > 0), column_count, x_channel_count
    )
    exists = exists & (entry >= 0) & (entry + TAPS <= weight_count)
    scales = 1.0
    shifts = 0.0
    if HAS_SCALE:
        scales = tl.load(scale + channel, mask=exists, other=0.0).to(tl.float32)
        scales = tl.expand_dims(scales, ROW_AXIS)
    if HAS_SHIFT:
        shifts = tl.load(shift + channel, mask=exists, other=0.0).to(tl.float32)
        shifts = tl.expand_dims(shifts, ROW_AXIS)
    if LARGE:
        channel = channel.to(tl.int64)
    channel_offset = tl.expand_dims(channel * x_c_stride, ROW_AXIS)

    if CHANNELS_LAST:
        total = tl.zeros((PIXELS, ROWS), tl.float32)
    else:
        total = tl.zeros((ROWS, PIXELS), tl.float32)
    for tap in range(TAPS):
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
            TRANSPOSED,
        )
        pixel_offset = image * x_n_stride + y_from * x_h_stride + x_from * x_w_stride
        here = tl.expand_dims(inside & pixel_exists, PIXEL_AXIS) & tl.expand_dims(exists, ROW_AXIS)
        values = tl.load(
            x + tl.expand_dims(pixel_offset, PIXEL_AXIS) + channel_offset, mask=here, other=0.0
        )
        if HAS_SCALE or HAS_SHIFT or RELU:
            values = prepared(values, scales, shifts, HAS_SCALE, HAS_SHIFT, RELU)
            values = tl.where(here, values, 0.0)
        weights = tl.load(weight + entry + tap, mask=exists, other=0.0).to(tl.float32)
        total += values.to(tl.float32) * tl.expand_dims(weights, ROW_AXIS)

    finish(
        total,
        bias,
        residual,
        out,
        image,
        row_y,
        row_x,
        row_channel,
        row_exists,
        pixel_exists,
        out_n_stride,
        out_c_stride,
        out_h_stride,
        out_w_stride,
        residual_n_stride,
        residual_c_stride,
        residual_h_stride,
        residual_w_stride,
        HAS_BIAS,
        HAS_RESIDUAL,
        ACTIVATION,
        CHANNELS_LAST,
        LARGE,
    )


@triton.jit
def weight_gradient_single(
    grad,
    x,
    scale,
    shift,
    partial,
    rows,
    row_channels,
    column_channels,
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
    HAS_SCALE: tl.constexpr,
    HAS_SHIFT: tl.constexpr,
    RELU: tl.constexpr,
    ONE_ROW: tl.constexpr,
    LARGE: tl.constexpr,
    ROWS: tl.constexpr,
    PIXELS: tl.constexpr,
):
    """`weight_gradient` where no row has more than one column: one tap, one split, ROWS rows."""
    ROW_AXIS: tl.constexpr = 0 if CHANNELS_LAST else 1
    PIXEL_AXIS: tl.constexpr = 1 if CHANNELS_LAST else 0
    TAPS: tl.constexpr = KERNEL_H * KERNEL_W
    row_place = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    tap = tl.program_id(1)
    split = tl.program_id(2)
    row_channel, row_exists = channel_at(
        row_channels, row_place, row_place < row_count, row_count, grad_channel_count
    )
    row = rows + row_place * 4
    place = tl.load(row, mask=row_exists, other=0).to(tl.int32)
    columns = tl.load(row + 1, mask=row_exists, other=0)
    entry = tl.load(row + 2, mask=row_exists, other=0) * TAPS + tap
    channel, exists = channel_at(
        column_channels, place, row_exists & (columns > 0), column_count, x_channel_count
    )
    scales = 1.0
    shifts = 0.0
    if HAS_SCALE:
        scales = tl.load(scale + channel, mask=exists, other=0.0).to(tl.float32)
        scales = tl.expand_dims(scales, ROW_AXIS)
    if HAS_SHIFT:
        shifts = tl.load(shift + channel, mask=exists, other=0.0).to(tl.float32)
        shifts = tl.expand_dims(shifts, ROW_AXIS)
    if LARGE:
        row_channel = row_channel.to(tl.int64)
        channel = channel.to(tl.int64)
    row_offset = tl.expand_dims(row_channel * grad_c_stride, ROW_AXIS)
    column_offset = tl.expand_dims(channel * x_c_stride, ROW_AXIS)
    channel_mask = tl.expand_dims(exists, ROW_AXIS)

    if CHANNELS_LAST:
        total = tl.zeros((PIXELS, ROWS), tl.float32)
    else:
        total = tl.zeros((ROWS, PIXELS), tl.float32)
    start = numbered(split, LARGE) * pixels_of_split
    stop = tl.minimum(start + pixels_of_split, pixel_count)
    for first_pixel in range(start, stop, PIXELS):
        image, row_y, row_x, pixel_exists = locate_pixels(
            first_pixel, stop, grad_h, grad_w, PIXELS, ONE_ROW, LARGE
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
        here = tl.expand_dims(inside & pixel_exists, PIXEL_AXIS) & channel_mask
        grads = tl.load(
            grad + tl.expand_dims(grad_offset, PIXEL_AXIS) + row_offset, mask=here, other=0.0
        )
        values = tl.load(
            x + tl.expand_dims(x_offset, PIXEL_AXIS) + column_offset, mask=here, other=0.0
        )
        if HAS_SCALE or HAS_SHIFT or RELU:
            values = prepared(values, scales, shifts, HAS_SCALE, HAS_SHIFT, RELU)
            values = tl.where(here, values, 0.0)
        total += grads.to(tl.float32) * values.to(tl.float32)
    exists = exists & (entry >= 0) & (entry < weight_count)
    sums = tl.sum(total, ROW_AXIS)
    tl.store(partial + split.to(tl.int64) * weight_count + entry, sums, mask=exists)
