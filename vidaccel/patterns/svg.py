"""Sparse VideoGen: each call gives each head the static pattern that does least harm to a few sampled queries."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from ..errors import ConfigError
from ..layout import TokenLayout
from .bands import SpatialBand, TemporalBand
from .base import StaticPattern
from .dynamic import DynamicPattern, Heads
from .params import check_count
from .registry import register
from .sampled import sample_rows
from .windows import check_window, static_blocks, window_blocks

__all__ = ["Svg"]


@register
@dataclass(frozen=True, kw_only=True, eq=False)
class Svg(DynamicPattern):
    """Each head follows the one of two or more static patterns whose output is nearest to the full one.

    ``rows`` queries are drawn, and their attention computed in full and under each pattern; a head takes the pattern of
    least mean squared difference, its first among equals. Source: Sparse VideoGen (SVG), which chooses between a band
    in frame-major order (spatial head) and one in token-major order (temporal head) in the same way. Different here:
    the patterns are compared as they run, rounded to blocks, and each sample of a batch chooses for itself.

    Args:
        patterns: static patterns to choose from; the two bands of SVG by default.
        sink: a static pattern whose blocks are kept under every choice (SVG on Wan: the first frame), or ``None``.
        rows: queries that are drawn in each call.
        seed: of the drawing.

    Raises:
        ConfigError: if there are fewer than two patterns, one is not static, or a number is out of range.
    """

    name: ClassVar[str] = "svg"
    places = "order"

    patterns: tuple[StaticPattern, ...] = (SpatialBand(), TemporalBand())
    sink: StaticPattern | None = None
    rows: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.patterns, list | tuple) or len(self.patterns) < 2:
            raise ConfigError(f"{self.name}: patterns is {self.patterns!r}; give a list of two or more patterns")
        for member in self.patterns:
            if member is None:
                raise ConfigError(f"{self.name}: a pattern is null; give each as a mapping with 'name'")
            check_window(self.name, "a member of patterns", member)
        object.__setattr__(self, "patterns", tuple(self.patterns))
        check_window(self.name, "sink", self.sink)
        check_count(self.name, "rows", self.rows)
        check_count(self.name, "seed", self.seed, 0)

    def choose(self, heads: Heads) -> torch.Tensor:
        """The blocks of each head's best pattern, bool [B,H,NV,NV]."""
        masks = torch.stack([static_blocks(pattern, heads) for pattern in self.patterns])
        masks = masks | window_blocks(self.sink, heads)
        return masks[self.errors(heads, masks).argmin(-1)]

    def errors(self, heads: Heads, masks: torch.Tensor) -> torch.Tensor:
        """Mean squared error of the sampled outputs under each mask [P,NV,NV], float32 [B,H,P]; text is kept."""
        layout = heads.layout
        drawn = sample_rows(heads, self.rows, self.seed)
        v = heads.v.transpose(1, 2).float()
        full = drawn.logits.softmax(-1) @ v
        found = []
        for mask in masks:
            blocks = torch.ones(len(drawn.blocks), layout.num_blocks, dtype=torch.bool, device=mask.device)
            blocks[:, layout.video_blocks] = mask[drawn.blocks]
            keep = blocks[:, layout.block_of_token.to(mask.device)]
            out = drawn.logits.masked_fill(~keep, -torch.inf).softmax(-1) @ v
            found.append((out - full).square().mean((-1, -2)))
        return torch.stack(found, -1)

    def resolved(self, layout: TokenLayout) -> str:
        """The patterns to choose from."""
        members = " or ".join(f"{m.name} ({m.resolved(layout)}, {m.density(layout):.1%})" for m in self.patterns)
        sink = "" if self.sink is None else f" + {self.sink.name} ({self.sink.resolved(layout)})"
        return f"{members}{sink}, by {self.rows} queries"
