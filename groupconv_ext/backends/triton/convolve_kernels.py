"""The Triton kernel of the convolution and its input gradient, and the sums where groups overlap.

A program of ``convolve`` computes one tile × ``PIXELS`` output pixels as an implicit matrix
product::

    out[row, pixel] = Σ over taps t, columns j:  W[row, j, t] · x'[channel of j, pixel moved by t]

``DEPTH`` columns of one tap at a time, accumulated in float32. The gather of the columns' channels
is a list of offsets that is added to the pointers of a load, and the scatter of the rows' channels
the same in a store, so neither costs a pass over memory. In NCHW the tile is rows × pixels with
pixels next to each other, in channels_last pixels × rows with channels next to each other.

Programs of one pixel block follow each other, so that the tiles of a pixel block find its rows of x
in the L2 cache. No atomics anywhere: equal inputs give equal bits.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .tiles import (
    WIDENED,
    channel_at,
    entries_of,
    finish,
    locate_pixels,
    moved,
    numbered,
    prepared,
    row_weights,
)

__all__ = ["collect_readers", "convolve"]


@triton.jit
def _operands(
    step,
    blocks,
    x,
    weight,
    scale,
    shift,
    column_channels,
    first_column,
    columns_here,
    column_count,
    x_channel_count,
    x_h,
    x_w,
    x_n_stride,
    x_c_stride,
    x_h_stride,
    x_w_stride,
    image,
    row_y,
    row_x,
    pixel_exists,
    row_first,
    row_columns,
    row_base,
    row_step,
    row_safe,
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
    BY_CHANNEL: tl.constexpr,
    SHARED: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_SHIFT: tl.constexpr,
    RELU: tl.constexpr,
    LARGE: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """The factors of one step, DEPTH columns under one tap, and which pairs are connected."""
    ROW_AXIS: tl.constexpr = 0 if CHANNELS_LAST else 1
    PIXEL_AXIS: tl.constexpr = 1 if CHANNELS_LAST else 0
    TAPS: tl.constexpr = KERNEL_H * KERNEL_W
    tap = step // blocks
    column_index = (step % blocks) * DEPTH + tl.arange(0, DEPTH)
    place = first_column + column_index
    channel, exists = channel_at(
        column_channels, place, column_index < columns_here, column_count, x_channel_count
    )
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
    if LARGE:
        channel_offset = channel.to(tl.int64) * x_c_stride
    else:
        channel_offset = channel * x_c_stride
    here = tl.expand_dims(inside & pixel_exists, PIXEL_AXIS) & tl.expand_dims(exists, ROW_AXIS)
    values = tl.load(
        x + tl.expand_dims(pixel_offset, PIXEL_AXIS) + tl.expand_dims(channel_offset, ROW_AXIS),
        mask=here,
        other=0.0,
    )
    if HAS_SCALE or HAS_SHIFT or RELU:
        scales = 1.0
        shifts = 0.0
        if HAS_SCALE:
            scales = tl.load(scale + channel, mask=exists, other=0.0).to(tl.float32)
            scales = tl.expand_dims(scales, ROW_AXIS)
        if HAS_SHIFT:
            shifts = tl.load(shift + channel, mask=exists, other=0.0).to(tl.float32)
            shifts = tl.expand_dims(shifts, ROW_AXIS)
        values = prepared(values, scales, shifts, HAS_SCALE, HAS_SHIFT, RELU)
        values = tl.where(here, values, 0.0)  # padding comes after the prologue

    entry, own = entries_of(
        tl.expand_dims(place, PIXEL_AXIS),
        tl.expand_dims(channel, PIXEL_AXIS),
        row_first,
        row_columns,
        row_base,
        row_step,
        BY_CHANNEL,
        SHARED,
    )
    connected = own & row_safe & tl.expand_dims(exists, PIXEL_AXIS)
    weights = tl.load(weight + entry * TAPS + tap, mask=connected, other=0.0)
    weights = weights.to(values.dtype)
    if WIDENED:
        values = values.to(tl.float32)
        weights = weights.to(tl.float32)
    return values, weights, connected


@triton.jit
def convolve(
    x,
    weight,
    bias,
    residual,
    scale,
    shift,
    coarse,
    level,
    out,
    tiles,
    rows,
    row_channels,
    column_channels,
    tile_count,
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
    level_count,
    level_n_stride,
    level_c_stride,
    level_h_stride,
    level_w_stride,
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
    BY_CHANNEL: tl.constexpr,
    SHARED: tl.constexpr,
    UNIT_STEPS: tl.constexpr,
    LARGE_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_SHIFT: tl.constexpr,
    RELU: tl.constexpr,
    HAS_LEVEL: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
    ONE_ROW: tl.constexpr,
    LARGE: tl.constexpr,
    ROWS: tl.constexpr,
    PIXELS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """A tile of rows × a block of pixels; see the top of this file."""
    # Axis along which rows and pixels are expanded, to stand as rows × pixels or the other way.
    ROW_AXIS: tl.constexpr = 0 if CHANNELS_LAST else 1
    PIXEL_AXIS: tl.constexpr = 1 if CHANNELS_LAST else 0
    TAPS: tl.constexpr = KERNEL_H * KERNEL_W

    program = numbered(tl.program_id(0), LARGE)
    pixel_block = program // tile_count
    tile = tiles + (program % tile_count) * 4
    first_row = tl.load(tile)
    rows_here = tl.load(tile + 1)
    first_column = tl.load(tile + 2)
    columns_here = tl.load(tile + 3)

    if rows_here > 0:  # a list made on the device may have room for more tiles than there are
        image, row_y, row_x, pixel_exists = locate_pixels(
            pixel_block * PIXELS, pixel_count, out_h, out_w, PIXELS, ONE_ROW, LARGE
        )
        row_index = tl.arange(0, ROWS)
        row_place = first_row + row_index
        row_channel, row_exists = channel_at(
            row_channels, row_place, row_index < rows_here, row_count, out_channel_count
        )
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
        if not LARGE_WEIGHT:
            row_base = row_base.to(tl.int32)
            row_step = row_step.to(tl.int32)
        row_first = tl.expand_dims(row_first, ROW_AXIS)
        row_columns = tl.expand_dims(row_columns, ROW_AXIS)
        row_base = tl.expand_dims(row_base, ROW_AXIS)
        if UNIT_STEPS:
            row_step = 1
        else:
            row_step = tl.expand_dims(row_step, ROW_AXIS)
        row_safe = tl.expand_dims(row_safe, ROW_AXIS)

        if CHANNELS_LAST:
            total = tl.zeros((PIXELS, ROWS), tl.float32)
        else:
            total = tl.zeros((ROWS, PIXELS), tl.float32)
        blocks = tl.cdiv(columns_here, DEPTH)
        for step in range(blocks * TAPS):
            values, weights, _ = _operands(
                step,
                blocks,
                x,
                weight,
                scale,
                shift,
                column_channels,
                first_column,
                columns_here,
                column_count,
                x_channel_count,
                x_h,
                x_w,
                x_n_stride,
                x_c_stride,
                x_h_stride,
                x_w_stride,
                image,
                row_y,
                row_x,
                pixel_exists,
                row_first,
                row_columns,
                row_base,
                row_step,
                row_safe,
                KERNEL_H,
                KERNEL_W,
                STRIDE_H,
                STRIDE_W,
                PAD_TOP,
                PAD_LEFT,
                DILATION_H,
                DILATION_W,
                TRANSPOSED,
                CHANNELS_LAST,
                BY_CHANNEL,
                SHARED,
                HAS_SCALE,
                HAS_SHIFT,
                RELU,
                LARGE,
                DEPTH,
            )
            if CHANNELS_LAST:
                total = tl.dot(values, weights, total, input_precision=PRECISION)
            else:
                total = tl.dot(weights, values, total, input_precision=PRECISION)
        if SHARED:
            # Zeros keep the groups of a tile apart, but zero times NaN or infinity does not. Where
            # any came out, the sums are made again column by column, of connected pairs alone.
            strange = (total != total) | (tl.abs(total) == float("inf"))
            if tl.max(tl.max(strange.to(tl.int32), 1), 0) > 0:
                total = total * 0
                total = tl.where(total == 0, total, 0.0)
                for step in range(columns_here * TAPS):
                    values, weights, connected = _operands(
                        step,
                        columns_here,
                        x,
                        weight,
                        scale,
                        shift,
                        column_channels,
                        first_column,
                        columns_here,
                        column_count,
                        x_channel_count,
                        x_h,
                        x_w,
                        x_n_stride,
                        x_c_stride,
                        x_h_stride,
                        x_w_stride,
                        image,
                        row_y,
                        row_x,
                        pixel_exists,
                        row_first,
                        row_columns,
                        row_base,
                        row_step,
                        row_safe,
                        KERNEL_H,
                        KERNEL_W,
                        STRIDE_H,
                        STRIDE_W,
                        PAD_TOP,
                        PAD_LEFT,
                        DILATION_H,
                        DILATION_W,
                        TRANSPOSED,
                        CHANNELS_LAST,
                        BY_CHANNEL,
                        SHARED,
                        HAS_SCALE,
                        HAS_SHIFT,
                        RELU,
                        LARGE,
                        1,
                    )
                    product = values.to(tl.float32) * weights.to(tl.float32)
                    total = tl.where(connected, total + product, total)

        row_mask = tl.expand_dims(row_exists, ROW_AXIS)
        if HAS_LEVEL:
            # The coarse level: every row sees all channels of `level` at its own pixel.
            pixel_offset = image * level_n_stride + row_y * level_h_stride + row_x * level_w_stride
            for start in range(0, level_count, DEPTH):
                channel = start + tl.arange(0, DEPTH)
                exists = channel < level_count
                values = tl.load(
                    level
                    + tl.expand_dims(pixel_offset, PIXEL_AXIS)
                    + tl.expand_dims(channel * level_c_stride, ROW_AXIS),
                    mask=tl.expand_dims(pixel_exists, PIXEL_AXIS)
                    & tl.expand_dims(exists, ROW_AXIS),
                    other=0.0,
                )
                weights = tl.load(
                    coarse
                    + tl.expand_dims(row_channel, ROW_AXIS) * level_count
                    + tl.expand_dims(channel, PIXEL_AXIS),
                    mask=row_mask & tl.expand_dims(exists, PIXEL_AXIS),
                    other=0.0,
                ).to(values.dtype)
                if WIDENED:
                    values = values.to(tl.float32)
                    weights = weights.to(tl.float32)
                if CHANNELS_LAST:
                    total = tl.dot(values, weights, total, input_precision=PRECISION)
                else:
                    total = tl.dot(weights, values, total, input_precision=PRECISION)

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
def collect_readers(
    partial,
    readers,
    out,
    channel_blocks,
    pixel_count,
    channel_count,
    reader_count,
    partial_channel_count,
    size_h,
    size_w,
    partial_n_stride,
    partial_c_stride,
    partial_h_stride,
    partial_w_stride,
    out_n_stride,
    out_c_stride,
    out_h_stride,
    out_w_stride,
    CHANNELS_LAST: tl.constexpr,
    ONE_ROW: tl.constexpr,
    LARGE: tl.constexpr,
    CHANNELS: tl.constexpr,
    PIXELS: tl.constexpr,
):
    """The input gradient where groups overlap: each channel's sums added, reader by reader."""
    CHANNEL_AXIS: tl.constexpr = 0 if CHANNELS_LAST else 1
    PIXEL_AXIS: tl.constexpr = 1 if CHANNELS_LAST else 0
    program = numbered(tl.program_id(0), LARGE)
    channel = (program % channel_blocks) * CHANNELS + tl.arange(0, CHANNELS)
    image, row_y, row_x, pixel_exists = locate_pixels(
        (program // channel_blocks) * PIXELS,
        pixel_count,
        size_h,
        size_w,
        PIXELS,
        ONE_ROW,
        LARGE,
    )
    exists = channel < channel_count
    if CHANNELS_LAST:
        total = tl.zeros((PIXELS, CHANNELS), tl.float32)
    else:
        total = tl.zeros((CHANNELS, PIXELS), tl.float32)
    pixel_offset = image * partial_n_stride + row_y * partial_h_stride + row_x * partial_w_stride
    for reader in range(reader_count):
        place = tl.load(readers + channel * reader_count + reader, mask=exists, other=-1)
        here = (place >= 0) & (place < partial_channel_count)
        if LARGE:
            place = place.to(tl.int64)
        total += tl.load(
            partial
            + tl.expand_dims(pixel_offset, PIXEL_AXIS)
            + tl.expand_dims(place * partial_c_stride, CHANNEL_AXIS),
            mask=tl.expand_dims(pixel_exists, PIXEL_AXIS) & tl.expand_dims(here, CHANNEL_AXIS),
            other=0.0,
        )
    if LARGE:
        channel = channel.to(tl.int64)
    pixel_offset = image * out_n_stride + row_y * out_h_stride + row_x * out_w_stride
    tl.store(
        out
        + tl.expand_dims(pixel_offset, PIXEL_AXIS)
        + tl.expand_dims(channel * out_c_stride, CHANNEL_AXIS),
        total.to(out.dtype.element_ty),
        mask=tl.expand_dims(pixel_exists, PIXEL_AXIS) & tl.expand_dims(exists, CHANNEL_AXIS),
    )
