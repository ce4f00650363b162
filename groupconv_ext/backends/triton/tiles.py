"""What the Triton kernels of convolutions share: places, channels, weights, the ends of a tile.

Rows, columns and tiles are those of :mod:`.planner`. What precedes a convolution (scale, shift,
ReLU of an input channel) happens on the loaded values, before zero padding; what follows (the
coarse level of a two-level convolution, bias, residual, activation) on the accumulated ones. A
weight is packed, or dense with ``BY_CHANNEL``, where only the blocks that the labels select are
read.

Nothing is trusted that a table says: channels and entries outside of their tensors are masked.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .availability import INTERPRETED

__all__ = [
    "WIDENED",
    "activated",
    "channel_at",
    "entries_of",
    "finish",
    "locate_pixels",
    "moved",
    "numbered",
    "prepared",
    "row_weights",
]

# The interpreter multiplies matrices of bfloat16 as the integers that it keeps them in.
WIDENED = tl.constexpr(INTERPRETED)


@triton.jit
def numbered(program, LARGE: tl.constexpr):
    """A program's number, in as many bits as what is counted from it takes."""
    if LARGE:
        program = program.to(tl.int64)
    return program


@triton.jit
def locate_pixels(
    first,
    count,
    size_h,
    size_w,
    BLOCK: tl.constexpr,
    ONE_ROW: tl.constexpr,
    LARGE: tl.constexpr,
):
    """Image, row and column of a run of pixels, and which of them exist.

    ``first`` has 64 bits where they are ``LARGE``, see :func:`numbered`. Images of ``ONE_ROW``
    spare a division, and the compiler can tell that pixels are neighbours.
    """
    pixel = first + tl.arange(0, BLOCK)
    exists = pixel < count
    image = pixel // (size_h * size_w)
    place = pixel - image * (size_h * size_w)
    if ONE_ROW:
        return image, image * 0, place, exists
    row = place // size_w
    return image, row, place - row * size_w, exists


@triton.jit
def moved(
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
def channel_at(channels, position, exists, length, most):
    """The channel at a position of a list, and whether there is one."""
    exists = exists & (position >= 0) & (position < length)
    channel = tl.load(channels + position, mask=exists, other=0).to(tl.int32)
    exists = exists & (channel >= 0) & (channel < most)
    return tl.where(exists, channel, 0), exists


@triton.jit
def row_weights(
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
def entries_of(
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
def prepared(
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
def activated(y, ACTIVATION: tl.constexpr):
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
def finish(
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
    total = activated(total, ACTIVATION)
    pixel = image * out_n_stride + row_y * out_h_stride + row_x * out_w_stride
    tl.store(
        out
        + tl.expand_dims(pixel, PIXEL_AXIS)
        + tl.expand_dims(channel * out_c_stride, CHANNEL_AXIS),
        total.to(out.dtype.element_ty),
        mask=written,
    )
