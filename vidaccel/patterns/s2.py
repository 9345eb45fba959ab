"""S2-Attention's shards: every head sees the blocks around it and its own share of all the others."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import torch

from ..layout import TokenLayout
from .dynamic import DynamicPattern, Heads
from .params import check_count
from .registry import register
from .windows import neighbour_blocks

__all__ = ["Shards"]


@register
@dataclass(frozen=True, kw_only=True, eq=False)
class Shards(DynamicPattern):
    """Head h keeps the tiles at most ``near`` apart, and every ``stride``-th block: (j + h * step + 1) mod stride = 0.

    Heads keep different blocks, so that together they see everything as soon as there are ``stride`` of them. Nothing
    depends on queries or keys. Source: S2-Attention, made for language models, where the blocks before the own one
    are a run of the text, and step = max(1, int(stride / heads)). Different here: those around it in the video.

    Args:
        stride: distance of a head's blocks in the order of the layout.
        near: tiles in each direction that every head keeps.
        step: blocks by which the shards of one head and the next are apart.

    Raises:
        ConfigError: if a number is out of range.
    """

    name: ClassVar[str] = "shards"
    places = "order"

    stride: int = 8
    near: int = 1
    step: int = 1

    def __post_init__(self) -> None:
        check_count(self.name, "stride", self.stride)
        check_count(self.name, "near", self.near, 0)
        check_count(self.name, "step", self.step)

    def choose(self, heads: Heads) -> torch.Tensor:
        """The blocks of each head by its number in the layer, bool [B,H,NV,NV]."""
        block = torch.arange(heads.layout.num_video_blocks)
        members = torch.tensor(heads.members)[:, None]
        mine = ((block + members * self.step + 1) % self.stride == 0).to(heads.q.device)
        kept = mine[:, None] | neighbour_blocks(heads, self.near)
        return kept.expand(heads.q.shape[0], -1, -1, -1).clone()

    def density(self, layout: TokenLayout) -> float:
        """Share of the token pairs, mean over the shards."""
        return _density(self, layout)

    def resolved(self, layout: TokenLayout) -> str:
        """Stride and neighbourhood."""
        return f"every {self.stride}th of {layout.num_video_blocks} blocks + tiles up to {self.near} apart"


@lru_cache(maxsize=64)
def _density(pattern: Shards, layout: TokenLayout) -> float:
    sizes = layout.block_sizes[layout.video_blocks].double()
    place = torch.zeros(1, layout.tokens, pattern.stride, 1)
    kept = pattern.choose(Heads(place, place, place, layout))[0].double()
    return float((kept @ sizes @ sizes).mean()) / layout.grid.tokens**2
