"""Sliding tile attention (STA): a window of whole tiles that stops at the borders."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from ..layout import TokenLayout
from .base import StaticPattern
from .pairs import TokenRule
from .params import Extent, Extents, check_extents, check_flag, resolve, spell
from .registry import register

__all__ = ["SlidingTile"]


@register
@dataclass(frozen=True, kw_only=True, eq=False)
class SlidingTile(StaticPattern):
    """Each tile attends the tiles around it; at a border the window moves inward, so the work stays the same.

    Along an axis of N tiles and a window of k, the center is clamp(q, k//2, N-1-k//2) and tile j is kept if it lies
    within k//2 of the center; without ``inward`` the center is q itself. So an even k reaches as far as k+1, and
    k >= N is the whole axis. Source: Sliding Tile Attention, on any grid.

    Args:
        window: tiles along (frames, height, width); whole numbers, or fractions of the axis.
        odd: whether a fraction becomes the whole axis or the odd number of tiles that is nearest, of two the larger,
            because an even number reaches further than it says; else the nearest number of any kind.
        inward: whether the window moves inward at borders; else it is cut off there, as in NABLA.

    Raises:
        ConfigError: if the window is not three such numbers, or a flag is not true or false.
    """

    name: ClassVar[str] = "sliding_tile"

    window: Extents
    odd: bool = False
    inward: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "window", check_extents(self.name, "window", self.window))
        check_flag(self.name, "odd", self.odd)
        check_flag(self.name, "inward", self.inward)

    def rules(self, layout: TokenLayout) -> tuple[TokenRule, ...]:
        """One rule: the window along each axis, from tiles to tokens."""
        axes = []
        for extent, sizes in zip(self.window, layout.axis_sizes, strict=True):
            keep = self._window(extent, len(sizes))
            axes.append(keep.repeat_interleave(sizes, 0).repeat_interleave(sizes, 1))
        return (TokenRule.axes(layout.grid, *axes),)

    def resolved(self, layout: TokenLayout) -> str:
        """Window in tiles, as many as it reaches at most."""
        counts = layout.tile_counts
        kept = [self._window(extent, tiles) for extent, tiles in zip(self.window, counts, strict=True)]
        reached = [int(axis.sum(-1).max()) for axis in kept]
        return f"window {spell(reached)} of {spell(counts)} tiles" + ("" if self.inward else ", cut off at borders")

    def _window(self, extent: Extent, tiles: int) -> torch.Tensor:
        """Kept pairs of tiles along one axis, bool [tiles, tiles]."""
        wanted = extent
        if isinstance(extent, float):
            wanted = resolve(extent, tiles)
            if self.odd:
                odd = [*range(1, tiles, 2), tiles]
                wanted = min(reversed(odd), key=lambda count: abs(count - extent * tiles))
        if wanted >= tiles and (self.inward or isinstance(extent, float)):
            return torch.ones(tiles, tiles, dtype=torch.bool)
        reach = int(wanted) // 2
        tile = torch.arange(tiles)
        center = tile.clamp(reach, tiles - 1 - reach) if self.inward else tile
        return (center[:, None] - tile[None, :]).abs() <= reach
