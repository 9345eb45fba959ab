"""Patterns: which blocks attend which. One file a family, built by name from a plan's specs."""

from __future__ import annotations

from .anchor import Anchor
from .bands import SpatialBand, TemporalBand
from .base import CoveragePattern, Pattern, StaticPattern
from .dense import Dense
from .draft import Draft
from .dynamic import DynamicPattern, Heads, choose_blocks
from .error_routing import ErrorRouting
from .first_frame_sink import FirstFrameSink
from .hash_buckets import HashBuckets
from .hierarchical import Hierarchical
from .minference import MInference
from .neighborhood import Neighborhood
from .pooled import PooledTopK, PooledTopP
from .radial import Radial
from .rectified import Rectified
from .registry import build_pattern, build_static, pattern_names, register
from .reuse import Reuse
from .sale import Sale
from .sliding_tile import SlidingTile
from .sparge import Sparge
from .stochastic import StochasticTopK
from .svg import Svg
from .union import Union
from .xattention import XAttention

__all__ = [
    "Anchor",
    "CoveragePattern",
    "Dense",
    "Draft",
    "DynamicPattern",
    "ErrorRouting",
    "FirstFrameSink",
    "HashBuckets",
    "Heads",
    "Hierarchical",
    "MInference",
    "Neighborhood",
    "Pattern",
    "PooledTopK",
    "PooledTopP",
    "Radial",
    "Rectified",
    "Reuse",
    "Sale",
    "SlidingTile",
    "Sparge",
    "SpatialBand",
    "StaticPattern",
    "StochasticTopK",
    "Svg",
    "TemporalBand",
    "Union",
    "XAttention",
    "build_pattern",
    "build_static",
    "choose_blocks",
    "pattern_names",
    "register",
]
