"""Triton kernels for weights under a learned mask: products with it, and what its parameters learn.

With D = ∂L/∂(W ⊙ M), E[n, c] = Σ over the taps of D · W, and labels that agree where M is one
(:mod:`groupconv_ext.masked`)::

    label_gradient   ∂L/∂S[c, g] = Σ E[n, c] over the filters n of group g, then the softmax's
                     Jacobian of the row; the same for the other side with rows and columns swapped
    gate_gradient    ∂L/∂g_k = Σ E[n, c] over pairs whose digits differ at k, and agree at every
                     other zero gate

E is never stored: a program makes a tile of it from D and W and reduces it at once. The mask is
never built.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["gate_gradient", "gate_labels", "label_gradient", "mask_by_labels"]


@triton.jit
def mask_by_labels(
    weight,
    in_labels,
    out_labels,
    out,
    in_channels,
    taps,
    count,
    LARGE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A dense weight where the labels of its row and column agree, zero elsewhere."""
    place = tl.program_id(0)
    if LARGE:
        place = place.to(tl.int64)
    place = place * BLOCK + tl.arange(0, BLOCK)
    exists = place < count
    connection = place // taps
    row = tl.load(out_labels + connection // in_channels, mask=exists, other=0)
    column = tl.load(in_labels + connection % in_channels, mask=exists, other=1)
    values = tl.load(weight + place, mask=exists & (row == column), other=0.0)
    tl.store(out + place, values, mask=exists)


@triton.jit
def _products(grad, weight, offsets, exists, TAPS: tl.constexpr):
    """E at a tile of connections: the sum over their taps of D · W, float32."""
    total = tl.zeros(offsets.shape, tl.float32)
    for tap in range(TAPS):
        d = tl.load(grad + offsets + tap, mask=exists, other=0.0).to(tl.float32)
        w = tl.load(weight + offsets + tap, mask=exists, other=0.0).to(tl.float32)
        total += d * w
    return total


@triton.jit
def label_gradient(
    grad,
    weight,
    logits,
    row_labels,
    column_labels,
    out,
    row_count,
    column_count,
    groups,
    row_stride,
    column_stride,
    TAPS: tl.constexpr,
    WINNER: tl.constexpr,
    LARGE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    GROUPS: tl.constexpr,
):
    """What the logits of one side learn: ROWS channels of it, all channels of the other."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row_exists = row < row_count
    group = tl.arange(0, GROUPS)
    group_exists = group < groups
    row_offset = row.to(tl.int64) * row_stride if LARGE else row * row_stride

    sums = tl.zeros((ROWS, GROUPS), tl.float32)
    for start in range(0, column_count, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        exists = column < column_count
        offset = column.to(tl.int64) * column_stride if LARGE else column * column_stride
        both = row_exists[:, None] & exists[None, :]
        products = _products(grad, weight, row_offset[:, None] + offset[None, :], both, TAPS)
        label = tl.load(column_labels + column, mask=exists, other=-1)
        chosen = (label[:, None] == group[None, :]).to(tl.float32)
        sums = tl.dot(products, chosen, sums, input_precision="ieee")

    if WINNER:
        own = tl.load(row_labels + row, mask=row_exists, other=-1)
        sums = tl.where(own[:, None] == group[None, :], sums, 0.0)
    both = row_exists[:, None] & group_exists[None, :]
    place = row[:, None] * groups + group[None, :]
    scores = tl.load(logits + place, mask=both, other=0.0).to(tl.float32)
    scores = tl.where(group_exists[None, :], scores, float("-inf"))
    scores = tl.exp(scores - tl.max(scores, 1)[:, None])
    soft = scores / tl.sum(scores, 1)[:, None]
    learned = soft * (sums - tl.sum(soft * sums, 1)[:, None])
    tl.store(out + place, learned.to(out.dtype.element_ty), mask=both)


@triton.jit
def gate_labels(
    gates,
    digits,
    out,
    count,
    SIDE: tl.constexpr,
    GATES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The label of every channel of a side: its digits at the zero gates, read as a number.

    ``digits`` has a row for each gate: its radix, and the stride of its digit on either side.
    """
    channel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    label = channel * 0
    for gate in range(GATES):
        radix = tl.load(digits + gate * 3)
        digit = (channel // tl.load(digits + gate * 3 + 1 + SIDE)) % radix
        is_zero = tl.load(gates + gate) < 0
        label = tl.where(is_zero, label * radix + digit, label)
    tl.store(out + channel, label, mask=channel < count)


@triton.jit
def gate_gradient(
    grad,
    weight,
    gates,
    digits,
    partial,
    out_channels,
    in_channels,
    column_blocks,
    TAPS: tl.constexpr,
    GATES: tl.constexpr,
    LARGE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """A tile of E, and what it adds to every gate's gradient; another pass adds the tiles."""
    program = tl.program_id(0)
    row = (program // column_blocks) * ROWS + tl.arange(0, ROWS)
    column = (program % column_blocks) * COLUMNS + tl.arange(0, COLUMNS)
    exists = (row < out_channels)[:, None] & (column < in_channels)[None, :]
    row_offset = row.to(tl.int64) if LARGE else row
    offsets = (row_offset[:, None] * in_channels + column[None, :]) * TAPS
    products = _products(grad, weight, offsets, exists, TAPS)

    apart = tl.zeros((ROWS, COLUMNS), tl.int32)  # at how many zero gates the digits differ
    for gate in range(GATES):
        radix = tl.load(digits + gate * 3)
        mine = (column // tl.load(digits + gate * 3 + 1)) % radix
        theirs = (row // tl.load(digits + gate * 3 + 2)) % radix
        differ = (theirs[:, None] != mine[None, :]).to(tl.int32)
        apart += tl.where(tl.load(gates + gate) < 0, differ, 0)
    for gate in range(GATES):
        radix = tl.load(digits + gate * 3)
        mine = (column // tl.load(digits + gate * 3 + 1)) % radix
        theirs = (row // tl.load(digits + gate * 3 + 2)) % radix
        differ = theirs[:, None] != mine[None, :]
        own = tl.where(tl.load(gates + gate) < 0, 1, 0)
        counted = tl.where(differ & (apart == own), products, 0.0)
        tl.store(partial + program * GATES + gate, tl.sum(tl.sum(counted, 1), 0))
