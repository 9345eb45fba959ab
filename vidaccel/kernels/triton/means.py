"""What planners and preparation want to know of each block, in one pass over a tensor.

One program reads one block of one head, ``ROWS`` rows at a time, and keeps running sums and extremes::

    mean        sum(x) / n                            K smoothing, the pooled tail, block scores
    low, high   extremes of each channel              scales of V, and of a whole head
    largest     max |x|
    similarity  |sum(x / |x|)|^2 / n^2                mean cosine of all pairs of tokens (SpargeAttn): near 1 where the
                                                      block's mean speaks for all of its tokens
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
import triton
import triton.language as tl

from ...errors import LayoutError
from ...layout import TokenLayout

__all__ = [
    "BlockRanges",
    "BlockStatistics",
    "append_means",
    "block_offsets",
    "block_ranges",
    "block_reduction",
    "block_sizes",
    "block_statistics",
    "rows_of",
    "sequence_mean",
]

#: Rows that a program reads at a time, and its warps: what fits into registers with three running sums.
_ROWS = 32
_WARPS = 4


@triton.jit
def block_reduction(
    # x [B,S,H,D]; copy like x; mean [B,NB,H,D]; low and high float32 [B,H,NB,D]; largest and similarity [B,H,NB]
    x,
    copy,
    mean,
    low,
    high,
    largest,
    similarity,
    # first row of each block, and the end
    offsets,
    # strides in elements
    x_batch,
    x_row,
    x_head,
    x_channel,
    copy_batch,
    copy_row,
    copy_head,
    mean_batch,
    mean_row,
    mean_head,
    heads,
    blocks,
    # how
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr,
    RANGE: tl.constexpr,
    SIMILARITY: tl.constexpr,
    COPY: tl.constexpr,
):
    """One block of one head."""
    block = tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    b = head // heads
    h = head % heads
    first = tl.load(offsets + block)
    rows = tl.load(offsets + block + 1) - first
    channel = tl.arange(0, BLOCK_D)

    total = tl.zeros([ROWS, BLOCK_D], tl.float32)
    if RANGE:
        lowest = tl.full([ROWS, BLOCK_D], float("inf"), tl.float32)
        highest = tl.full([ROWS, BLOCK_D], float("-inf"), tl.float32)
    if SIMILARITY:
        top = tl.zeros([ROWS, BLOCK_D], tl.float32)
        directions = tl.zeros([ROWS, BLOCK_D], tl.float32)
    x_base = x + b * x_batch + h * x_head
    for start in range(0, rows, ROWS):
        at, inside = rows_of(first, start, rows, D, BLOCK_D, ROWS)
        raw = tl.load(x_base + at * x_row + channel[None, :].to(tl.int64) * x_channel, mask=inside, other=0.0)
        tile = raw.to(tl.float32)
        total += tile
        if RANGE:
            lowest = tl.minimum(lowest, tl.where(inside, tile, float("inf")))
            highest = tl.maximum(highest, tl.where(inside, tile, float("-inf")))
        if SIMILARITY:
            top = tl.maximum(top, tl.abs(tile))
            directions += _unit(tile)
        if COPY:
            tl.store(copy + b * copy_batch + h * copy_head + at * copy_row + channel[None, :], raw, mask=inside)

    here = head * blocks + block
    real = channel < D
    mean_at = mean + b * mean_batch + h * mean_head + block.to(tl.int64) * mean_row + channel
    tl.store(mean_at, (tl.sum(total, 0) / rows).to(mean.dtype.element_ty), mask=real)
    if RANGE:
        tl.store(low + here * D + channel, tl.min(lowest, 0), mask=real)
        tl.store(high + here * D + channel, tl.max(highest, 0), mask=real)
    if SIMILARITY:
        tl.store(largest + here, tl.max(tl.max(top, 1), 0))
        together = tl.sum(directions, 0)
        count = rows.to(tl.float32)
        tl.store(similarity + here, tl.sum(together * together, 0) / (count * count))


@triton.jit
def rows_of(first, start, rows, D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr):
    """Rows ``start`` to ``start + ROWS`` of a block, int64 [ROWS, 1], and which elements exist [ROWS, BLOCK_D].

    In 64 bits, because row times stride passes 2^31 in long videos.
    """
    row = start + tl.arange(0, ROWS)
    inside = (row < rows)[:, None] & (tl.arange(0, BLOCK_D) < D)[None, :]
    return (first + row).to(tl.int64)[:, None], inside


@triton.jit
def _unit(tile):
    """Rows scaled to length 1; rows of zeros stay zeros. Scaled by the largest element first, so that no square over-
    or underflows."""
    top = tl.max(tl.abs(tile), 1)
    tile = tile / tl.where(top == 0, 1.0, top)[:, None]
    squares = tl.sum(tile * tile, 1)
    return tile * tl.rsqrt(tl.where(squares == 0, 1.0, squares))[:, None]


@dataclass(frozen=True, eq=False)
class BlockStatistics:
    """What block planners score with.

    Args:
        mean: float32 [B,H,NB,D].
        largest: float32 [B,H,NB], max of |x| in the block.
        similarity: float32 [B,H,NB], mean cosine of all pairs of the block's tokens, each with itself included; tokens
            of zeros count as orthogonal to everything.
    """

    mean: torch.Tensor
    largest: torch.Tensor
    similarity: torch.Tensor


@dataclass(frozen=True, eq=False)
class BlockRanges:
    """Mean and extremes of each channel in each block, float32 [B,H,NB,D] each."""

    mean: torch.Tensor
    low: torch.Tensor
    high: torch.Tensor

    def largest_around(self, centre: torch.Tensor) -> torch.Tensor:
        """Per channel, the largest |x - centre| of each block [B,H,NB,D], with a centre that broadcasts to it.

        Rounding keeps order, so this is the maximum over all rows to the last bit.
        """
        return torch.maximum((self.high - centre).abs(), (self.low - centre).abs())


def block_statistics(x: torch.Tensor, layout: TokenLayout) -> BlockStatistics:
    """Mean, largest element and self-similarity of each block of ``x`` [B,S,H,D] in layout order, any strides.

    Raises:
        LayoutError: if ``x`` is not [B,S,H,D] with the layout's S.
    """
    mean = _per_block(x, layout, x.shape[-1])
    largest, similarity = _per_block(x, layout), _per_block(x, layout)
    _reduce(x, layout, mean.transpose(1, 2), largest=largest, similarity=similarity)
    return BlockStatistics(mean, largest, similarity)


def block_ranges(x: torch.Tensor, layout: TokenLayout) -> BlockRanges:
    """Mean, minimum and maximum of each channel in each block of ``x`` [B,S,H,D] in layout order, any strides.

    Raises:
        LayoutError: if ``x`` is not [B,S,H,D] with the layout's S.
    """
    mean, low, high = (_per_block(x, layout, x.shape[-1]) for _ in range(3))
    _reduce(x, layout, mean.transpose(1, 2), low=low, high=high)
    return BlockRanges(mean, low, high)


def append_means(x: torch.Tensor, layout: TokenLayout, out: torch.Tensor) -> torch.Tensor:
    """Writes ``x`` [B,S,H,D] and behind it its NB block means into ``out`` [B,S+NB,H,D], and returns ``out``.

    Means are computed in float32 and rounded to ``out``'s dtype.

    Raises:
        LayoutError: if ``x`` is not [B,S,H,D] with the layout's S.
    """
    _reduce(x, layout, out[:, layout.tokens :], copy=out)
    return out


def sequence_mean(means: torch.Tensor, layout: TokenLayout) -> torch.Tensor:
    """Mean over the sequence [B,H,D] from block means [B,H,NB,D]."""
    return (means * (block_sizes(layout, means.device) / layout.tokens)[:, None]).sum(-2)


@lru_cache(maxsize=64)
def block_offsets(layout: TokenLayout, device: torch.device) -> torch.Tensor:
    """First row of each block and, last, the sequence length, as kernels read them: int32 [NB + 1]."""
    with torch.inference_mode(False):  # the cache outlives the caller's mode
        return layout.block_offsets.to(device=device, dtype=torch.int32)


@lru_cache(maxsize=64)
def block_sizes(layout: TokenLayout, device: torch.device) -> torch.Tensor:
    """Tokens in each block, float32 [NB], without waiting for a copy each time."""
    with torch.inference_mode(False):
        return layout.block_sizes.to(device=device, dtype=torch.float32)


def _per_block(x: torch.Tensor, layout: TokenLayout, *channels: int) -> torch.Tensor:
    return torch.empty(x.shape[0], x.shape[2], layout.num_blocks, *channels, dtype=torch.float32, device=x.device)


def _reduce(
    x: torch.Tensor,
    layout: TokenLayout,
    mean: torch.Tensor,
    *,
    low: torch.Tensor | None = None,
    high: torch.Tensor | None = None,
    largest: torch.Tensor | None = None,
    similarity: torch.Tensor | None = None,
    copy: torch.Tensor | None = None,
) -> None:
    """Runs the kernel with ``mean`` [B,NB,H,D] and ``copy`` in any strides but contiguous channels."""
    if x.dim() != 4 or x.shape[1] != layout.tokens:
        raise LayoutError(f"x is {tuple(x.shape)}, but {layout!r} wants [B,{layout.tokens},H,D]; tile x to this layout")
    batch, _, heads, channels = x.shape
    none = mean  # stands in for a tensor that this variant does not write
    block_reduction[(layout.num_blocks, batch * heads)](
        x,
        none if copy is None else copy,
        mean,
        none if low is None else low,
        none if high is None else high,
        none if largest is None else largest,
        none if similarity is None else similarity,
        block_offsets(layout, x.device),
        *x.stride(),
        *((0, 0, 0) if copy is None else copy.stride()[:3]),
        *mean.stride()[:3],
        heads,
        layout.num_blocks,
        D=channels,
        BLOCK_D=triton.next_power_of_2(channels),
        ROWS=_ROWS,
        RANGE=low is not None,
        SIMILARITY=similarity is not None,
        COPY=copy is not None,
        num_warps=_WARPS,
    )
