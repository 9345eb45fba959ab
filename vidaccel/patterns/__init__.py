"""Patterns: which blocks attend which. One file a family, built by name from a plan's specs."""

from __future__ import annotations

from ..discovery import modules_of
from .anchor import Anchor
from .bands import SpatialBand, TemporalBand
from .base import CoveragePattern, Pattern, StaticPattern
from .clustered import Clustered
from .dense import Dense
from .draft import Draft
from .dynamic import DynamicPattern, HeadOrder, Heads, choose_blocks
from .error_routing import ErrorRouting
from .first_frame_sink import FirstFrameSink
from .first_places_sink import FirstPlacesSink
from .hash_buckets import HashBuckets
from .hierarchical import Hierarchical
from .minference import MInference
from .neighborhood import Neighborhood
from .ordered import Ordered
from .pasa import Pasa
from .pooled import PooledTopK, PooledTopP
from .radial import Radial
from .rectified import Rectified
from .registry import build_pattern, build_static, pattern_names, register
from .reuse import Reuse
from .s2 import Shards
from .sale import Sale
from .seer import Seer
from .sliding_tile import SlidingTile
from .sparge import Sparge
from .stochastic import StochasticTopK
from .svg import Svg
from .svg2 import Svg2
from .svg_ear import SvgEar
from .union import Union
from .xattention import XAttention

__all__ = [
    "Anchor",
    "Clustered",
    "CoveragePattern",
    "Dense",
    "Draft",
    "DynamicPattern",
    "ErrorRouting",
    "FirstFrameSink",
    "FirstPlacesSink",
    "HashBuckets",
    "HeadOrder",
    "Heads",
    "Hierarchical",
    "MInference",
    "Neighborhood",
    "Ordered",
    "Pasa",
    "Pattern",
    "PooledTopK",
    "PooledTopP",
    "Radial",
    "Rectified",
    "Reuse",
    "Sale",
    "Seer",
    "Shards",
    "SlidingTile",
    "Sparge",
    "SpatialBand",
    "StaticPattern",
    "StochasticTopK",
    "Svg",
    "Svg2",
    "SvgEar",
    "TemporalBand",
    "Union",
    "XAttention",
    "build_pattern",
    "build_static",
    "choose_blocks",
    "pattern_names",
    "register",
]

# A file of this folder registers what it defines, whether or not its names are exported above.
modules_of(__name__)
