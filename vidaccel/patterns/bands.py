"""Sparse VideoGen's two kinds of heads: a band in frame-major order, and one in token-major order."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from ..errors import ConfigError
from ..layout import TokenLayout
from .base import CoveragePattern
from .pairs import TokenRule
from .registry import register

__all__ = ["SpatialBand", "TemporalBand"]


@dataclass(frozen=True, kw_only=True, eq=False)
class _Band(CoveragePattern):
    """Tokens within a distance of each other in some order of the video.

    Args:
        width: half-width of the band: positions i and j are kept if \\|i - j\\| < width.
        unit: of ``width``: ``"frames"`` is the tokens of one frame (published: 1.5 for HunyuanVideo and CogVideoX, 2
            for Wan), ``"video"`` those of the whole video, so that a plan carries to another number of frames.
        min_coverage: see :class:`CoveragePattern`.

    Raises:
        ConfigError: if a number is out of range.
    """

    width: float = 1.5
    unit: Literal["frames", "video"] = "frames"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.unit not in ("frames", "video"):
            raise ConfigError(f"{self.name}: unit is {self.unit!r}; valid are 'frames' and 'video'")
        number = isinstance(self.width, int | float) and not isinstance(self.width, bool)
        if not number or not 0 < self.width <= (1 if self.unit == "video" else float("inf")):
            limit = "above 0 and up to 1" if self.unit == "video" else "above 0"
            raise ConfigError(f"{self.name}: width is {self.width!r} {self.unit}; give a number {limit}")

    def tokens(self, layout: TokenLayout) -> float:
        """Half-width of the band in tokens on this layout."""
        frames, height, width = layout.grid
        return self.width * height * width * (frames if self.unit == "video" else 1)

    def rules(self, layout: TokenLayout) -> tuple[TokenRule, ...]:
        """One rule by displacement."""
        frames, height, width = layout.grid
        df = torch.arange(1 - frames, frames)[:, None, None]
        ds = torch.arange(1 - height, height)[:, None] * width + torch.arange(1 - width, width)
        keep = self._distance(layout, df, ds).abs().double() < self.tokens(layout)
        return (TokenRule.displacement(layout.grid, keep),)

    def resolved(self, layout: TokenLayout) -> str:
        """Half-width of the band in frames and tokens."""
        tokens = self.tokens(layout)
        frames = tokens / (layout.grid.height * layout.grid.width)
        return f"within {frames:.3g} frames ({tokens:.5g} of {layout.grid.tokens} tokens) in {self._order} order"

    _order: ClassVar[str]

    def _distance(self, layout: TokenLayout, df: torch.Tensor, ds: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError


@register
@dataclass(frozen=True, kw_only=True, eq=False)
class SpatialBand(_Band):
    """A spatial head: tokens near each other in frame-major (raster) order, so the own frame and those next to it.

    Source: Sparse VideoGen. Arguments as the band's: width, unit, min_coverage.
    """

    name: ClassVar[str] = "spatial_band"
    _order: ClassVar[str] = "frame-major"

    def _distance(self, layout: TokenLayout, df: torch.Tensor, ds: torch.Tensor) -> torch.Tensor:
        return df * (layout.grid.height * layout.grid.width) + ds


@register
@dataclass(frozen=True, kw_only=True, eq=False)
class TemporalBand(_Band):
    """A temporal head: tokens near each other in token-major order, so about the same place in every frame.

    Source: Sparse VideoGen. Arguments as the band's: width, unit, min_coverage.
    """

    name: ClassVar[str] = "temporal_band"
    _order: ClassVar[str] = "token-major"

    def _distance(self, layout: TokenLayout, df: torch.Tensor, ds: torch.Tensor) -> torch.Tensor:
        return ds * layout.grid.frames + df
