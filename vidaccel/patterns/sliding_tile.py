"""Sliding tile attention (STA): a window of whole tiles that stops at the borders."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from ..layout import TokenLayout
from .base import StaticPattern
from .pairs import TokenRule
from .params import Extents, check_extents, resolve, spell
from .registry import register

__all__ = ["SlidingTile"]


@register
@dataclass(frozen=True, kw_only=True, eq=False)
class SlidingTile(StaticPattern):
    """Each tile attends the tiles around it; at a border the window moves inward, so the work stays the same.

    Along an axis of N tiles and a window of k, the centre is clamp(q, k//2, N-1-k//2) and tile j is kept if it lies
    within k//2 of the centre. So an even k reaches as far as k+1, and k >= N is the whole axis. Source: Sliding Tile
    Attention, on any grid.

    Args:
        window: tiles along (frames, height, width); whole numbers, or fractions of the axis.

    Raises:
        ConfigError: if the window is not three such numbers.
    """

    name: ClassVar[str] = "sliding_tile"

    window: Extents

    def __post_init__(self) -> None:
        object.__setattr__(self, "window", check_extents(self.name, "window", self.window))

    def rules(self, layout: TokenLayout) -> tuple[TokenRule, ...]:
        """One rule: the window along each axis, from tiles to tokens."""
        axes = []
        for extent, sizes in zip(self.window, layout.axis_sizes, strict=True):
            keep = _window(resolve(extent, len(sizes)), len(sizes))
            axes.append(keep.repeat_interleave(sizes, 0).repeat_interleave(sizes, 1))
        return (TokenRule.axes(layout.grid, *axes),)

    def resolved(self, layout: TokenLayout) -> str:
        """Window in tiles, as many as it really reaches."""
        counts = layout.tile_counts
        tiles = [int(_window(resolve(e, n), n)[0].sum()) for e, n in zip(self.window, counts, strict=True)]
        return f"window {spell(tiles)} of {spell(counts)} tiles"


def _window(extent: int, tiles: int) -> torch.Tensor:
    """Kept pairs of tiles along one axis, bool [tiles, tiles]."""
    if extent >= tiles:
        return torch.ones(tiles, tiles, dtype=torch.bool)
    reach = extent // 2
    tile = torch.arange(tiles)
    centre = tile.clamp(reach, tiles - 1 - reach)
    return (centre[:, None] - tile[None, :]).abs() <= reach
