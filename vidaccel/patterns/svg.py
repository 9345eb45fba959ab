"""Sparse VideoGen: each call gives each head the static pattern that does least harm to a few sampled queries."""

from __future__ import annotations

from collections.abc import Sequence
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
    the patterns are rounded to blocks of the layout, each sample of a batch chooses for itself, and no query is drawn
    twice.

    Args:
        patterns: static patterns to choose from; the two bands of SVG by default.
        profiles: what stands for each of them in the comparison, in the same order (SVG compares bands of one fixed
            width, whatever the width that runs); ``None`` for the patterns themselves.
        sink: a static pattern whose blocks are kept under every choice, in the comparison too, or ``None``.
        rows: queries that are drawn in each call.
        first: the queries are drawn among so many that come first in frame-major order (published: 10000); ``None``
            for all.
        seed: of the drawing.

    Raises:
        ConfigError: if there are fewer than two patterns, one is not static, or a number is out of range.
    """

    name: ClassVar[str] = "svg"
    places = "order"

    patterns: tuple[StaticPattern, ...] = (SpatialBand(), TemporalBand())
    profiles: tuple[StaticPattern, ...] | None = None
    sink: StaticPattern | None = None
    rows: int = 64
    first: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.patterns, list | tuple) or len(self.patterns) < 2:
            raise ConfigError(f"{self.name}: patterns is {self.patterns!r}; give a list of two or more patterns")
        self._check("patterns", self.patterns)
        if self.profiles is not None:
            if not isinstance(self.profiles, list | tuple) or len(self.profiles) != len(self.patterns):
                raise ConfigError(
                    f"{self.name}: profiles is {self.profiles!r}; give one for each of the {len(self.patterns)}"
                    " patterns, or null"
                )
            self._check("profiles", self.profiles)
        check_window(self.name, "sink", self.sink)
        check_count(self.name, "rows", self.rows)
        if self.first is not None:
            check_count(self.name, "first", self.first)
        check_count(self.name, "seed", self.seed, 0)

    def _check(self, field: str, members: Sequence[StaticPattern]) -> None:
        for member in members:
            if member is None:
                raise ConfigError(f"{self.name}: a pattern of {field} is null; give each as a mapping with 'name'")
            check_window(self.name, f"a member of {field}", member)
        object.__setattr__(self, field, tuple(members))

    def choose(self, heads: Heads) -> torch.Tensor:
        """The blocks of each head's best pattern, bool [B,H,NV,NV]."""
        masks = self._masks(self.patterns, heads)
        compared = masks if self.profiles is None else self._masks(self.profiles, heads)
        return masks[self.errors(heads, compared).argmin(-1)]

    def _masks(self, patterns: Sequence[StaticPattern], heads: Heads) -> torch.Tensor:
        kept = torch.stack([static_blocks(pattern, heads) for pattern in patterns])
        return kept | window_blocks(self.sink, heads)

    def errors(self, heads: Heads, masks: torch.Tensor) -> torch.Tensor:
        """Mean squared error of the sampled outputs under each mask [P,NV,NV], float32 [B,H,P]; text is kept."""
        layout = heads.layout
        drawn = sample_rows(heads, self.rows, self.seed, self.first)
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
        among = "" if self.first is None else f" among the first {min(self.first, layout.grid.tokens)}"
        return f"{members}{sink}, by {self.rows} queries{among}"
