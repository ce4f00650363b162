"""The Triton kernels: one for the convolution and its input gradient, one for weight gradients.

Rows, columns and tiles are those of :mod:`.planner`. A program of ``convolve`` computes one tile ×
``PIXELS`` output pixels as an implicit matrix product::

    out[row, pixel] = Σ over taps t, columns j:  W[row, j, t] · x'[channel of j, pixel moved by t]

``DEPTH`` columns of one tap at a time, accumulated in float32. The gather of the columns' channels
is a list of offsets that is added to the pointers of a load, and the scatter of the rows' channels
the same in a store, so neither costs a pass over memory. In NCHW the tile is rows × pixels with
pixels next to each other, in channels_last pixels × rows with channels next to each other.

What precedes (scale, shift, ReLU of an input channel) happens on the loaded values, before zero
padding; what follows (the coarse level of a two-level convolution, bias, residual, activation) on
the accumulated ones. A weight is packed, or dense with ``BY_CHANNEL``, where only the blocks that
the labels select are read.

Nothing is trusted that a table says: channels and entries outside of their tensors are masked.

Programs of one pixel block follow each other, so that the tiles of a pixel block find its rows of x
in the L2 cache. No atomics anywhere: equal inputs give equal bits.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .availability import INTERPRETED

__all__ = [
    "collect_readers",
    "convolve",
    "convolve_single",
    "weight_gradient",
    "weight_gradient_single",
]

# The interpreter multiplies matrices of bfloat16 as the integers that it keeps them in.
_WIDENED = tl.constexpr(INTERPRETED)


@triton.jit
def _pixels(
    first,
    count,
    size_h,
    size_w,
    BLOCK: tl.constexpr,
    ONE_ROW: tl.constexpr,
    LARGE: tl.constexpr,
):
    """Image, row and column of a run of pixels, and which of them exist.

    Images of ``ONE_ROW`` spare a division, and the compiler can tell that pixels are neighbours.
    """
    pixel = first + tl.arange(0, BLOCK)
    exists = pixel < count
    if LARGE:
        pixel = pixel.to(tl.int64)
    image = pixel // (size_h * size_w)
    place = pixel - image * (size_h * size_w)
    if ONE_ROW:
        return image, image * 0, place, exists
    row = place // size_w
    return image, row, place - row * size_w, exists


@triton.jit
def _moved(
    row,
    column,
    tap,
    size_h,
    size_w,
    TAPS: tl.constexpr,
    KERNEL_W: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    PAD_TOP: tl.constexpr,
    PAD_LEFT: tl.constexpr,
    DILATION_H: tl.constexpr,
    DILATION_W: tl.constexpr,
    TRANSPOSED: tl.constexpr,
):
    """Where a tap of the window reads for an output pixel, and whether that is in the image.

    Transposed the other way round: which output pixel a tap took an input pixel to.
    """
    # A window of one tap without padding never leaves the image, and contiguous runs of pixels stay
    # what they are, for the compiler to load as vectors.
    POINTWISE: tl.constexpr = PAD_TOP == 0 and PAD_LEFT == 0 and TAPS == 1
    if POINTWISE and not TRANSPOSED:
        return row * STRIDE_H, column * STRIDE_W, row >= 0
    if POINTWISE and STRIDE_H == 1 and STRIDE_W == 1:
        return row, column, row >= 0
    down = (tap // KERNEL_W) * DILATION_H - PAD_TOP
    across = (tap % KERNEL_W) * DILATION_W - PAD_LEFT
    if TRANSPOSED:
        row = row - down
        column = column - across
        inside = (row >= 0) & (column >= 0)
        if STRIDE_H > 1:
            inside = inside & (row % STRIDE_H == 0)
        if STRIDE_W > 1:
            inside = inside & (column % STRIDE_W == 0)
        row = row // STRIDE_H
        column = column // STRIDE_W
    else:
        row = row * STRIDE_H + down
        column = column * STRIDE_W + across
        inside = (row >= 0) & (column >= 0)
    return row, column, inside & (row < size_h) & (column < size_w)


@triton.jit
def _channel(channels, position, exists, length, most):
    """The channel at a position of a list, and whether there is one."""
    exists = exists & (position >= 0) & (position < length)
    channel = tl.load(channels + position, mask=exists, other=0).to(tl.int32)
    exists = exists & (channel >= 0) & (channel < most)
    return tl.where(exists, channel, 0), exists


@triton.jit
def _row_weights(
    rows,
    place,
    exists,
    first_column,
    columns_here,
    weight_count,
    x_channel_count,
    TAPS: tl.constexpr,
    BY_CHANNEL: tl.constexpr,
    SHARED: tl.constexpr,
):
    """Where the weights of rows lie, entry ``base + place * step``, and the columns of each.

    One look at the ends of a row's entries makes sure that all of them are inside of the weight.
    """
    row = rows + place * 4
    first = tl.load(row, mask=exists, other=0)
    columns = tl.load(row + 1, mask=exists, other=0)
    base = tl.load(row + 2, mask=exists, other=0)
    step = tl.load(row + 3, mask=exists, other=0)
    if BY_CHANNEL:
        least = base
        most = base + (x_channel_count - 1) * step
    else:
        base = base - first * step
        if SHARED:
            least = base + first * step
            most = least + (columns - 1) * step
        else:
            least = base + first_column * step
            most = least + (columns_here - 1) * step
    safe = (least >= 0) & (step >= 0) & (step <= weight_count) & ((most + 1) * TAPS <= weight_count)
    return first.to(tl.int32), columns.to(tl.int32), base, step, exists & safe


@triton.jit
def _entries(
    place, channel, first, columns, base, step, BY_CHANNEL: tl.constexpr, SHARED: tl.constexpr
):
    """The entries of rows at columns, and which columns are the row's own; operands broadcast."""
    if BY_CHANNEL:
        entry = base + channel * step
    else:
        entry = base + place * step
    own = place >= 0
    if SHARED:
        own = (place >= first) & (place < first + columns)
    return entry, own


