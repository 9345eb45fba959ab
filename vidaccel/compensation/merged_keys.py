"""Skipped blocks as a few merged keys each: tokens at one place of the frame, over the block's frames."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import torch

from ..layout import TokenLayout
from ..patterns.params import check_count
from .base import Call, Compensation
from .registry import register
from .standins import attend_stand_ins

__all__ = ["MergedKeys"]


@register
@dataclass(frozen=True, kw_only=True, eq=False)
class MergedKeys(Compensation):
    """Each query also attends ``parts`` merged keys of every block it skips, each as often as it has tokens.

    The tokens of a block fall into groups g by their place in the frame, all frames of the block together, because a
    place changes little from frame to frame. Logits q.kmean_g * scale + log n_g and values vmean_g join the softmax
    over the kept keys: exact for groups whose keys are all alike. Source: TempCache merges near-duplicate keys across
    frames with that bias; it finds them by similarity in a cache, here they are known by their place. One part is the
    pooled tail. Blocks that a pattern fills with tokens of its own order are cut into runs of that order's places.

    Args:
        parts: groups of a block, runs of its places in raster order; a block with fewer places has as many groups as
            places.

    Raises:
        ConfigError: if that is not a whole number of at least 1.
    """

    name: ClassVar[str] = "merged_keys"
    lse: ClassVar[bool] = True

    parts: int = 4

    def __post_init__(self) -> None:
        check_count(self.name, "parts", self.parts)

    def attend(self, call: Call) -> torch.Tensor:
        """The kernel's output with the merged keys of the skipped blocks."""
        heads, layout = call.heads, call.heads.layout
        groups, sizes = _groups(layout, self.parts, heads.q.device)
        keys, values = (_means(x, groups, sizes) for x in (heads.k, heads.v))
        logs = sizes.log()  # -inf for a group without tokens

        def stand_ins(b: int, h: int, blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
            kept = call.kept[b % len(call.kept), h % call.kept.shape[1], blocks]
            bias = logs.masked_fill(kept.repeat_interleave(len(logs) // kept.shape[-1], dim=-1), -math.inf)
            k, v = (x[b, h].expand(len(blocks), -1, -1) for x in (keys, values))
            return k, v, bias

        return attend_stand_ins(call, len(logs), stand_ins)


@lru_cache(maxsize=32)
def _groups(layout: TokenLayout, parts: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """The group of each token, int64 [S], and the tokens of each, float32 [NB * P]: P = ``parts`` a block, or as
    many as any block has places."""
    _, h, w = layout.axis_sizes
    places = torch.ones(layout.num_blocks, dtype=torch.int64)  # text is never skipped, so a block is one group
    places[layout.video_blocks] = (h[:, None] * w).flatten().repeat(layout.tile_counts[0])
    parts = min(parts, int(places.max()))
    block = torch.repeat_interleave(torch.arange(layout.num_blocks), layout.block_sizes)
    # a tile's tokens are in raster order: its frames one after the other, each with all places
    place = (torch.arange(layout.tokens) - layout.block_offsets[block]) % places[block]
    number = places.clamp(max=parts)[block]
    group = block * parts + place * number // places[block]
    sizes = torch.bincount(group, minlength=layout.num_blocks * parts).float()
    return group.to(device), sizes.to(device)


def _means(x: torch.Tensor, groups: torch.Tensor, sizes: torch.Tensor) -> torch.Tensor:
    """Mean of each group of x [B,S,H,D], float32 [B,H,G,D]; 0 where it has no tokens."""
    b, s, h, d = x.shape
    sums = torch.zeros(b * h, len(sizes), d, dtype=torch.float32, device=x.device)
    sums.index_add_(1, groups, x.transpose(1, 2).reshape(b * h, s, d).float())
    return (sums / sizes.clamp(min=1)[:, None]).view(b, h, -1, d)
