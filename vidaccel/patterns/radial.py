"""Radial attention: the further two frames are apart, the narrower the band kept between them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from ..errors import ConfigError
from ..layout import TokenLayout
from .base import CoveragePattern
from .first_frame_sink import key_frames
from .pairs import TokenRule
from .params import Extent, check_extent, resolve
from .registry import register

__all__ = ["Radial"]


@register
@dataclass(frozen=True, kw_only=True, eq=False)
class Radial(CoveragePattern):
    """A band around the same place in every frame, whose width halves as the frame distance doubles.

    With n tokens a frame, frame distance d and r = 2^bits(n) / 2^bits(d), where bits is the number of binary digits:
    frames with d <= ``near`` attend each other whole; further ones keep tokens whose raster positions within their
    frames differ by at most max(r * decay, floor); and where r < floor, only every int(floor / r)-th distance d is
    kept at all. Source: Radial Attention.

    Args:
        decay: factor on the width; published .2 for Wan 2.1, .8 for Wan 2.2, .95 for HunyuanVideo.
        near: the largest frame distance that keeps everything.
        first_frame: whether every query keeps all keys of the first frame, as published for Wan.
        floor: the least width; whole numbers are tokens (published: 128), fractions are of the tokens of a frame.
        min_coverage, min_columns: see :class:`CoveragePattern`; published is a ``min_columns`` of .6, where a block is
            128 tokens of a frame in raster order.

    Raises:
        ConfigError: if a number is out of range.
    """

    name: ClassVar[str] = "radial"

    decay: float = 0.2
    near: int = 1
    first_frame: bool = True
    floor: Extent = 128

    def __post_init__(self) -> None:
        super().__post_init__()
        check_extent(self.name, "floor", self.floor)
        if isinstance(self.decay, bool) or not isinstance(self.decay, int | float) or not 0 < self.decay < float("inf"):
            raise ConfigError(f"{self.name}: decay is {self.decay!r}; give a number above 0, for example 0.2")
        if isinstance(self.near, bool) or not isinstance(self.near, int) or self.near < 0:
            raise ConfigError(f"{self.name}: near is {self.near!r}; give a frame distance of 0 or more")
        if not isinstance(self.first_frame, bool):
            raise ConfigError(f"{self.name}: first_frame is {self.first_frame!r}; give true or false")

    def rules(self, layout: TokenLayout) -> tuple[TokenRule, ...]:
        """The band by displacement, and the first frame's keys."""
        frames, height, width = layout.grid
        flat = torch.arange(1 - height, height)[:, None] * width + torch.arange(1 - width, width)[None, :]
        reach = torch.tensor([self._reach(d, height * width) for d in range(frames)], dtype=torch.float64)
        table = flat.abs().double() <= reach[:, None, None]
        frame = torch.arange(frames)
        everything = TokenRule.axes(layout.grid)
        band = TokenRule(
            everything.frames, everything.rows, everything.columns, (frame[:, None] - frame[None, :]).abs(), table
        )
        return (band, key_frames(layout, 1)) if self.first_frame else (band,)

    def resolved(self, layout: TokenLayout) -> str:
        """Decay, the width's range in tokens, and what is kept whole."""
        area = layout.grid.height * layout.grid.width
        reaches = [min(self._reach(d, area), area) for d in range(self.near + 1, layout.grid.frames)]
        seen = [r for r in reaches if r >= 0]
        text = f"decay {self.decay:g}, frames up to {self.near} apart whole"
        if seen:
            widths = " to ".join(f"{r:g}" for r in dict.fromkeys((max(seen), min(seen))))
            text += f", further ones within {widths} of {area} tokens"
        if len(seen) < len(reaches):
            text += f", {len(reaches) - len(seen)} of {len(reaches)} distances skipped"
        return text + (", first frame kept by all" if self.first_frame else "")

    def _reach(self, distance: int, area: int) -> float:
        """Largest kept difference of places in frames ``distance`` apart; -1 where the distance is skipped."""
        if distance <= self.near:
            return float(area)
        floor = resolve(self.floor, area) if isinstance(self.floor, float) else self.floor
        natural = 2.0 ** (area.bit_length() - distance.bit_length())
        if natural < floor and distance % int(floor / natural):
            return -1.0
        return max(natural * self.decay, float(floor))