@triton.jit
def _prepared(
    x,
    scale,
    shift,
    HAS_SCALE: tl.constexpr,
    HAS_SHIFT: tl.constexpr,
    RELU: tl.constexpr,
):
    """The prologue, act(x · scale + shift), in float32 and rounded once."""
    if HAS_SCALE or HAS_SHIFT or RELU:
        wide = x.to(tl.float32)
        if HAS_SCALE:
            wide = wide * scale
        if HAS_SHIFT:
            wide = wide + shift
        if RELU:
            wide = tl.where(wide < 0, 0.0, wide)  # NaN stays
        x = wide.to(x.dtype)
    return x


@triton.jit
def _activated(y, ACTIVATION: tl.constexpr):
    """The activation of this code; NaN stays NaN in each."""
    if ACTIVATION == 1 or ACTIVATION == 2:
        y = tl.where(y < 0, 0.0, y)
    if ACTIVATION == 2:
        y = tl.where(y > 6, 6.0, y)
    if ACTIVATION == 3:
        y = y / (1 + tl.exp(-y))
    if ACTIVATION == 4:
        gate = y + 3
        gate = tl.where(gate < 0, 0.0, gate)
        y = y * tl.where(gate > 6, 6.0, gate) / 6
    return y


@triton.jit
def _finish(
    total,
    bias,
    residual,
    out,
    image,
    row_y,
    row_x,
    channel,
    channel_exists,
    pixel_exists,
    out_n_stride,
    out_c_stride,
    out_h_stride,
    out_w_stride,
    residual_n_stride,
    residual_c_stride,
    residual_h_stride,
    residual_w_stride,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    ACTIVATION: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    LARGE: tl.constexpr,
):
    """The epilogue, act(total + bias + residual), and the scatter of the channels."""
    CHANNEL_AXIS: tl.constexpr = 0 if CHANNELS_LAST else 1
    PIXEL_AXIS: tl.constexpr = 1 if CHANNELS_LAST else 0
    if HAS_BIAS:
        added = tl.load(bias + channel, mask=channel_exists, other=0.0).to(tl.float32)
        total = total + tl.expand_dims(added, CHANNEL_AXIS)
    if LARGE:
        channel = channel.to(tl.int64)
    written = tl.expand_dims(pixel_exists, PIXEL_AXIS) & tl.expand_dims(
        channel_exists, CHANNEL_AXIS
    )
    if HAS_RESIDUAL:
        pixel = image * residual_n_stride + row_y * residual_h_stride + row_x * residual_w_stride
        added = tl.load(
            residual
            + tl.expand_dims(pixel, PIXEL_AXIS)
            + tl.expand_dims(channel * residual_c_stride, CHANNEL_AXIS),
            mask=written,
            other=0.0,
        )
        total = total + added.to(tl.float32)
    total = _activated(total, ACTIVATION)
    pixel = image * out_n_stride + row_y * out_h_stride + row_x * out_w_stride
    tl.store(
        out
        + tl.expand_dims(pixel, PIXEL_AXIS)
        + tl.expand_dims(channel * out_c_stride, CHANNEL_AXIS),
        total.to(out.dtype.element_ty),
        mask=written,
    )


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
    channel, exists = _channel(
        column_channels, place, column_index < columns_here, column_count, x_channel_count
    )
    y_from, x_from, inside = _moved(
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
        values = _prepared(values, scales, shifts, HAS_SCALE, HAS_SHIFT, RELU)
        values = tl.where(here, values, 0.0)  # padding comes after the prologue

    entry, own = _entries(
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
    if _WIDENED:
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

    program = tl.program_id(0)
    pixel_block = program // tile_count
    tile = tiles + (program % tile_count) * 4
    first_row = tl.load(tile)
    rows_here = tl.load(tile + 1)
    first_column = tl.load(tile + 2)
    columns_here = tl.load(tile + 3)

    if rows_here > 0:  # a list made on the device may have room for more tiles than there are
        image, row_y, row_x, pixel_exists = _pixels(
            pixel_block * PIXELS, pixel_count, out_h, out_w, PIXELS, ONE_ROW, LARGE
        )
        row_index = tl.arange(0, ROWS)
        row_place = first_row + row_index
        row_channel, row_exists = _channel(
            row_channels, row_place, row_index < rows_here, row_count, out_channel_count
        )
        row_first, row_columns, row_base, row_step, row_safe = _row_weights(
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
                if _WIDENED:
                    values = values.to(tl.float32)
                    weights = weights.to(tl.float32)
                if CHANNELS_LAST:
                    total = tl.dot(values, weights, total, input_precision=PRECISION)
                else:
                    total = tl.dot(weights, values, total, input_precision=PRECISION)

        _finish(
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

    program = tl.program_id(0)
    pixel_block = program // row_blocks
    row_place = (program % row_blocks) * ROWS + tl.arange(0, ROWS)
    image, row_y, row_x, pixel_exists = _pixels(
        pixel_block * PIXELS, pixel_count, out_h, out_w, PIXELS, ONE_ROW, LARGE
    )
    row_channel, row_exists = _channel(
        row_channels, row_place, row_place < row_count, row_count, out_channel_count
    )
    row = rows + row_place * 4
    place = tl.load(row, mask=row_exists, other=0).to(tl.int32)
    columns = tl.load(row + 1, mask=row_exists, other=0)
    entry = tl.load(row + 2, mask=row_exists, other=0) * TAPS
    channel, exists = _channel(
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
        y_from, x_from, inside = _moved(
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
            values = _prepared(values, scales, shifts, HAS_SCALE, HAS_SHIFT, RELU)
            values = tl.where(here, values, 0.0)
        weights = tl.load(weight + entry + tap, mask=exists, other=0.0).to(tl.float32)
        total += values.to(tl.float32) * tl.expand_dims(weights, ROW_AXIS)

    _finish(
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
        row_channel, row_exists = _channel(
            row_channels, row_place, row_index < rows_here, row_count, grad_channel_count
        )
        column_index = column_start + tl.arange(0, COLUMNS)
        place = first_column + column_index
        channel, exists = _channel(
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
        start = split * pixels_of_split
        stop = tl.minimum(start + pixels_of_split, pixel_count)
        for first_pixel in range(start, stop, DEPTH):
            image, row_y, row_x, pixel_exists = _pixels(
                first_pixel, stop, grad_h, grad_w, DEPTH, ONE_ROW, LARGE
            )
            grad_offset = image * grad_n_stride + row_y * grad_h_stride + row_x * grad_w_stride
            y_from, x_from, inside = _moved(
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
                values = _prepared(values, scales, shifts, HAS_SCALE, HAS_SHIFT, RELU)
                values = tl.where(inside[:, None] & exists[None, :], values, 0.0)
            if _WIDENED:
                grads = grads.to(tl.float32)
                values = values.to(tl.float32)
            total = tl.dot(grads, values, total, input_precision=PRECISION)

        row_first, row_columns, row_base, row_step, row_safe = _row_weights(
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
        entry, own = _entries(
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
    row_channel, row_exists = _channel(
        row_channels, row_place, row_place < row_count, row_count, grad_channel_count
    )
    row = rows + row_place * 4
    place = tl.load(row, mask=row_exists, other=0).to(tl.int32)
    columns = tl.load(row + 1, mask=row_exists, other=0)
    entry = tl.load(row + 2, mask=row_exists, other=0) * TAPS + tap
    channel, exists = _channel(
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
    start = split * pixels_of_split
    stop = tl.minimum(start + pixels_of_split, pixel_count)
    for first_pixel in range(start, stop, PIXELS):
        image, row_y, row_x, pixel_exists = _pixels(
            first_pixel, stop, grad_h, grad_w, PIXELS, ONE_ROW, LARGE
        )
        grad_offset = image * grad_n_stride + row_y * grad_h_stride + row_x * grad_w_stride
        y_from, x_from, inside = _moved(
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
            values = _prepared(values, scales, shifts, HAS_SCALE, HAS_SHIFT, RELU)
            values = tl.where(here, values, 0.0)
        total += grads.to(tl.float32) * values.to(tl.float32)
    exists = exists & (entry >= 0) & (entry < weight_count)
    sums = tl.sum(total, ROW_AXIS)
    tl.store(partial + split.to(tl.int64) * weight_count + entry, sums, mask=exists)


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
    program = tl.program_id(0)
    channel = (program % channel_blocks) * CHANNELS + tl.arange(0, CHANNELS)
    image, row_y, row_x, pixel_exists = _pixels(
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
