"""The first places of the frame, in all frames, as a sink that every query attends."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from ..layout import TokenLayout
from .base import CoveragePattern
from .pairs import TokenRule
from .params import Extent, check_extent, resolve
from .registry import register

__all__ = ["FirstPlacesSink"]


@register
@dataclass(frozen=True, kw_only=True, eq=False)
class FirstPlacesSink(CoveragePattern):
    """Every query keeps the keys that come first in token-major order, as many as the first frames have.

    Token-major order goes through the frames at one place before it goes to the next, so these are a few places of the
    frame, its first rows, in every frame. Source: the sink of Sparse VideoGen's temporal heads on Wan, whose keys are
    in that order when the first H * W of them are kept.

    Args:
        frames: how many frames' worth of keys; a whole number, or a fraction of the video.
        min_coverage, min_columns: see :class:`CoveragePattern`.

    Raises:
        ConfigError: if a number is out of range.
    """

    name: ClassVar[str] = "first_places_sink"

    frames: Extent = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_extent(self.name, "frames", self.frames)

    def rules(self, layout: TokenLayout) -> tuple[TokenRule, ...]:
        """Whole rows of keys, part of a row, and the place of which only some frames are kept."""
        frames, _, width = layout.grid
        places, rest = divmod(self.tokens(layout), frames)
        frame, row, column = (torch.arange(n) for n in layout.grid)
        parts = [
            (frame >= 0, row < places // width, column >= 0),
            (frame >= 0, row == places // width, column < places % width),
            (frame < rest, row == places // width, column == places % width),
        ]
        kept = [part for part in parts if all(bool(keys.any()) for keys in part)]
        return tuple(TokenRule.axes(layout.grid, *(keys.expand(len(keys), -1) for keys in part)) for part in kept)

    def tokens(self, layout: TokenLayout) -> int:
        """Keys that are kept on this layout."""
        frames, height, width = layout.grid
        return resolve(self.frames, frames) * height * width

    def resolved(self, layout: TokenLayout) -> str:
        """Keys kept."""
        return f"first {self.tokens(layout)} of {layout.grid.tokens} keys in token-major order"
