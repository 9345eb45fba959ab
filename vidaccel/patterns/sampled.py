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


def sample_rows(heads: Heads, count: int, seed: int) -> SampledRows:
    """``count`` video queries (all if there are fewer), drawn anew in each step, the same wherever it runs."""
    layout, device = heads.layout, heads.q.device
    generator = torch.Generator().manual_seed(seed * 1_000_003 + heads.step)
    drawn = torch.randperm(layout.grid.tokens, generator=generator)[:count].sort().values + layout.video_start
    tokens = drawn.to(device)
    blocks = layout.block_of_token.to(device)[tokens] - layout.video_blocks.start
    q = heads.q.index_select(1, tokens).transpose(1, 2).float() * heads.scale
    return SampledRows(tokens, blocks, q @ heads.k.permute(0, 2, 3, 1).float())
