"""Patterns: which blocks attend which. One file a family, built by name from a plan's specs."""

from __future__ import annotations

from .bands import SpatialBand, TemporalBand
from .base import CoveragePattern, Pattern, StaticPattern
from .dense import Dense
from .dynamic import DynamicPattern, Heads, choose_blocks
from .first_frame_sink import FirstFrameSink
from .neighborhood import Neighborhood
from .radial import Radial
from .registry import build_pattern, build_static, pattern_names, register
from .sliding_tile import SlidingTile
from .union import Union

__all__ = [
    "CoveragePattern",
    "Dense",
    "DynamicPattern",
    "FirstFrameSink",
    "Heads",
    "Neighborhood",
    "Pattern",
    "Radial",
    "SlidingTile",
    "SpatialBand",
    "StaticPattern",
    "TemporalBand",
    "Union",
    "build_pattern",
    "build_static",
    "choose_blocks",
    "pattern_names",
    "register",
]
