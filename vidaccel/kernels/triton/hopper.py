"""Block-sparse attention for Hopper (sm_90) in Gluon: what :mod:`.forward` computes, with the warps told what to do.

A program owns one query piece of up to 128 rows. One warp is the *producer*: it copies tiles with TMA and does nothing
else. Two warpgroups are *consumers*, each with 64 of the rows and the whole key list. A consumer issues the next
piece's q k^T before this piece's p v, so that the tensor cores work while it computes exponentials (FlashAttention-3's
overlap within a warpgroup)::

    s = q k0^T;  p = softmax(s)
    for piece in the rest of the list:
        issue s = q k^T (this piece), issue acc += p v (the piece before)
        wait for s;   p' = softmax(s)
        wait for acc; acc = acc * fade;  p = p'
    acc += p v (the last piece)

How they meet (mbarriers; ``k_ready, k_free, v_ready, v_free`` exist once per stage, piece i uses stage i % STAGES):

- *ready* counts one arrival, the producer's ``expect``; its phase ends when the announced bytes have come as well.
- *free* counts two arrivals, one of each consumer, made after its last product from that stage has been waited for.
- For piece i consumers wait for parity (i // STAGES) & 1 of *ready*, the producer for the opposite parity of *free*: on
  a fresh barrier that returns at once, so the first STAGES pieces wait for no consumer. Nobody can be a whole phase
  behind, because the producer only goes on once both consumers have.
- The producer copies k0 v0 k1 v1 ...; the consumers use k0 (k1 v0) (k2 v1) ... v_last, in fp8 k0 (v0 k1) (v1 k2) ...
  Who waits for k_i and v_(i-1) has freed all up to k_(i-1) and v_(i-2); the copies up to k_i need no more than
  k_(i-STAGES) and v_(i-1-STAGES) freed. So with one stage or more no list, of one piece or many, ends in a deadlock.
- Lists are never empty (:class:`vidaccel.blockmask.BlockMask`), and all that is copied is waited for before the end.

In fp8 each product starts from zero and is added in float32 (SageAttention2). That third accumulator leaves no
registers for two products on their way, so there a consumer waits for each, and its exponentials hide behind the other
consumer's products.

The host makes one descriptor for each whole tensor: rows of a tile past its piece's end belong to the neighbour, or are
zeros past the tensor's end. Keys among them are masked, queries among them are not written.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma_wait,
)

from .hopper_steps import finish, issue_scores, issue_values, largest, pinned, weights, write

__all__ = ["block_sparse_forward_hopper"]

#: Triton 3.9 renamed it.
_load_tile = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared


@gluon.jit
def block_sparse_forward_hopper(
    # tile descriptors: q [B,H,S,D], k [B,H,S',D], v the same or, transposed, [1,1,B*H*D,columns]
    q_tile,
    k_tile,
    v_tile,
    # tensors: out [B,S,H,D], lse [B,H,S]
    out,
    lse,
    # scales, read only by fp8: [B,H,S], [B,H,S'], [B,H,D], [B,H,D]
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
    k_aligned,
    kv_num,
    kv_index,
    order,
    bias,
    # strides in elements
    out_batch,
    out_row,
    out_head,
    list_batch,
    list_head,
    # sizes
    tokens,
    keys,
    heads,
    pieces,
    blocks,
    exact,
    list_length,
    bias_columns,
    factor,
    # how
    D: gl.constexpr,
    BLOCK_D: gl.constexpr,
    BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr,
    FP8: gl.constexpr,
    V_MEAN: gl.constexpr,
    RAGGED: gl.constexpr,
    BIAS: gl.constexpr,
    LSE: gl.constexpr,
):
    """One piece of queries of one head against its list of key pieces."""
    program = gl.load(order + gl.program_id(0))
    head = program // pieces
    piece = program % pieces
    b = head // heads
    h = head % heads
    first = gl.load(q_start + piece)
    rows = gl.load(q_len + piece)
    lists = b * list_batch + h * list_head + piece
    kv = kv_index + lists.to(gl.int64) * list_length
    count = gl.load(kv_num + lists)
    bias_row = bias
    if BIAS:
        bias_row = bias + ((lists - piece) // pieces * blocks + gl.load(q_block + piece)).to(gl.int64) * bias_columns

    q_room = gl.allocate_shared_memory(q_tile.dtype, [2] + q_tile.block_type.shape, q_tile.layout)  # noqa: RUF005
    k_room = gl.allocate_shared_memory(k_tile.dtype, [STAGES] + k_tile.block_type.shape, k_tile.layout)  # noqa: RUF005
    v_room = gl.allocate_shared_memory(v_tile.dtype, [STAGES] + v_tile.block_type.shape, v_tile.layout)  # noqa: RUF005
    q_ready = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    k_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    mbarrier.init(q_ready, count=1)
    for stage in gl.static_range(STAGES):
        mbarrier.init(k_ready.index(stage), count=1)
        mbarrier.init(k_free.index(stage), count=2)
        mbarrier.init(v_ready.index(stage), count=1)
        mbarrier.init(v_free.index(stage), count=2)
    fence_async_shared()  # TMA must see the barriers initialised

    rooms = (q_room, k_room, v_room)
    barriers = (q_ready, k_ready, k_free, v_ready, v_free)
    scores_of = (k_len, k_scale + head.to(gl.int64) * keys, bias_row, q_scale + head.to(gl.int64) * tokens)
    values_of = (v_scale + head.to(gl.int64) * D, v_mean + head.to(gl.int64) * D)
    base = out + b.to(gl.int64) * out_batch + h.to(gl.int64) * out_head
    results = (base, out_row, lse + head.to(gl.int64) * tokens)
    place = (first, rows, kv, count, exact, factor, k_start)
    gl.warp_specialize(
        [
            (
                _consumer,
                (
                    gl.constexpr(0),
                    rooms,
                    barriers,
                    scores_of,
                    values_of,
                    results,
                    place,
                    D,
                    BLOCK_D,
                    BLOCK_N,
                    STAGES,
                    FP8,
                    V_MEAN,
                    RAGGED,
                    BIAS,
                    LSE,
                ),
            ),
            (
                _consumer,
                (
                    gl.constexpr(1),
                    rooms,
                    barriers,
                    scores_of,
                    values_of,
                    results,
                    place,
                    D,
                    BLOCK_D,
                    BLOCK_N,
                    STAGES,
                    FP8,
                    V_MEAN,
                    RAGGED,
                    BIAS,
                    LSE,
                ),
            ),
            (
                _producer,
                (
                    q_tile,
                    k_tile,
                    v_tile,
                    rooms,
                    barriers,
                    kv,
                    count,
                    k_start,
                    k_aligned,
                    b,
                    h,
                    heads,
                    first,
                    D,
                    STAGES,
                    FP8,
                ),
            ),
        ],
        [4, 1],
        [240, 24],
    )


@gluon.jit
def _producer(
    q_tile,
    k_tile,
    v_tile,
    rooms,
    barriers,
    kv,
    count,
    k_start,
    k_aligned,
    b,
    h,
    heads,
    first,
    D: gl.constexpr,
    STAGES: gl.constexpr,
    FP8: gl.constexpr,
):
    """Copies the query tiles, then K and V of each piece as soon as their stage is free."""
    q_room, k_room, v_room = rooms
    q_ready, k_ready, k_free, v_ready, v_free = barriers
    mbarrier.expect(q_ready, 2 * q_tile.block_type.nbytes)
    _load_tile(q_tile, [b, h, first, 0], q_ready, q_room.index(0))
    _load_tile(q_tile, [b, h, first + 64, 0], q_ready, q_room.index(1))
    for i in range(count):
        stage = i % STAGES
        parity = (i // STAGES) & 1
        kv_piece = gl.load(kv + i)
        start = gl.load(k_start + kv_piece)
        mbarrier.wait(k_free.index(stage), parity ^ 1)
        mbarrier.expect(k_ready.index(stage), k_tile.block_type.nbytes)
        _load_tile(k_tile, [b, h, start, 0], k_ready.index(stage), k_room.index(stage))
        if FP8:
            column = gl.load(k_aligned + kv_piece)
        mbarrier.wait(v_free.index(stage), parity ^ 1)
        mbarrier.expect(v_ready.index(stage), v_tile.block_type.nbytes)
        if FP8:
            row = (b * heads + h) * D
            _load_tile(v_tile, [0, 0, row, column], v_ready.index(stage), v_room.index(stage))
        else:
            _load_tile(v_tile, [b, h, start, 0], v_ready.index(stage), v_room.index(stage))


@gluon.jit
def _consumer(
    WHICH: gl.constexpr,
    rooms,
    barriers,
    scores_of,
    values_of,
    results,
    place,
    D: gl.constexpr,
    BLOCK_D: gl.constexpr,
    BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr,
    FP8: gl.constexpr,
    V_MEAN: gl.constexpr,
    RAGGED: gl.constexpr,
    BIAS: gl.constexpr,
    LSE: gl.constexpr,
):
    """Online softmax of 64 query rows over the list. Every warp of it takes every branch: all depend on scalars."""
    q_room, k_room, v_room = rooms
    q_ready, k_ready, k_free, v_ready, v_free = barriers
    k_len, k_scales, bias_row, q_scales = scores_of
    first, rows, kv, count, exact, factor, k_start = place
    # shapes of the tensor cores' operands: s [64, BLOCK_N], acc [64, BLOCK_D], and p as the left operand of p v
    SCORES: gl.constexpr = gl.NVMMADistributedLayout(
        [3, 0], [4, 1], [16, BLOCK_N, 256 // q_room.dtype.primitive_bitwidth]
    )
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_D, 256 // v_room.dtype.primitive_bitwidth])
    WEIGHTS: gl.constexpr = gl.DotOperandLayout(0, ACC, 32 // v_room.dtype.primitive_bitwidth)
    SCORE_ROW: gl.constexpr = gl.SliceLayout(1, SCORES)
    ACC_ROW: gl.constexpr = gl.SliceLayout(1, ACC)

    row = WHICH * 64 + gl.arange(0, 64, layout=SCORE_ROW)
    factors = gl.full([64], factor, gl.float32, SCORE_ROW)
    if FP8:
        factors = factors * gl.load(q_scales + first + row, mask=row < rows, other=1.0)
    acc = gl.zeros([64, BLOCK_D], gl.float32, ACC)
    fade = gl.full([64], 1.0, gl.float32, SCORE_ROW)
    kv_piece = gl.load(kv)

    mbarrier.wait(q_ready, 0)
    mbarrier.wait(k_ready.index(0), 0)
    q = q_room.index(WHICH).reshape([64, BLOCK_D])
    pending = issue_scores(q, k_room.index(0), BLOCK_D, BLOCK_N, SCORES)
    scores = warpgroup_mma_wait(0, deps=(pending,))
    mbarrier.arrive(k_free.index(0), count=1)
    scores, step = finish(
        scores, factors, kv_piece, exact, k_start, k_len, k_scales, bias_row, BLOCK_N, FP8, RAGGED, BIAS, SCORES
    )
    top = largest(scores, step, BIAS)
    p = weights(scores, step, top, FP8, BIAS)
    total = gl.sum(p, 1)
    p = gl.convert_layout(p.to(v_room.dtype), WEIGHTS)
    for i in range(1, count):
        stage = i % STAGES
        parity = (i // STAGES) & 1
        before = (i - 1) % STAGES
        parity_before = ((i - 1) // STAGES) & 1
        kv_piece = gl.load(kv + i)
        if FP8:
            # the product is in units of the maximum of the piece before
            mbarrier.wait(v_ready.index(before), parity_before)
            product = issue_values(p, v_room.index(before), acc, BLOCK_D, BLOCK_N, FP8, ACC)
            product = warpgroup_mma_wait(0, deps=(product,))
            mbarrier.arrive(v_free.index(before), count=1)
            acc = acc * gl.convert_layout(fade, ACC_ROW)[:, None] + product
            mbarrier.wait(k_ready.index(stage), parity)
            pending = issue_scores(q, k_room.index(stage), BLOCK_D, BLOCK_N, SCORES)
            scores = warpgroup_mma_wait(0, deps=(pending,))
        else:
            mbarrier.wait(k_ready.index(stage), parity)
            pending = issue_scores(q, k_room.index(stage), BLOCK_D, BLOCK_N, SCORES)
            mbarrier.wait(v_ready.index(before), parity_before)
            product = issue_values(p, v_room.index(before), acc, BLOCK_D, BLOCK_N, FP8, ACC)
            scores = warpgroup_mma_wait(1, deps=(pending,))
        mbarrier.arrive(k_free.index(stage), count=1)
        scores, step = finish(
            scores, factors, kv_piece, exact, k_start, k_len, k_scales, bias_row, BLOCK_N, FP8, RAGGED, BIAS, SCORES
        )
        new_top = gl.maximum(top, largest(scores, step, BIAS))
        fade = gl.exp2(top - new_top)
        new_p = weights(scores, step, new_top, FP8, BIAS)
        total = total * fade + gl.sum(new_p, 1)
        top = new_top
        if not FP8:
            total = pinned(total)
            product = warpgroup_mma_wait(0, deps=(product,))
            mbarrier.arrive(v_free.index(before), count=1)
            acc = product * gl.convert_layout(fade, ACC_ROW)[:, None]
        p = gl.convert_layout(new_p.to(v_room.dtype), WEIGHTS)
    last = (count - 1) % STAGES
    mbarrier.wait(v_ready.index(last), ((count - 1) // STAGES) & 1)
    product = issue_values(p, v_room.index(last), acc, BLOCK_D, BLOCK_N, FP8, ACC)
    product = warpgroup_mma_wait(0, deps=(product,))
    if FP8:
        product = acc * gl.convert_layout(fade, ACC_ROW)[:, None] + product
    write(product, top, total, row, first, rows, values_of, results, WHICH, D, BLOCK_D, FP8, V_MEAN, LSE, ACC)
