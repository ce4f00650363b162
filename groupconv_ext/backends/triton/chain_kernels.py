"""The Triton kernel of a chain of pointwise stages: a block of pixels through all of them at once.

Triton has no shared memory that a program could index, and a permutation between two stages needs
one. So a program owns a strip of ordinary memory, two halves of widest × ``PIXELS`` elements, which
it uses again for every block of pixels that it takes: so much stays in the L2 cache, whatever the
size of the images. A stage writes one half and the next reads it, channels in any order and their
pixels next to each other, with a barrier of the program's threads in between::

    x → half 0 → half 1 → half 0 → … → y

What lies between two stages is rounded to the type of x, as if it had been a tensor. A stage is a
run of tiles (:mod:`.planner`), each rows × ``PIXELS`` as a matrix product, like those of
:mod:`.convolve_kernels`. Weights and tables of the stages follow each other in memory. No atomics:
equal inputs give equal bits.
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
    numbered,
    row_weights,
)

__all__ = ["chain"]


@triton.jit
def _stage_at(table, position, table_count, weight_count):
    """The header of the stage that begins at a position: its lists, empty where they do not fit."""
    whole = position + 5 <= table_count
    length = tl.load(table + position, mask=whole, other=0)
    tile_count = tl.load(table + position + 1, mask=whole, other=0)
    row_count = tl.load(table + position + 2, mask=whole, other=0)
    column_count = tl.load(table + position + 3, mask=whole, other=0)
    entries = tl.load(table + position + 4, mask=whole, other=0)
    least = tl.minimum(tl.minimum(tile_count, row_count), tl.minimum(column_count, entries))
    most = tl.maximum(tl.maximum(tile_count, row_count), tl.maximum(column_count, length))
    sound = whole & (least >= 0) & (most <= table_count - position) & (entries <= weight_count)
    sound = sound & (5 + tile_count * 4 + row_count * 5 + column_count == length)
    return (
        tl.where(sound, length, 0).to(tl.int32),
        tl.where(sound, tile_count, 0).to(tl.int32),
        tl.where(sound, row_count, 0).to(tl.int32),
        tl.where(sound, column_count, 0).to(tl.int32),
        tl.where(sound, entries, 0).to(tl.int32),
    )


@triton.jit
def _factors(
    step,
    source,
    source_offset,
    source_stride,
    source_exists,
    source_channels,
    weight,
    columns,
    column_count,
    first_column,
    columns_here,
    row_first,
    row_columns,
    row_base,
    row_step,
    row_safe,
    SHARED: tl.constexpr,
    LARGE: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """Weights and values of a step, DEPTH columns, and which pairs of them are connected."""
    index = step * DEPTH + tl.arange(0, DEPTH)
    place = first_column + index
    channel, exists = channel_at(
        columns, place, index < columns_here, column_count, source_channels
    )
    if LARGE:
        channel_offset = channel.to(tl.int64) * source_stride
    else:
        channel_offset = channel * source_stride
    values = tl.load(
        source + channel_offset[:, None] + source_offset[None, :],
        mask=exists[:, None] & source_exists[None, :],
        other=0.0,
    )
    entry, own = entries_of(
        place[None, :],
        channel[None, :],
        row_first,
        row_columns,
        row_base,
        row_step,
        False,
        SHARED,
    )
    connected = own & row_safe & exists[None, :]
    weights = tl.load(weight + entry, mask=connected, other=0.0)
    return weights, values, connected


@triton.jit
def chain(
    x,
    weight,
    bias,
    table,
    scratch,
    out,
    table_count,
    weight_count,
    pixel_count,
    x_channel_count,
    out_channel_count,
    widest,
    size_h,
    size_w,
    x_n_stride,
    x_c_stride,
    x_h_stride,
    x_w_stride,
    out_n_stride,
    out_c_stride,
    out_h_stride,
    out_w_stride,
    STAGES: tl.constexpr,
    SHARED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
    ONE_ROW: tl.constexpr,
    LARGE: tl.constexpr,
    ROWS: tl.constexpr,
    PIXELS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """Blocks of pixels, each through all stages; see the top of this file."""
    program = numbered(tl.program_id(0), LARGE)
    pixel = tl.arange(0, PIXELS)
    row_index = tl.arange(0, ROWS)
    own_scratch = scratch + program.to(tl.int64) * 2 * widest * PIXELS
    for block in range(program, tl.cdiv(pixel_count, PIXELS), tl.num_programs(0)):
        image, row_y, row_x, pixel_exists = locate_pixels(
            block * PIXELS, pixel_count, size_h, size_w, PIXELS, ONE_ROW, LARGE
        )
        position = 0
        first_entry = 0
        for s in tl.static_range(STAGES):
            length, tile_count, row_count, column_count, entries = _stage_at(
                table, position, table_count, weight_count - first_entry
            )
            tiles = table + position + 5
            rows = tiles + tile_count * 4
            row_channels = rows + row_count * 4
            columns = row_channels + row_count
            own_weight = weight + first_entry
            if s == 0:
                source = x
                source_offset = image * x_n_stride + row_y * x_h_stride + row_x * x_w_stride
                source_stride = x_c_stride
                source_exists = pixel_exists
                source_channels = x_channel_count
            else:
                source = own_scratch + (s - 1) % 2 * widest * PIXELS
                source_offset = pixel
                source_stride = PIXELS
                source_exists = pixel >= 0
                source_channels = widest
            for t in range(tile_count):
                first_row = tl.load(tiles + t * 4).to(tl.int32)
                rows_here = tl.load(tiles + t * 4 + 1).to(tl.int32)
                first_column = tl.load(tiles + t * 4 + 2).to(tl.int32)
                columns_here = tl.load(tiles + t * 4 + 3).to(tl.int32)
                columns_here = tl.minimum(columns_here, column_count)
                row_place = first_row + row_index
                row_channel, row_exists = channel_at(
                    row_channels,
                    row_place,
                    row_index < rows_here,
                    row_count,
                    out_channel_count if s == STAGES - 1 else widest,
                )
                row_first, row_columns, row_base, row_step, row_safe = row_weights(
                    rows,
                    row_place,
                    row_exists,
                    first_column,
                    columns_here,
                    entries,
                    source_channels,
                    1,
                    False,
                    SHARED,
                )
                row_first = row_first[:, None]
                row_columns = row_columns[:, None]
                row_base = row_base.to(tl.int32)[:, None]
                row_step = row_step.to(tl.int32)[:, None]
                row_safe = row_safe[:, None]
                total = tl.zeros((ROWS, PIXELS), tl.float32)
                for step in range(tl.cdiv(columns_here, DEPTH)):
                    weights, values, _ = _factors(
                        step,
                        source,
                        source_offset,
                        source_stride,
                        source_exists,
                        source_channels,
                        own_weight,
                        columns,
                        column_count,
                        first_column,
                        columns_here,
                        row_first,
                        row_columns,
                        row_base,
                        row_step,
                        row_safe,
                        SHARED,
                        LARGE,
                        DEPTH,
                    )
                    if WIDENED:
                        weights = weights.to(tl.float32)
                        values = values.to(tl.float32)
                    total = tl.dot(weights, values, total, input_precision=PRECISION)
                if SHARED:
                    # Zeros keep the groups of a tile apart, but zero times NaN or infinity does
                    # not. Where any came out, the sums are made again of connected pairs alone.
                    strange = (total != total) | (tl.abs(total) == float("inf"))
                    if tl.max(tl.max(strange.to(tl.int32), 1), 0) > 0:
                        total = tl.where(strange, 0.0, total * 0)
                        for step in range(columns_here):
                            weights, values, connected = _factors(
                                step,
                                source,
                                source_offset,
                                source_stride,
                                source_exists,
                                source_channels,
                                own_weight,
                                columns,
                                column_count,
                                first_column,
                                columns_here,
                                row_first,
                                row_columns,
                                row_base,
                                row_step,
                                row_safe,
                                SHARED,
                                LARGE,
                                1,
                            )
                            product = values.to(tl.float32) * weights.to(tl.float32)
                            total = tl.where(connected, total + product, total)
                if s == STAGES - 1:
                    finish(
                        total,
                        bias,
                        out,
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
                        out_n_stride,
                        out_c_stride,
                        out_h_stride,
                        out_w_stride,
                        HAS_BIAS,
                        False,
                        ACTIVATION,
                        False,
                        LARGE,
                    )
                else:
                    tl.store(
                        own_scratch
                        + s % 2 * widest * PIXELS
                        + row_channel[:, None] * PIXELS
                        + pixel[None, :],
                        total.to(scratch.dtype.element_ty),
                        mask=row_exists[:, None],
                    )
            # For the next stage to read what this one wrote, and for that which writes the half
            # that this one has read.
            tl.debug_barrier()
            position += length
            first_entry += entries
