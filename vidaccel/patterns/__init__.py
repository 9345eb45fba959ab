"""Static patterns: which blocks attend which, by rule alone. One file a family, built by name from a plan's specs."""

from __future__ import annotations

from .bands import SpatialBand, TemporalBand
from .base import CoveragePattern, Pattern
from .dense import Dense
from .first_frame_sink import FirstFrameSink
from .neighborhood import Neighborhood
from .radial import Radial
from .registry import build_pattern, pattern_names, register
from .sliding_tile import SlidingTile
from .union import Union

__all__ = [
    "CoveragePattern",
    "Dense",
    "FirstFrameSink",
    "Neighborhood",
    "Pattern",
    "Radial",
    "SlidingTile",
    "SpatialBand",
    "TemporalBand",
    "Union",
    "build_pattern",
    "pattern_names",
    "register",
]
