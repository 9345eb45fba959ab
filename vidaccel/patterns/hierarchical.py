"""Coarse to fine: groups of tiles are compared first, and only tiles of the best groups after that."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import torch

from ..errors import ConfigError
from ..layout import TokenLayout
from .budgeted import BudgetedPattern
from .dynamic import Heads
from .params import check_count
from .ranking import keep_largest
from .registry import register

__all__ = ["Hierarchical"]


@register
@dataclass(frozen=True, kw_only=True, eq=False)
class Hierarchical(BudgetedPattern):
    """Each row keeps its k best blocks among the tiles of its best groups.

    Tiles are joined to groups of ``group`` tiles. A row ranks the groups g by scale * mean query . mean key_g + log n_g
    and keeps the first of them that hold ceil(wide * k) tiles together, k = ceil(density * NV); of these tiles it
    keeps the k of largest scale * mean query . mean key_j + log n_j.

    Source: the coarse-to-fine search of HiP and DHSA. Different here: two levels; a group speaks by the mean of its
    tokens (HiP: by tokens picked from it) and is a box of the video (HiP: a run of the sequence). All pairs of block
    means are computed, because at these sizes that is cheaper than to gather; so what is saved is only the ranking.

    Args:
        group: tiles of a group along (frames, height, width).
        wide: how many times k tiles the kept groups hold at least; 1 is the narrowest search.

    Raises:
        ConfigError: if a number is out of range.
    """

    name: ClassVar[str] = "hierarchical"

    group: tuple[int, int, int] = (2, 2, 2)
    wide: float = 2.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.group, list | tuple) or len(self.group) != 3:
            raise ConfigError(f"{self.name}: group is {self.group!r}; give three numbers of tiles")
        for extent in self.group:
            check_count(self.name, "an extent of group", extent)
        object.__setattr__(self, "group", tuple(self.group))
        number = isinstance(self.wide, int | float) and not isinstance(self.wide, bool)
        if not number or self.wide < 1:
            raise ConfigError(f"{self.name}: wide is {self.wide!r}; give a number of at least 1")

    def choose(self, heads: Heads) -> torch.Tensor:
        """The k best of each row, bool [B,H,NV,NV]."""
        layout = heads.layout
        video = layout.video_blocks
        k = self.count(layout)
        of_tile, tiles = _groups(layout, self.group, heads.q.device)
        sizes = heads.sizes[video]
        tokens = sizes.new_zeros(len(tiles)).index_add_(0, of_tile, sizes)
        keys = heads.k_means[:, :, video] * sizes[:, None]
        means = keys.new_zeros(*keys.shape[:2], len(tiles), keys.shape[-1]).index_add_(2, of_tile, keys)
        means = means / tokens[:, None]
        coarse = (heads.q_means[:, :, video] * heads.scale) @ means.mT + tokens.log()
        order = coarse.argsort(dim=-1, descending=True, stable=True)
        held = tiles[order].cumsum(-1) - tiles[order]  # tiles of better groups
        open_ = torch.zeros_like(coarse, dtype=torch.bool).scatter_(-1, order, held < self.wide * k)
        fine = heads.pooled_logits[:, :, video, video] + sizes.log()
        return keep_largest(fine.masked_fill(~open_[..., of_tile], -torch.inf), k)

    def resolved(self, layout: TokenLayout) -> str:
        """Blocks kept of all, and how they are searched."""
        groups = len(_groups(layout, self.group, torch.device("cpu"))[1])
        return f"{super().resolved(layout)} by way of {groups} groups"


@lru_cache(maxsize=32)
def _groups(
    layout: TokenLayout, group: tuple[int, int, int], device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """The group of each tile, int64 [NV], and the tiles of each group, int64 [G]; cached."""
    counts = [-(-n // g) for n, g in zip(layout.tile_counts, group, strict=True)]
    place = layout.block_coords // torch.tensor(group)
    number = (place[:, 0] * counts[1] + place[:, 1]) * counts[2] + place[:, 2]
    return number.to(device), torch.bincount(number, minlength=counts[0] * counts[1] * counts[2]).to(device)
