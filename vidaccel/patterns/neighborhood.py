"""Generalised neighborhood attention (GNA): a window of tokens with stride and dilation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from ..axisrule import AxisRule
from ..errors import ConfigError
from ..layout import TokenLayout
from .base import CoveragePattern
from .pairs import TokenRule
from .params import Extent, Extents, check_extents, check_flag, resolve, spell
from .registry import register

__all__ = ["Neighborhood"]


@register
@dataclass(frozen=True, kw_only=True, eq=False)
class Neighborhood(CoveragePattern):
    """Each token attends the window around the leader of its stride group.

    Along an axis, among the X tokens of one dilation residue: leader = min((q//s)*s + s//2, X-1), centre =
    clamp(leader, w//2, X-1-(w//2 + w%2 - 1)), kept from centre - w//2 to centre + w//2 + w%2 - 1. Stride 1 is
    neighborhood attention, stride = window blocked attention, and strides that fit the tiles need no rounding.
    Source: NATTEN.

    Args:
        window: tokens along (frames, height, width), counted within a dilation residue; whole numbers, or fractions
            of the axis. A window longer than the axis is the axis.
        stride: queries that share a window, per axis, at most the window; or ``"tile"``, the layout's tile (cut to
            the window).
        dilation: distance of neighboring window tokens, per axis.
        min_coverage, min_columns: see :class:`CoveragePattern`.
        exact: mask the tokens of partly covered blocks, so that exactly the formula's pairs are attended, instead of
            keeping such blocks whole. Dropped tokens of a partial block are gone: a tail summarises skipped blocks
            only. Where stride and window fit the tiles there are no partial blocks and it changes nothing.

    Raises:
        ConfigError: if a number is out of range, a stride is larger than a whole-number window, or ``exact`` is
            asked for together with ``min_coverage`` or ``min_columns``, which drop pairs of the formula.
    """

    name: ClassVar[str] = "neighborhood"

    window: Extents
    stride: tuple[int, int, int] | Literal["tile"] = (1, 1, 1)
    dilation: tuple[int, int, int] = (1, 1, 1)
    exact: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_flag(self.name, "exact", self.exact)
        for field in ("min_coverage", "min_columns"):
            share = getattr(self, field)
            if self.exact and share > 0:
                raise ConfigError(
                    f"{self.name}: exact keeps every pair of the formula and {field} {share} drops some; give one of"
                    " them"
                )
        for field in ("window", "dilation") if self.stride == "tile" else ("window", "stride", "dilation"):
            extents = check_extents(self.name, field, getattr(self, field))
            if field != "window" and not all(isinstance(e, int) for e in extents):
                raise ConfigError(f"{self.name}: {field} is {extents}; give three whole numbers of at least 1")
            object.__setattr__(self, field, extents)
        if self.stride != "tile":
            for w, s in zip(self.window, self.stride, strict=True):
                if isinstance(w, int) and s > w:
                    raise ConfigError(
                        f"{self.name}: stride {spell(self.stride)} is larger than window {spell(self.window)}; give"
                        " at most the window, or queries would miss their own neighborhood"
                    )

    def rules(self, layout: TokenLayout) -> tuple[TokenRule, ...]:
        """One rule: the window along each axis."""
        return (TokenRule.axes(layout.grid, *self._axes(layout)),)

    @property
    def cuts_blocks(self) -> bool:
        """With ``exact``."""
        return self.exact

    def token_rule(self, layout: TokenLayout) -> AxisRule | None:
        """The windows along the axes, with ``exact``."""
        return AxisRule(layout, *(keep[None] for keep in self._axes(layout))) if self.exact else None

    def density(self, layout: TokenLayout) -> float:
        """Share of the video's token pairs that is attended: with ``exact`` those of the formula."""
        return self.exact_density(layout) if self.exact else super().density(layout)

    def rounding(self, layout: TokenLayout) -> float:
        """Attended token pairs over those of the formula: 1 with ``exact``."""
        return 1.0 if self.exact else super().rounding(layout)

    def describe(self, layout: TokenLayout) -> str:
        """One line; with ``exact`` how many of the kept blocks are partial."""
        if not self.exact:
            return super().describe(layout)
        mask = self.mask(layout)
        blocks, partial = (
            int(kept[..., layout.video_blocks, layout.video_blocks].sum()) for kept in (mask.dense, mask.partial)
        )
        return (
            f"{self.name}, {self.resolved(layout)}: keeps exactly {self.exact_density(layout):.1%} of the video's token"
            f" pairs, in {blocks} pairs of {layout.tile_shape} blocks, {partial} of them partial"
        )

    def _axes(self, layout: TokenLayout) -> list[torch.Tensor]:
        stride = tuple(layout.tile_shape) if self.stride == "tile" else self.stride
        settings = zip(layout.grid, self.window, stride, self.dilation, strict=True)
        return [_window(n, w, s, d) for n, w, s, d in settings]

    def resolved(self, layout: TokenLayout) -> str:
        """Window in tokens, stride and dilation."""
        axes = zip(self.window, layout.grid, self.dilation, strict=True)
        tokens = [resolve(w, -(-n // min(d, n))) for w, n, d in axes]
        stride = tuple(layout.tile_shape) if self.stride == "tile" else self.stride
        text = f"window {spell(tokens)} of {layout.grid} tokens"
        text += f", stride {spell([min(s, w) for s, w in zip(stride, tokens, strict=True)])}"
        return text + (f", dilation {spell(self.dilation)}" if max(self.dilation) > 1 else "")


def _window(axis: int, window: Extent, stride: int, dilation: int) -> torch.Tensor:
    """Kept pairs of positions along one axis, bool [axis, axis]."""
    keep = torch.zeros(axis, axis, dtype=torch.bool)
    for residue in range(min(dilation, axis)):
        members = torch.arange(residue, axis, dilation)
        count = len(members)
        w = resolve(window, count)
        s = min(stride, w)
        position = torch.arange(count)
        leader = torch.clamp(position // s * s + s // 2, max=count - 1)
        before, after = w // 2, w // 2 + w % 2 - 1
        centre = leader.clamp(before, count - 1 - after)
        kept = (position >= centre[:, None] - before) & (position <= centre[:, None] + after)
        keep[members[:, None], members[None, :]] = kept
    return keep
