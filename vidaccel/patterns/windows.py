"""Static patterns as parts of dynamic ones: blocks that are kept whatever the call looks like."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch

from ..errors import ConfigError
from ..layout import TokenLayout
from .base import StaticPattern
from .dynamic import Heads
from .placed import first_frame, near_blocks, placed_blocks

__all__ = ["check_window", "first_frame_blocks", "neighbour_blocks", "static_blocks", "window_blocks"]


def check_window(owner: str, field: str, value: Any) -> None:
    """Raises :class:`ConfigError` unless ``value`` is a static pattern of whole blocks or ``None``."""
    if value is not None and not isinstance(value, StaticPattern):
        raise ConfigError(
            f"{owner}: {field} is {value!r}; give a pattern that is fixed by the token grid as a mapping with 'name'"
            " and its parameters, or null"
        )
    if value is not None and value.cuts_blocks:
        raise ConfigError(
            f"{owner}: {field} is {value!r}, which masks tokens inside blocks; a dynamic pattern keeps whole blocks, so"
            " set exact=false there"
        )


def window_blocks(window: StaticPattern | None, heads: Heads) -> torch.Tensor:
    """The window's pairs of video blocks, bool [NV,NV] on the device of q; all false without a window."""
    if window is None:
        blocks = heads.layout.num_video_blocks
        return torch.zeros(blocks, blocks, dtype=torch.bool, device=heads.q.device)
    return static_blocks(window, heads)


def static_blocks(pattern: StaticPattern, heads: Heads) -> torch.Tensor:
    """A static pattern's pairs of video blocks, bool [NV,NV] on the device of q; cached, do not write into it."""
    if heads.order is not None:
        return placed_blocks(pattern, heads.layout, heads.order, heads.q.device)
    return _static(pattern, heads.layout, heads.q.device)


def neighbour_blocks(heads: Heads, reach: int) -> torch.Tensor:
    """Pairs of video blocks at most ``reach`` tiles apart along every axis, bool [NV,NV] on the device of q; cached.

    In another order of tokens a tile is what a block holds, see :func:`~.placed.near_blocks`.
    """
    if heads.order is not None:
        return near_blocks(heads.layout, heads.order, reach, heads.q.device)
    return _neighbours(heads.layout, reach, heads.q.device)


def first_frame_blocks(heads: Heads) -> torch.Tensor:
    """Video blocks that hold tokens of the first frame, bool [NV] on the device of q; cached."""
    if heads.order is not None:
        return first_frame(heads.layout, heads.order, heads.q.device)
    return _first_frame(heads.layout, heads.q.device)


@lru_cache(maxsize=64)
def _static(pattern: StaticPattern, layout: TokenLayout, device: torch.device) -> torch.Tensor:
    return pattern.video_blocks(layout).to(device)


@lru_cache(maxsize=64)
def _neighbours(layout: TokenLayout, reach: int, device: torch.device) -> torch.Tensor:
    tile = layout.block_coords
    return ((tile[:, None] - tile[None]).abs().amax(-1) <= reach).to(device)


@lru_cache(maxsize=64)
def _first_frame(layout: TokenLayout, device: torch.device) -> torch.Tensor:
    return (layout.block_coords[:, 0] == 0).to(device)
