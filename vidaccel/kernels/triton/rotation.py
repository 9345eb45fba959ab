"""The kernel that norms, rotates and gathers the rows of q or k: what stands between a projection and attention.

One program owns a piece of the result, rows of one block, and goes through the heads, so that the rows' rotations are
read once for all heads::

    row   = order[position]                       -1: the result is a row of zeros
    x     = x[row] / sqrt(mean(x[row]^2) + eps)   over a head's channels, or over those of all heads (Wan)
    x     = x * weight
    (a,b) = (a cos - b sin, b cos + a sin)        for each pair of channels
    x     = round(x / scale)                      on request: 8 bits, as in :mod:`.quantise`

All in float32, rounded once at the end. Channels are kept as the two members of their pairs: neighbours in the
interleaved style (Wan, HunyuanVideo, CogVideoX), halves of the head in the other (LLaMA).
"""

from __future__ import annotations

import triton
import triton.language as tl

from .quantise import rounded, scale_of

__all__ = ["load_pairs", "rotate_rows", "store_pairs"]


@triton.jit
def rotate_rows(
    # x [B,S,H,D]; out [B,S',H,D]; scale float32 [B,H,S']; cos and sin [S',D], [S,D] or with D/2 columns;
    # weight [D] or [H*D]; sums float32 [B,H,NP + 1,D]
    x,
    out,
    scale,
    order,
    cos,
    sin,
    weight,
    sums,
    # first row and number of rows of each piece of the result
    starts,
    lengths,
    # strides in elements; order's are 0 where it has no batch or head axis
    x_batch,
    x_row,
    x_head,
    x_channel,
    out_batch,
    out_row,
    out_head,
    order_batch,
    order_head,
    table_row,
    length,
    heads,
    pieces,
    eps,
    # how
    D: tl.constexpr,
    HALF: tl.constexpr,
    ROWS: tl.constexpr,
    ORDER: tl.constexpr,
    ORDER_PER_HEAD: tl.constexpr,
    ROTATE: tl.constexpr,
    HALVES: tl.constexpr,
    SOURCE_TABLES: tl.constexpr,
    PAIR_TABLES: tl.constexpr,
    NORM: tl.constexpr,
    MEANS: tl.constexpr,
    ROUND: tl.constexpr,
):
    """One piece of the result in all heads, or with an order for each head in one of them.

    ``ROUND``: "no", or "int8" or "fp8" with one scale a piece and head.
    """
    piece = tl.program_id(0)
    b = tl.program_id(1).to(tl.int64)
    start = tl.load(starts + piece)
    index = tl.arange(0, ROWS)
    inside = index < tl.load(lengths + piece)
    position = (start + index).to(tl.int64)
    first_head = tl.program_id(2).to(tl.int64)  # always 0 but for an order per head
    last_head = first_head + 1 if ORDER_PER_HEAD else heads
    row = position
    real = inside
    if ORDER:
        row = tl.load(order + b * order_batch + first_head * order_head + position, mask=inside, other=-1).to(tl.int64)
        real = row >= 0
        row = tl.where(real, row, 0)
    if ROTATE:
        turn = row if SOURCE_TABLES else position
        if PAIR_TABLES:
            pair = turn[:, None] * table_row + tl.arange(0, HALF)[None, :]
            known = real[:, None] & (tl.arange(0, HALF) < D // 2)[None, :]
            c_even = tl.load(cos + pair, mask=known, other=0.0).to(tl.float32)
            s_even = tl.load(sin + pair, mask=known, other=0.0).to(tl.float32)
            c_odd = c_even
            s_odd = s_even
        else:
            c_even, c_odd = load_pairs(cos + turn * table_row, real, 1, D, HALF, ROWS, HALVES)
            s_even, s_odd = load_pairs(sin + turn * table_row, real, 1, D, HALF, ROWS, HALVES)
    x_rows = x + b * x_batch + row * x_row
    out_rows = out + b * out_batch + position * out_row
    one = tl.arange(0, 1)
    if NORM == "row":
        squares = tl.zeros([ROWS, HALF], tl.float32)
        for head in range(heads):
            even, odd = load_pairs(x_rows + (b * 0 + head) * x_head, real, x_channel, D, HALF, ROWS, HALVES)
            squares += even * even + odd * odd
        shrink = tl.rsqrt(tl.sum(squares, 1) / (heads * D) + eps)
    if NORM == "head":
        w_even, w_odd = load_pairs(weight + one, one == 0, 1, D, HALF, 1, HALVES)
    for head in range(first_head, last_head):
        wide = b * 0 + head  # in 64 bits: head times stride passes 2^31 where heads are the outer axis
        even, odd = load_pairs(x_rows + wide * x_head, real, x_channel, D, HALF, ROWS, HALVES)
        if NORM == "head":
            shrink = tl.rsqrt(tl.sum(even * even + odd * odd, 1) / D + eps)
        if NORM == "row":
            w_even, w_odd = load_pairs(weight + wide * D + one, one == 0, 1, D, HALF, 1, HALVES)
        if NORM != "none":
            even = even * shrink[:, None] * w_even
            odd = odd * shrink[:, None] * w_odd
        if ROTATE:
            turned = even * c_even - odd * s_even
            odd = odd * c_odd + even * s_odd
            even = turned
        if MEANS:
            here = sums + ((b * heads + wide) * (pieces + 1) + piece) * D + one
            store_pairs(here, one == 0, tl.sum(even, 0)[None, :], tl.sum(odd, 0)[None, :], D, HALF, 1, HALVES)
        if ROUND != "no":  # the piece is what shares a scale
            step = scale_of(tl.max(tl.max(tl.maximum(tl.abs(even), tl.abs(odd)), 1), 0), ROUND == "fp8")
            even = rounded(even, step, ROUND == "fp8")
            odd = rounded(odd, step, ROUND == "fp8")
            scales = scale + (b * heads + wide) * length + position
            tl.store(scales, tl.zeros([ROWS], tl.float32) + step, mask=inside)
        store_pairs(out_rows + wide * out_head, inside, even, odd, D, HALF, ROWS, HALVES)


@triton.jit
def load_pairs(
    rows, real, channel_stride, D: tl.constexpr, HALF: tl.constexpr, ROWS: tl.constexpr, HALVES: tl.constexpr
):
    """Both members of each channel pair of the rows at pointers ``rows`` [ROWS], float32 [ROWS, HALF] each.

    Rows that are not ``real`` and channels from D on are zeros. Offsets are taken in 64 bits: channels may be the
    outermost axis in memory.
    """
    if HALVES:
        channel = tl.arange(0, HALF)
        here = real[:, None] & (channel < D // 2)[None, :]
        a = tl.load(rows[:, None] + channel.to(tl.int64)[None, :] * channel_stride, mask=here, other=0.0)
        b = tl.load(rows[:, None] + (channel + D // 2).to(tl.int64)[None, :] * channel_stride, mask=here, other=0.0)
    else:
        channel = tl.arange(0, 2 * HALF)
        here = real[:, None] & (channel < D)[None, :]
        both = tl.load(rows[:, None] + channel.to(tl.int64)[None, :] * channel_stride, mask=here, other=0.0)
        a, b = tl.split(tl.reshape(both, [ROWS, HALF, 2]))
    return a.to(tl.float32), b.to(tl.float32)


@triton.jit
def store_pairs(rows, inside, a, b, D: tl.constexpr, HALF: tl.constexpr, ROWS: tl.constexpr, HALVES: tl.constexpr):
    """The counterpart of :func:`load_pairs`, with contiguous channels, rounding to the pointers' type."""
    kind = rows.dtype.element_ty
    if HALVES:
        channel = tl.arange(0, HALF)
        here = inside[:, None] & (channel < D // 2)[None, :]
        tl.store(rows[:, None] + channel[None, :], a.to(kind), mask=here)
        tl.store(rows[:, None] + D // 2 + channel[None, :], b.to(kind), mask=here)
    else:
        channel = tl.arange(0, 2 * HALF)
        here = inside[:, None] & (channel < D)[None, :]
        both = tl.reshape(tl.join(a.to(kind), b.to(kind)), [ROWS, 2 * HALF])
        tl.store(rows[:, None] + channel[None, :], both, mask=here)
