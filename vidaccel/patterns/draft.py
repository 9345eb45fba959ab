"""DraftAttention: one threshold for the whole map of a head, so rows of blocks keep as much as they need."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from ..layout import TokenLayout
from .budgeted import BudgetedPattern
from .dynamic import Heads
from .ranking import keep_largest
from .registry import register

__all__ = ["Draft"]


@register
@dataclass(frozen=True, kw_only=True, eq=False)
class Draft(BudgetedPattern):
    """Each head keeps the largest entries of its map of estimated attention, wherever they are.

    The map is softmax(scale * mean query_i . mean key_j + log n_j) over the blocks of the video, text left out. Of its
    N entries those are kept that reach the largest of the int((1 - density) * N) smallest: all but these, and one of
    them. A row that comes out empty keeps its largest entry. Source: DraftAttention, whose blocks are patches of 8x16
    tokens of one frame (tile (1,8,16)) and which keeps 10%. Different here: any tile, log n_j for smaller blocks at the
    grid's edge, no empty rows, and of equal entries the first.
    """

    name: ClassVar[str] = "draft"
    places = "nothing"

    def choose(self, heads: Heads) -> torch.Tensor:
        """The largest entries of each head's map, bool [B,H,NV,NV]; no row is empty."""
        video = heads.layout.video_blocks
        probability = (heads.pooled_logits[:, :, video, video] + heads.sizes[video].log()).softmax(-1)
        kept = keep_largest(probability.flatten(-2), self.pairs(heads.layout)).view_as(probability)
        return kept | keep_largest(probability, 1) & ~kept.any(-1, keepdim=True)

    def pairs(self, layout: TokenLayout) -> int:
        """Pairs of video blocks that a head keeps before empty rows are filled."""
        entries = layout.num_video_blocks**2
        return min(entries, entries - int((1 - self.aim) * entries + 1e-9) + 1)  # .9 * 10 may be 8.9999 in floats

    def density(self, layout: TokenLayout) -> float:
        """Share of the pairs of video blocks that a head keeps; empty rows add to it."""
        return self.pairs(layout) / layout.num_video_blocks**2

    def resolved(self, layout: TokenLayout) -> str:
        """Pairs kept of all."""
        return f"{self.pairs(layout)} of {layout.num_video_blocks**2} pairs of blocks a head"
