"""Dynamic patterns that aim at a density: what they share."""

from __future__ import annotations

from dataclasses import dataclass, field

from ..layout import TokenLayout
from .dynamic import DynamicPattern
from .params import check_share
from .ranking import blocks_of

__all__ = ["BudgetedPattern"]


@dataclass(frozen=True, kw_only=True, eq=False)
class BudgetedPattern(DynamicPattern):
    """A dynamic pattern that keeps a given share of the video blocks.

    Args:
        aim: share of the video blocks that a row keeps, rounded up to whole blocks. Plans call it ``density``, which
            is a method here.

    Raises:
        ConfigError: unless 0 < aim <= 1.
    """

    aim: float = field(metadata={"parameter": "density"})

    def __post_init__(self) -> None:
        check_share(self.name, "density", self.aim)

    def count(self, layout: TokenLayout) -> int:
        """Video blocks that a row keeps on this layout."""
        return blocks_of(self.aim, layout.num_video_blocks)

    def density(self, layout: TokenLayout) -> float:
        """Share of the video blocks that a row keeps: of the token pairs too where blocks are equal."""
        return self.count(layout) / layout.num_video_blocks

    def resolved(self, layout: TokenLayout) -> str:
        """Blocks kept of all."""
        return f"{self.count(layout)} of {layout.num_video_blocks} blocks a row"
