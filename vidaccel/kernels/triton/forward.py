"""Block-sparse attention, one kernel for every precision and architecture.

One program owns one piece of a query block of one head and walks its list of key pieces (:mod:`.worklist`)::

    for piece in list:
        s   = q k^T                     in the inputs' dtype, int8 or fp8
        p   = online softmax            (:mod:`.softmax`)
        acc = acc + p v                 in the inputs' dtype or fp8
    out, lse = acc / total, log total

All tiles are read and written through tensor descriptors: on Hopper and later they are TMA copies, elsewhere the
compiler turns them into pipelined loads. The descriptors of Q and of the output end with the last row of the program's
own piece, so that short pieces at ragged edges neither read nor write what follows them. Inside the loop everything
else is a scalar load: with anything more, Triton 3.6 and 3.9 cannot specialise warps. Float32 inputs are multiplied as
three tf32 products, which keeps float32's precision on tensor cores.

Key pieces that a rule over tokens cuts take a branch (:mod:`.ruletables`), in which vectors are loaded, so such calls
run without specialised warps. All other pieces of the list pay for nothing but a comparison.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .softmax import largest, log_sum_exp, weights

__all__ = ["block_sparse_forward"]

#: Largest finite float8_e4m3fn: softmax weights are spread over the format's whole range.
_P_RANGE: tl.constexpr = tl.constexpr(448.0)

#: Below every score.
_LOWEST: tl.constexpr = tl.constexpr(-1e30)


@triton.jit
def block_sparse_forward(
    # tensors: q and out [B,S,H,D], k [B,S+NB,H,D], v the same or, transposed, [B,H,D,columns]; lse [B,H,S]
    q,
    k,
    v,
    out,
    lse,
    # scales, read only by the precisions that have them: [B,H,S], [B,H,S+NB], [B,H,D], [B,H,D]
    q_scale,
    k_scale,
    v_scale,
    v_mean,
    # work list, as in worklist.py
    q_start,
    q_len,
    q_block,
    k_start,
    k_len,
    k_block,
    k_aligned,
    kv_num,
    kv_index,
    order,
    bias,
    # rule over tokens, as in ruletables.py; read only with RULE
    rule_words,
    query_place,
    tile_place,
    key_bits,
    # skip: per-head threshold [H] in base-2 units, and token pairs passed over, int64 [B,H]
    threshold,
    skipped,
    # strides in elements; D is contiguous
    q_batch,
    q_row,
    q_head,
    k_batch,
    k_row,
    k_head,
    v_batch,
    v_row,
    v_head,
    out_batch,
    out_row,
    out_head,
    list_batch,
    list_head,
    # sizes
    tokens,
    keys,
    columns,
    heads,
    pieces,
    blocks,
    exact,
    list_length,
    bias_rows,
    bias_columns,
    rule_head,
    factor,
    # how
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    QK_8BIT: tl.constexpr,
    PV_FP8: tl.constexpr,
    ROWS_PER_SCALE: tl.constexpr,
    V_MEAN: tl.constexpr,
    RAGGED: tl.constexpr,
    BIAS: tl.constexpr,
    RULE: tl.constexpr,
    SKIP: tl.constexpr,
    LSE: tl.constexpr,
    FLOAT32_PRODUCT: tl.constexpr,
    WARP_SPECIALIZE: tl.constexpr,
):
    """One piece of queries of one head against its list of key pieces."""
    program = tl.load(order + tl.program_id(0))
    head = program // pieces
    piece = program % pieces
    b = (head // heads).to(tl.int64)
    h = (head % heads).to(tl.int64)
    first = tl.load(q_start + piece)
    rows = tl.load(q_len + piece)
    block = tl.load(q_block + piece)

    # Where Triton 3.6 and 3.9 specialise warps, they give the second consumer its half of the rows by adding to the row
    # coordinate's value, and a column that is the same value moves with it: in [0, 0] both are one value, in [first, 0]
    # they are two. The gate looks (coordinates.py). Elsewhere the piece's own base takes fewer registers.
    if WARP_SPECIALIZE:
        q_base = q + b * q_batch + h * q_head
        q_tile = tl.make_tensor_descriptor(q_base, [first + rows, D], [q_row, 1], [BLOCK_M, BLOCK_D])
    else:
        q_base = q + b * q_batch + h * q_head + first.to(tl.int64) * q_row
        q_tile = tl.make_tensor_descriptor(q_base, [rows, D], [q_row, 1], [BLOCK_M, BLOCK_D])
    k_tile = tl.make_tensor_descriptor(k + b * k_batch + h * k_head, [keys, D], [k_row, 1], [BLOCK_N, BLOCK_D])
    v_base = v + b * v_batch + h * v_head
    if PV_FP8:  # the tensor cores want fp8 V with the keys contiguous
        v_tile = tl.make_tensor_descriptor(v_base, [D, columns], [v_row, 1], [BLOCK_D, BLOCK_N])
    else:
        v_tile = tl.make_tensor_descriptor(v_base, [keys, D], [v_row, 1], [BLOCK_N, BLOCK_D])
    if BIAS:
        bias_tile = tl.make_tensor_descriptor(bias, [bias_rows, bias_columns], [bias_columns, 1], [1, BLOCK_N])

    row = tl.arange(0, BLOCK_M)
    column = tl.arange(0, BLOCK_N)
    factors = tl.full([BLOCK_M], factor, tl.float32)
    if QK_8BIT:
        q_scales = q_scale + head.to(tl.int64) * tokens
        factors = factors * _row_scales(q_scales, first, rows, ROWS_PER_SCALE, BLOCK_M)
    if RULE:
        words = rule_words + h * rule_head
        places = query_place + first
    # where partial blocks keep nothing of a row at first, a finite start keeps exp2(-inf - top) from being NaN
    top = tl.full([BLOCK_M], _LOWEST if RULE else float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    if SKIP:
        limit = tl.load(threshold + h)
        skips = rows * 0

    lists = b * list_batch + h * list_head + piece
    kv = kv_index + lists * list_length
    k_scales = k_scale + head.to(tl.int64) * keys
    if WARP_SPECIALIZE:  # noqa: SIM108 - two programs, not two values
        queries = q_tile.load([first, 0])
    else:
        queries = q_tile.load([0, 0])
    for i in tl.range(0, tl.load(kv_num + lists), warp_specialize=WARP_SPECIALIZE):
        kv_piece = tl.load(kv + i)
        if RULE:
            partial = kv_piece < 0
            kv_piece = tl.where(partial, -1 - kv_piece, kv_piece)
        start = tl.load(k_start + kv_piece)
        scores = tl.dot(queries, k_tile.load([start, 0]).T, input_precision=FLOAT32_PRODUCT).to(tl.float32)
        step = factors
        if QK_8BIT:
            if ROWS_PER_SCALE >= BLOCK_N:
                step = factors * tl.load(k_scales + start)
            else:
                key_scales = _row_scales(k_scales, start, tl.load(k_len + kv_piece), ROWS_PER_SCALE, BLOCK_N)
                scores = scores * key_scales[None, :]
        if BIAS:
            if BIAS == 1:  # only means have one: the rows are those of the lists, and a last row of zeros serves keys
                is_mean = kv_piece >= exact
                bias_row = tl.where(is_mean, (lists - piece) // pieces * blocks + block, bias_rows - 1).to(tl.int32)
                bias_column = tl.where(is_mean, (kv_piece - exact) * BLOCK_N, 0)
            else:  # every key and mean has one
                bias_row = head * blocks + block
                bias_column = tl.multiple_of(tl.load(k_aligned + kv_piece), 16)
            scores = scores * step[:, None] + bias_tile.load([bias_row, bias_column])
        if RAGGED:
            scores = tl.where((column < tl.load(k_len + kv_piece))[None, :], scores, float("-inf"))
        if RULE:  # noqa: SIM102 - decided while compiling, the other one while running
            if partial:
                tile = tile_place + tl.load(k_block + kv_piece)
                word = _part(words + tl.load(tile), places, row, rows)
                word |= _part(words + tl.load(tile + blocks), places + tokens, row, rows)
                word |= _part(words + tl.load(tile + 2 * blocks), places + 2 * tokens, row, rows)
                bits = tl.load(key_bits + start + column, mask=column < tl.load(k_len + kv_piece), other=0)
                scores = tl.where((word[:, None] & bits[None, :]) == bits[None, :], scores, float("-inf"))
        local = largest(scores, step, BIAS)
        new_top = tl.maximum(top, local)
        if SKIP:
            # nothing in this piece comes near any row's maximum: no exponentials, no V, no product
            nearest = tl.max(tl.where(row < rows, local - new_top, float("-inf")), 0)
            if (nearest < limit) & (kv_piece < exact):
                skips += rows * tl.load(k_len + kv_piece)
            else:
                p = weights(scores, step, new_top, BIAS)
                fade = tl.exp2(top - new_top)
                total = total * fade + tl.sum(p, 1)
                acc = _accumulate(acc * fade[:, None], p, v_tile, k_aligned, kv_piece, start, PV_FP8, FLOAT32_PRODUCT)
                top = new_top
        else:
            p = weights(scores, step, new_top, BIAS)
            fade = tl.exp2(top - new_top)
            total = total * fade + tl.sum(p, 1)
            acc = _accumulate(acc * fade[:, None], p, v_tile, k_aligned, kv_piece, start, PV_FP8, FLOAT32_PRODUCT)
            top = new_top

    acc = acc / total[:, None]
    if PV_FP8:
        channel = tl.arange(0, BLOCK_D)
        scale = tl.load(v_scale + head.to(tl.int64) * D + channel, mask=channel < D, other=0.0)
        acc = acc * (scale / _P_RANGE)[None, :]
        if V_MEAN:
            acc = acc + tl.load(v_mean + head.to(tl.int64) * D + channel, mask=channel < D, other=0.0)[None, :]
    if WARP_SPECIALIZE:
        out_base = out + b * out_batch + h * out_head
        out_tile = tl.make_tensor_descriptor(out_base, [first + rows, D], [out_row, 1], [BLOCK_M, BLOCK_D])
        out_tile.store([first, 0], acc.to(out.dtype.element_ty))
    else:
        out_base = out + b * out_batch + h * out_head + first.to(tl.int64) * out_row
        out_tile = tl.make_tensor_descriptor(out_base, [rows, D], [out_row, 1], [BLOCK_M, BLOCK_D])
        out_tile.store([0, 0], acc.to(out.dtype.element_ty))
    if LSE:
        tl.store(lse + head.to(tl.int64) * tokens + first + row, log_sum_exp(top, total), mask=row < rows)
    if SKIP:
        tl.atomic_add(skipped + head, skips.to(tl.int64))


@triton.jit
def _accumulate(acc, p, v_tile, k_aligned, kv_piece, start, PV_FP8: tl.constexpr, FLOAT32_PRODUCT: tl.constexpr):
    """acc + p v, [BLOCK_M, BLOCK_D]."""
    if PV_FP8:
        # Each product starts from zero and is added in float32: the tensor cores add fp8 products with fewer bits,
        # which over a long list would lose the small ones (SageAttention2).
        values = v_tile.load([0, tl.multiple_of(tl.load(k_aligned + kv_piece), 16)]).T
        acc = acc + tl.dot((p * _P_RANGE).to(values.dtype), values)
    else:
        values = v_tile.load([start, 0])
        acc = tl.dot(p.to(values.dtype), values, acc, input_precision=FLOAT32_PRODUCT)
    return acc


@triton.jit
def _part(words, places, row, rows):
    """Each query's part of its word for one axis, [BLOCK_M]. Looked up anew for each partial piece: to keep the places
    over the loop would cost registers that pieces without a rule need as well."""
    return tl.load(words + tl.load(places + row, mask=row < rows, other=0))


@triton.jit
def _row_scales(scales, first, rows, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Scale of each row of a piece, [BLOCK], from one scalar load for every ROWS of them; a vector load would keep
    Triton from specialising warps."""
    row = tl.arange(0, BLOCK)
    result = tl.full([BLOCK], 1.0, tl.float32) * tl.load(scales + first)
    for group in tl.static_range(1, BLOCK // ROWS):
        scale = tl.load(scales + first + tl.minimum(group * ROWS, rows - 1))
        result = tl.where(row // ROWS == group, scale, result)
    return result
