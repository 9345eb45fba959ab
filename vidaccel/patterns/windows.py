"""Static patterns as parts of dynamic ones: blocks that are kept whatever the call looks like."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch

from ..errors import ConfigError
from ..layout import TokenLayout
from .base import StaticPattern
from .dynamic import Heads

__all__ = ["check_window", "first_frame_blocks", "neighbour_blocks", "static_blocks", "window_blocks"]


def check_window(owner: str, field: str, value: Any) -> None:
    """Raises :class:`ConfigError` unless ``value`` is a static pattern or ``None``."""
    if value is not None and not isinstance(value, StaticPattern):
        raise ConfigError(
            f"{owner}: {field} is {value!r}; give a pattern that is fixed by the token grid as a mapping with 'name'"
            " and its parameters, or null"
        )


def window_blocks(window: StaticPattern | None, heads: Heads) -> torch.Tensor:
    """The window's pairs of video blocks, bool [NV,NV] on the device of q; all false without a window."""
    if window is None:
        blocks = heads.layout.num_video_blocks
        return torch.zeros(blocks, blocks, dtype=torch.bool, device=heads.q.device)
    return static_blocks(window, heads.layout, heads.q.device)


@lru_cache(maxsize=64)
def static_blocks(pattern: StaticPattern, layout: TokenLayout, device: torch.device) -> torch.Tensor:
    """A static pattern's pairs of video blocks, bool [NV,NV] on ``device``; cached, do not write into it."""
    return pattern.video_blocks(layout).to(device)


@lru_cache(maxsize=64)
def neighbour_blocks(layout: TokenLayout, reach: int, device: torch.device) -> torch.Tensor:
    """Pairs of video blocks at most ``reach`` tiles apart along every axis, bool [NV,NV] on ``device``; cached."""
    tile = layout.block_coords
    return ((tile[:, None] - tile[None]).abs().amax(-1) <= reach).to(device)


@lru_cache(maxsize=64)
def first_frame_blocks(layout: TokenLayout, device: torch.device) -> torch.Tensor:
    """Video blocks that hold tokens of the first frame, bool [NV] on ``device``; cached."""
    return (layout.block_coords[:, 0] == 0).to(device)
