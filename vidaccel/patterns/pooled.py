"""Blocks chosen by the attention between block means: a fixed number for each row, or a fixed share of its mass."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from ..errors import ConfigError
from ..layout import TokenLayout
from .base import StaticPattern
from .budgeted import BudgetedPattern
from .dynamic import DynamicPattern, Heads
from .params import check_flag, check_share
from .ranking import block_probabilities, blocks_of, keep_largest, keep_mass, split_text
from .registry import register
from .windows import check_window, window_blocks

__all__ = ["PooledTopK", "PooledTopP"]


@register
@dataclass(frozen=True, kw_only=True, eq=False)
class PooledTopK(BudgetedPattern):
    """Each row of blocks keeps the k video blocks of largest estimated attention.

    P_ij = softmax over all blocks j of scale * mean query_i . mean key_j + log n_j, and k = density * NV of NV video
    blocks. Source: the coarse selection of Video Sparse Attention (VSA), here without training and without its coarse
    branch; rounded down that of SLA. Both have no log n_j; it changes the order only where blocks at the grid's edge
    are smaller.

    Args:
        aim: see :class:`BudgetedPattern`.
        rounding: whether k is rounded ``"up"`` to whole blocks, or ``"down"``, but not to none.

    Raises:
        ConfigError: if the density is out of range, or the rounding neither.
    """

    name: ClassVar[str] = "pooled_top_k"
    places = "nothing"

    rounding: Literal["up", "down"] = "up"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rounding not in ("up", "down"):
            raise ConfigError(f"{self.name}: rounding is {self.rounding!r}; valid are 'up' and 'down'")

    def count(self, layout: TokenLayout) -> int:
        """Video blocks that a row keeps on this layout."""
        if self.rounding == "up":
            return super().count(layout)
        return max(1, int(self.aim * layout.num_video_blocks + 1e-9))  # .3 * 10 is 2.9999 blocks in floats

    def choose(self, heads: Heads) -> torch.Tensor:
        """The k largest of each row, bool [B,H,NV,NV]."""
        probability, _ = split_text(heads, block_probabilities(heads))
        return keep_largest(probability, self.count(heads.layout))


@register
@dataclass(frozen=True, kw_only=True, eq=False)
class PooledTopP(DynamicPattern):
    """Each row of blocks keeps the fewest video blocks that hold a share of its estimated attention.

    P as in :class:`PooledTopK`; text blocks are kept anyway, so their mass counts first. Source: NABLA, which unites
    the result with a sliding tile window and has no text in its self-attention.

    Args:
        mass: share of the row's attention to hold.
        min_density, max_density: bounds of the share of video blocks that a row keeps, rounded up to whole blocks.
        beyond: keeps #{cumulated mass <= ``mass``} + 1 blocks, one more than the smallest set where the mass is met
            exactly (NABLA's and Rectified SpaAttn's way to count).
        window: a pattern fixed by the token grid whose blocks are kept as well, or ``None``.

    Raises:
        ConfigError: if a share is out of range, or the window is no static pattern.
    """

    name: ClassVar[str] = "pooled_top_p"
    places = "order"

    mass: float = 0.9
    min_density: float = 0.0
    max_density: float = 1.0
    beyond: bool = False
    window: StaticPattern | None = None

    def __post_init__(self) -> None:
        check_share(self.name, "mass", self.mass)
        check_share(self.name, "min_density", self.min_density, zero=True)
        check_share(self.name, "max_density", self.max_density)
        if self.min_density > self.max_density:
            raise ConfigError(
                f"{self.name}: min_density {self.min_density} is above max_density {self.max_density}; swap them"
            )
        check_flag(self.name, "beyond", self.beyond)
        check_window(self.name, "window", self.window)

    def choose(self, heads: Heads) -> torch.Tensor:
        """The smallest sets, within the bounds, and the window: bool [B,H,NV,NV]."""
        probability, text = split_text(heads, block_probabilities(heads))
        blocks = heads.layout.num_video_blocks
        kept = keep_mass(
            probability,
            self.mass,
            held=text,
            least=blocks_of(self.min_density, blocks),
            most=blocks_of(self.max_density, blocks),
            count="beyond" if self.beyond else "reach",
        )
        return kept | window_blocks(self.window, heads)

    def resolved(self, layout: TokenLayout) -> str:
        """The mass, and bounds and window where they are set."""
        text = f"{self.mass:g} of the estimated attention"
        if (self.min_density, self.max_density) != (0.0, 1.0):
            bounds = (blocks_of(d, layout.num_video_blocks) for d in (self.min_density, self.max_density))
            text += " in {} to {} of {} blocks a row".format(*bounds, layout.num_video_blocks)
        return text + ("" if self.window is None else f" + {self.window.name} ({self.window.resolved(layout)})")
