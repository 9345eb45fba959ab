"""The pattern of Rectified SpaAttn: pooled attention, and neighbours and the first frame in any case."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from ..errors import ConfigError
from ..layout import TokenLayout
from .dynamic import DynamicPattern, Heads
from .params import check_count, check_flag, check_share
from .ranking import block_probabilities, keep_mass, split_text
from .registry import register
from .windows import first_frame_blocks, neighbour_blocks

__all__ = ["Rectified"]


@register
@dataclass(frozen=True, kw_only=True, eq=False)
class Rectified(DynamicPattern):
    """Each row keeps max(int((1 - drop) * NV), #{cumulated P <= mass} + 1) blocks, and what is next to it.

    P as in ``pooled_top_p``. United with the blocks at most ``neighbours`` tiles away along every axis and, among
    blocks that hold tokens of the first frame, all pairs. Source: the pattern of Rectified SpaAttn, without its
    rectification. Published blocks are runs of a Hilbert curve: ``ordered`` around this pattern gives them. Different
    here: text enters P by the means of its blocks instead of token by token; its mass counts as kept.

    Args:
        drop: share of the video blocks that a row may drop (published: .75 Wan 2.1, .8 HunyuanVideo, .85 CogVideoX1.5).
        mass: share of the attention that a row keeps at least.
        neighbours: distance in tiles that is always kept; 0 for the own tile alone.
        first_frame: whether the first frame's blocks attend each other.

    Raises:
        ConfigError: if a number is out of range.
    """

    name: ClassVar[str] = "rectified"
    places = "order"

    drop: float = 0.75
    mass: float = 0.3
    neighbours: int = 1
    first_frame: bool = True

    def __post_init__(self) -> None:
        check_share(self.name, "drop", self.drop, zero=True)
        if self.drop == 1:
            raise ConfigError(f"{self.name}: drop is {self.drop!r}; give a share from 0 up to, not including, 1")
        check_share(self.name, "mass", self.mass)
        check_count(self.name, "neighbours", self.neighbours, 0)
        check_flag(self.name, "first_frame", self.first_frame)

    def choose(self, heads: Heads) -> torch.Tensor:
        """The union of the three rules, bool [B,H,NV,NV]."""
        layout = heads.layout
        probability, text = split_text(heads, block_probabilities(heads))
        kept = keep_mass(probability, self.mass, held=text, least=self.least(layout), count="beyond")
        kept = kept | neighbour_blocks(heads, self.neighbours)
        if self.first_frame:
            first = first_frame_blocks(heads)
            kept = kept | first[:, None] & first
        return kept

    def least(self, layout: TokenLayout) -> int:
        """Blocks that a row keeps at least: int((1 - drop) * NV), but one."""
        return max(1, int((1 - self.drop) * layout.num_video_blocks + 1e-9))  # .2 * 5 is .9999 blocks in floats

    def resolved(self, layout: TokenLayout) -> str:
        """What a row keeps."""
        text = f"at least {self.least(layout)} of {layout.num_video_blocks} blocks a row and {self.mass:g} of the"
        text += f" estimated attention + tiles up to {self.neighbours} apart"
        return text + (" + first frame with itself" if self.first_frame else "")
