"""Rounds q, k and v to 8 bits as the forward kernel reads them, each in one pass over memory.

``quantise_rows``, for q and k: one program owns one block of one head. With a scale for the block it reads its rows
twice, the second time from the cache::

    largest = max |x - mean|              of the block, of 32 rows, or given for the whole head
    out     = round((x - mean) / scale)   int8 or e4m3, with the oracle's scale and rounding (:mod:`..quantise`)

and on request writes the means of x - mean, which stand for the block in the pooled tail.

``quantise_values``, for v: a scale for each channel, known beforehand; transposed, because fp8 tensor cores want keys
contiguous, with each block at a multiple of 16 columns and zeros between blocks (:func:`.worklist.aligned_offsets`).

Divisions are IEEE's, so results equal the oracle's to the last bit wherever means and scales do. The exception is fp8
on sm_89 by Triton 3.6, which rounds float32 twice, by way of fp16: one value in 256 is the neighbour's.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl

from ...layout import TokenLayout
from ...types import Granularity
from ..quantise import FP8_MAX, INT8_MAX, ROWS
from .means import block_offsets, rows_of
from .worklist import aligned_offsets

__all__ = ["quantise_rows", "quantise_values", "round_rows", "round_values", "rounded", "scale_of"]

_INT8_MAX: tl.constexpr = tl.constexpr(INT8_MAX)
_FP8_MAX: tl.constexpr = tl.constexpr(FP8_MAX)

_WARPS = 4
#: Columns of transposed V that a program writes at a time: with fewer, runs of memory get short.
_COLUMNS = 64


@triton.jit
def quantise_rows(
    # x [B,S,H,D]; mean float32 [B,H,NM,D]; known float32 [B,H]; out [B,S,H,D]; scale [B,H,S]; block_mean [B,H,NB,D]
    x,
    mean,
    known,
    out,
    scale,
    block_mean,
    offsets,
    # strides in elements
    x_batch,
    x_row,
    x_head,
    x_channel,
    mean_head,
    mean_block,
    out_batch,
    out_row,
    out_head,
    scale_head,
    heads,
    blocks,
    # how
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr,
    FP8: tl.constexpr,
    SMOOTH: tl.constexpr,
    GRANULARITY: tl.constexpr,
    MEANS: tl.constexpr,
):
    """One block of one head. ``GRANULARITY``: "tensor" takes ``known``, "block" its own, "rows32" one every ROWS."""
    block = tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    b = head // heads
    h = head % heads
    first = tl.load(offsets + block)
    rows = tl.load(offsets + block + 1) - first
    channel = tl.arange(0, BLOCK_D)
    x_base = x + b * x_batch + h * x_head + channel[None, :].to(tl.int64) * x_channel
    out_base = out + b * out_batch + h * out_head + channel[None, :]
    centre = tl.zeros([BLOCK_D], tl.float32)
    if SMOOTH:
        centre = tl.load(mean + head * mean_head + block * mean_block + channel, mask=channel < D, other=0.0)
    total = tl.zeros([ROWS, BLOCK_D], tl.float32)
    largest = 0.0
    if GRANULARITY == "tensor":
        largest = tl.load(known + head)
    if GRANULARITY == "block":
        top = tl.zeros([ROWS, BLOCK_D], tl.float32)
        for start in range(0, rows, ROWS):
            at, inside = rows_of(first, start, rows, D, BLOCK_D, ROWS)
            top = tl.maximum(top, tl.abs(_centred(x_base + at * x_row, inside, centre)))
        largest = tl.max(tl.max(top, 1), 0)
    for start in range(0, rows, ROWS):
        at, inside = rows_of(first, start, rows, D, BLOCK_D, ROWS)
        tile = _centred(x_base + at * x_row, inside, centre)
        if MEANS:
            total += tile
        if GRANULARITY == "rows32":
            largest = tl.max(tl.max(tl.abs(tile), 1), 0)
        step = scale_of(largest, FP8)
        tl.store(out_base + at * out_row, rounded(tile, step, FP8).to(out.dtype.element_ty), mask=inside)
        row = start + tl.arange(0, ROWS)
        tl.store(scale + head * scale_head + first + row, tl.zeros([ROWS], tl.float32) + step, mask=row < rows)
    if MEANS:
        average = tl.sum(total, 0) / rows
        tl.store(block_mean + (head * blocks + block) * D + channel, average, mask=channel < D)


@triton.jit
def _centred(pointers, inside, centre):
    """x - mean in float32, zeros outside."""
    tile = tl.load(pointers, mask=inside, other=0.0).to(tl.float32)
    return tl.where(inside, tile - centre[None, :], 0.0)


@triton.jit
def scale_of(largest, FP8: tl.constexpr):
    """The scale of values up to ``largest``; in int8 never zero, in fp8 1 for a group of zeros."""
    if FP8:
        scale = tl.div_rn(largest, _FP8_MAX)
        return tl.where(scale == 0, 1.0, scale)
    else:
        return tl.div_rn(largest, _INT8_MAX) + 1e-7


@triton.jit
def rounded(tile, scale, FP8: tl.constexpr):
    """tile / scale, for int8 rounded to whole numbers, half away from zero; for fp8 the conversion rounds."""
    tile = tl.div_rn(tile, tl.zeros_like(tile) + scale)
    if not FP8:
        size = tl.floor(tl.abs(tile) + 0.5)
        tile = tl.where(tile < 0, -size, size)
    return tile


@triton.jit
def quantise_values(
    # v [B,S,H,D]; mean and scale float32 [B,H,D]; out float8 [B,H,D,columns]
    v,
    mean,
    scale,
    out,
    # first row of each block and the end; first column of each block and the end
    offsets,
    aligned,
    # strides in elements
    v_batch,
    v_row,
    v_head,
    v_channel,
    columns,
    heads,
    # how
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    COLUMNS: tl.constexpr,
    SMOOTH: tl.constexpr,
):
    """One block of one head."""
    block = tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    b = head // heads
    h = head % heads
    first = tl.load(offsets + block)
    rows = tl.load(offsets + block + 1) - first
    first_column = tl.multiple_of(tl.load(aligned + block), 16)
    room = tl.multiple_of(tl.load(aligned + block + 1) - first_column, 16)
    channel = tl.arange(0, BLOCK_D)
    centre = tl.zeros([BLOCK_D], tl.float32)
    if SMOOTH:
        centre = tl.load(mean + head * D + channel, mask=channel < D, other=0.0)
    step = tl.load(scale + head * D + channel, mask=channel < D, other=1.0)
    v_base = v + b * v_batch + h * v_head + channel[None, :].to(tl.int64) * v_channel
    out_base = out + (head * D + channel[:, None]) * columns + first_column
    for start in range(0, room, COLUMNS):
        at, inside = rows_of(first, start, rows, D, BLOCK_D, COLUMNS)
        tile = _centred(v_base + at * v_row, inside, centre)
        values = tl.div_rn(tile, tl.zeros_like(tile) + step[None, :]).to(out.dtype.element_ty)
        column = start + tl.arange(0, COLUMNS)
        here = (channel < D)[:, None] & (column < room)[None, :]
        tl.store(out_base + column[None, :], tl.trans(values), mask=here)


def round_rows(
    x: torch.Tensor,
    offsets: torch.Tensor,
    out: torch.Tensor,
    scale: torch.Tensor,
    granularity: Granularity,
    *,
    mean: torch.Tensor | None = None,
    largest: torch.Tensor | None = None,
    block_mean: torch.Tensor | None = None,
) -> None:
    """Writes ``x`` - ``mean`` in 8 bits and its scales.

    Args:
        x: [B,S,H,D], any strides.
        offsets: int32 [NB + 1], where the blocks begin and, last, S.
        out: [B,S,H,D] int8 or float8_e4m3fn with contiguous channels.
        scale: float32 [B,H,S] with contiguous rows, heads S' apart; one per row, equal within a group.
        granularity: which rows share a scale: all, those of a block, or 32 counted from each block's begin.
        mean: float32 [B,H,1,D] for the whole head or [B,H,NB,D] for each block, contiguous.
        largest: float32 [B,H], max of |x - mean|, for granularity "tensor".
        block_mean: float32 [B,H,NB,D] for the block means of x - mean.
    """
    batch, _, heads, channels = x.shape
    blocks = len(offsets) - 1
    none = scale  # stands in for a tensor that this variant does not touch
    quantise_rows[(blocks, batch * heads)](
        x,
        none if mean is None else mean,
        none if largest is None else largest,
        out,
        scale,
        none if block_mean is None else block_mean,
        offsets,
        *x.stride(),
        *((0, 0) if mean is None else (mean.stride(1), channels if mean.shape[2] > 1 else 0)),
        *out.stride()[:3],
        scale.stride(1),
        heads,
        blocks,
        D=channels,
        BLOCK_D=triton.next_power_of_2(channels),
        ROWS=ROWS,
        FP8=out.dtype == torch.float8_e4m3fn,
        SMOOTH=mean is not None,
        GRANULARITY=granularity,
        MEANS=block_mean is not None,
        num_warps=_WARPS,
    )


def round_values(
    v: torch.Tensor, layout: TokenLayout, scale: torch.Tensor, mean: torch.Tensor | None, out: torch.Tensor
) -> None:
    """Writes ``v`` - ``mean`` in fp8, transposed, with zeros behind short blocks.

    Args:
        v: [B,S,H,D] in layout order, any strides.
        scale: float32 [B,H,D], contiguous.
        mean: float32 [B,H,D], contiguous, or ``None``.
        out: contiguous float8_e4m3fn [B,H,D,columns]; columns from that of the block means on are not touched.
    """
    batch, _, heads, channels = v.shape
    quantise_values[(layout.num_blocks, batch * heads)](
        v,
        scale if mean is None else mean,
        scale,
        out,
        block_offsets(layout, v.device),
        _columns(layout, v.device),
        *v.stride(),
        out.shape[-1],
        heads,
        D=channels,
        BLOCK_D=triton.next_power_of_2(channels),
        COLUMNS=_COLUMNS,
        SMOOTH=mean is not None,
        num_warps=_WARPS,
    )


@lru_cache(maxsize=64)
def _columns(layout: TokenLayout, device: torch.device) -> torch.Tensor:
    """First column of each block and of the block means: int32 [NB + 1]."""
    with torch.inference_mode(False):  # the cache outlives the caller's mode
        return aligned_offsets(layout)[:-1].to(device=device, dtype=torch.int32)
