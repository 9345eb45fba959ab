"""A few query rows attended exactly, as evidence for choosing between ways to skip blocks."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .dynamic import Heads

__all__ = ["SampledRows", "sample_rows"]


@dataclass(frozen=True, eq=False)
class SampledRows:
    """Some video queries, the same of every sample and head.

    Args:
        tokens: their positions in layout order, int64 [R].
        blocks: the video block of each, counted among video blocks, int64 [R].
        logits: their scaled scores with every key, float32 [B,H,R,S].
    """

    tokens: torch.Tensor
    blocks: torch.Tensor
    logits: torch.Tensor


def sample_rows(heads: Heads, count: int, seed: int, first: int | None = None) -> SampledRows:
    """``count`` video queries (all if there are fewer), drawn anew in each step, the same wherever it runs.

    Args:
        first: draws among so many that come first in frame-major order; ``None`` for all.
    """
    layout, device = heads.layout, heads.q.device
    generator = torch.Generator().manual_seed(seed * 1_000_003 + heads.step)
    among = layout.grid.tokens if first is None else min(first, layout.grid.tokens)
    drawn = torch.randperm(among, generator=generator)[:count]
    if first is not None:
        drawn = _frame_major(heads)[drawn]
    tokens = (drawn.sort().values + layout.video_start).to(device)
    blocks = layout.block_of_token.to(device)[tokens] - layout.video_blocks.start
    q = heads.q.index_select(1, tokens).transpose(1, 2).float() * heads.scale
    return SampledRows(tokens, blocks, q @ heads.k.permute(0, 2, 3, 1).float())


def _frame_major(heads: Heads) -> torch.Tensor:
    """Where each video token is among the video's, by its place in frame-major order, int64 [V] on the CPU."""
    layout = heads.layout
    if heads.order is None:
        return layout.inverse.cpu()[layout.video_tokens] - layout.video_start
    assert heads.order.coords is not None  # patterns that go by places get no other order
    frame, row, column = heads.order.coords.cpu().T
    return ((frame * layout.grid.height + row) * layout.grid.width + column).argsort()
