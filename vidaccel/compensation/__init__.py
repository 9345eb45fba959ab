"""Compensations: what makes up for skipped blocks. One file a rule, built by name from a plan's specs."""

from __future__ import annotations

from ..discovery import modules_of
from .base import Call, Compensation
from .coarse import Coarse
from .compensation_token import CompensationToken
from .delta import Delta
from .dropped import Dropped
from .linear import Linear
from .merged_keys import MergedKeys
from .pooled_tail import PooledTail
from .rectification import Rectification
from .registry import build_compensation, compensation_names, register
from .rettention import Rettention

__all__ = [
    "Call",
    "Coarse",
    "Compensation",
    "CompensationToken",
    "Delta",
    "Dropped",
    "Linear",
    "MergedKeys",
    "PooledTail",
    "Rectification",
    "Rettention",
    "build_compensation",
    "compensation_names",
    "register",
]

# A file of this folder registers what it defines, whether or not its names are exported above.
modules_of(__name__)
