"""The steps of the Hopper kernel's consumers: products, softmax and the end of a piece, for one warpgroup's 64 rows.

The softmax is :mod:`.softmax` with tensors laid out as the tensor cores leave them.
"""

from __future__ import annotations

import math

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import warpgroup_mma

__all__ = ["finish", "issue_scores", "issue_values", "largest", "pinned", "weights", "write"]

#: log2 of the largest finite float8_e4m3fn: softmax weights are spread over the format's whole range.
_P_RANGE_LOG2 = gl.constexpr(math.log2(448.0))


@gluon.jit
def issue_scores(q, k, BLOCK_D: gl.constexpr, BLOCK_N: gl.constexpr, SCORES: gl.constexpr):
    """Starts q k^T, [64, BLOCK_N]."""
    zeros = gl.zeros([64, BLOCK_N], gl.float32, SCORES)
    return warpgroup_mma(q, k.reshape([BLOCK_N, BLOCK_D]).permute((1, 0)), zeros, use_acc=False, is_async=True)


@gluon.jit
def issue_values(p, v, acc, BLOCK_D: gl.constexpr, BLOCK_N: gl.constexpr, FP8: gl.constexpr, ACC: gl.constexpr):
    """Starts acc + p v, or for fp8 p v alone, [64, BLOCK_D]."""
    if FP8:
        zeros = gl.zeros([64, BLOCK_D], gl.float32, ACC)
        values = v.reshape([BLOCK_D, BLOCK_N]).permute((1, 0))
        product = warpgroup_mma(p, values, zeros, use_acc=False, is_async=True)
    else:
        product = warpgroup_mma(p, v.reshape([BLOCK_N, BLOCK_D]), acc, is_async=True)
    return product


@gluon.jit
def finish(
    scores,
    factors,
    kv_piece,
    exact,
    k_start,
    k_len,
    k_scales,
    bias_row,
    BLOCK_N: gl.constexpr,
    FP8: gl.constexpr,
    RAGGED: gl.constexpr,
    BIAS: gl.constexpr,
    SCORES: gl.constexpr,
):
    """Scores with keys past the piece's end at -inf, and what makes them base-2 units; biased ones are that already."""
    step = factors
    if FP8:
        step = factors * gl.load(k_scales + gl.load(k_start + kv_piece))
    column = gl.arange(0, BLOCK_N, layout=gl.SliceLayout(0, SCORES))
    if BIAS:  # only block means have one, and they come after all exact pieces
        added = gl.load(
            bias_row + (kv_piece - exact) * BLOCK_N + column, mask=(kv_piece >= exact) & (column >= 0), other=0.0
        )
        scores = scores * step[:, None] + added[None, :]
    if RAGGED:
        scores = gl.where((column < gl.load(k_len + kv_piece))[None, :], scores, float("-inf"))
    return scores, step


@gluon.jit
def largest(scores, step, BIAS: gl.constexpr):
    """Largest score of each row in base-2 units, [64]. ``step`` is positive: the maximum can be taken first."""
    most = gl.max(scores, 1)
    if not BIAS:
        most = most * step
    return most


@gluon.jit
def weights(scores, step, top, FP8: gl.constexpr, BIAS: gl.constexpr):
    """2^(score - top), for fp8 times 448: [64, BLOCK_N]."""
    if not BIAS:
        scores = scores * step[:, None]
    if FP8:
        top = top - _P_RANGE_LOG2
    return gl.exp2(scores - top[:, None])


@gluon.jit
def pinned(total):
    """``total`` [64], computed here and not later.

    The assembler would move the exponentials behind the wait for a product, where they no longer hide it. It moves
    nothing past a memory barrier; this one's condition needs every exponential and is never true.
    """
    return gl.inline_asm_elementwise(
        "{ .reg .pred %negative; setp.lt.f32 %negative, $1, 0f00000000; @%negative membar.cta; mov.b32 $0, $1; }",
        "=f,f",
        [total],
        dtype=gl.float32,
        is_pure=False,
        pack=1,
    )


@gluon.jit
def write(
    acc,
    top,
    total,
    row,
    first,
    rows,
    values_of,
    results,
    WHICH: gl.constexpr,
    D: gl.constexpr,
    BLOCK_D: gl.constexpr,
    FP8: gl.constexpr,
    V_MEAN: gl.constexpr,
    LSE: gl.constexpr,
    ACC: gl.constexpr,
):
    """Output and LSE of this warpgroup's rows of the piece. In fp8 ``total`` has the weights' 448, like ``acc``."""
    v_scale, v_mean = values_of
    out, out_row, lse = results
    acc = acc / gl.convert_layout(total, gl.SliceLayout(1, ACC))[:, None]
    if FP8:
        channel = gl.arange(0, BLOCK_D, layout=gl.SliceLayout(0, ACC))
        acc = acc * gl.load(v_scale + channel, mask=channel < D, other=0.0)[None, :]
        if V_MEAN:
            acc = acc + gl.load(v_mean + channel, mask=channel < D, other=0.0)[None, :]
    if LSE:
        value = (top + gl.log2(total)) * 0.6931471805599453
        if FP8:
            value = (top + gl.log2(total) - _P_RANGE_LOG2) * 0.6931471805599453
        gl.store(lse + first + row, value, mask=row < rows)
    # a thread writes eight neighbouring channels: 16 bytes
    WIDE: gl.constexpr = gl.BlockedLayout([1, 8], [256 // BLOCK_D, BLOCK_D // 8], [4, 1], [1, 0])
    result = gl.convert_layout(acc.to(out.dtype.element_ty), WIDE)
    line = WHICH * 64 + gl.arange(0, 64, layout=gl.SliceLayout(1, WIDE))
    channel_w = gl.arange(0, BLOCK_D, layout=gl.SliceLayout(0, WIDE))
    pointers = out + (first + line).to(gl.int64)[:, None] * out_row + channel_w[None, :]
    gl.store(pointers, result, mask=(line < rows)[:, None] & (channel_w < D)[None, :])
