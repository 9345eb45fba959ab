"""Blocks of unequal size as one rectangle of token positions, for maxima, which repeated tokens do not change."""

from __future__ import annotations

from functools import lru_cache

import torch

from ..layout import TokenLayout

__all__ = ["block_rows", "largest_per_block"]

#: Most scores in memory at a time, and never more than the keys have numbers.
_AT_A_TIME = 1 << 26


@lru_cache(maxsize=32)
def block_rows(layout: TokenLayout, rows: int | None, device: torch.device) -> torch.Tensor:
    """Positions of tokens of each block, int64 [NB,R] on ``device``; cached.

    Args:
        rows: how many of each block, evenly spaced; ``None`` for all. A block with fewer repeats its own.
    """
    sizes = layout.block_sizes[:, None]
    count = int(sizes.max()) if rows is None else min(rows, int(sizes.max()))
    place = torch.arange(count)
    spaced = place * sizes // count
    within = spaced if rows is not None else place % sizes
    return (layout.block_offsets[:-1, None] + within).to(device)


def largest_per_block(q: torch.Tensor, k: torch.Tensor, layout: TokenLayout) -> torch.Tensor:
    """The largest product of each query [B,H,R,D] with a key of each block, float32 [B,H,R,NB]; k is [B,S,H,D]."""
    rows = block_rows(layout, None, k.device)
    blocks = k.index_select(1, rows.flatten()).permute(0, 2, 3, 1).float()
    b, h, _, keys = blocks.shape
    step = max(1, min(_AT_A_TIME, k.numel()) // (b * h * keys))
    found = [(part @ blocks).unflatten(-1, rows.shape).amax(-1) for part in q.float().split(step, dim=2)]
    return torch.cat(found, dim=2)
