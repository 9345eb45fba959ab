"""The first frames as a sink that every query attends."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from ..errors import ConfigError
from ..layout import TokenLayout
from .base import StaticPattern
from .pairs import TokenRule
from .params import Extent, check_extent, resolve
from .registry import register

__all__ = ["FirstFrameSink", "key_frames"]


@register
@dataclass(frozen=True, kw_only=True, eq=False)
class FirstFrameSink(StaticPattern):
    """Every query keeps the keys of the first frames. Nearly always a member of a union.

    Source: the sink of Sparse VideoGen and Radial Attention on Wan.

    Args:
        frames: how many frames; a whole number, or a fraction of the video.
        queries: whether the queries of those frames also keep every key.

    Raises:
        ConfigError: if ``frames`` is out of range.
    """

    name: ClassVar[str] = "first_frame_sink"

    frames: Extent = 1
    queries: bool = False

    def __post_init__(self) -> None:
        check_extent(self.name, "frames", self.frames)
        if not isinstance(self.queries, bool):
            raise ConfigError(f"{self.name}: queries is {self.queries!r}; give true or false")

    def rules(self, layout: TokenLayout) -> tuple[TokenRule, ...]:
        """One rule over frames."""
        return (key_frames(layout, resolve(self.frames, layout.grid.frames), queries=self.queries),)

    def resolved(self, layout: TokenLayout) -> str:
        """Frames kept, and for whom."""
        count = resolve(self.frames, layout.grid.frames)
        who = "as keys, and all keys by its queries" if self.queries else "as keys"
        return f"first {count} of {layout.grid.frames} frames {who}"


def key_frames(layout: TokenLayout, count: int, *, queries: bool = False) -> TokenRule:
    """The rule that keeps the keys of the first ``count`` frames, and with ``queries`` all keys for their queries."""
    first = torch.arange(layout.grid.frames) < count
    keep = first[None, :] | first[:, None] if queries else first[None, :].expand(len(first), -1)
    return TokenRule.axes(layout.grid, frames=keep)
