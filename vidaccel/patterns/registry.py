"""Patterns by name: what a plan's :class:`PatternSpec` is built into."""

from __future__ import annotations

from ..configs.building import Registry
from ..configs.pattern_spec import PatternSpec
from ..errors import ConfigError
from .base import Pattern, StaticPattern

__all__ = ["build_pattern", "build_static", "pattern_class", "pattern_names", "register"]

_REGISTRY: Registry[Pattern] = Registry("pattern")
_PATTERNS = _REGISTRY.known

#: Class decorator: makes the pattern buildable by its ``name``.
register = _REGISTRY.register
#: Names that :func:`build_pattern` knows, sorted.
pattern_names = _REGISTRY.names
#: The class that a spec names; :class:`ConfigError` if there is none.
pattern_class = _REGISTRY.class_of
#: The pattern that a spec names; :class:`ConfigError` if the name or a parameter is unknown, missing or out of range.
build_pattern = _REGISTRY.build


def build_static(spec: PatternSpec) -> StaticPattern:
    """The static pattern that a spec names.

    Raises:
        ConfigError: as :func:`build_pattern`, and if the pattern chooses its blocks in each call.
    """
    pattern = build_pattern(spec)
    if not isinstance(pattern, StaticPattern):
        raise ConfigError(f"pattern {spec} chooses its blocks in each call; give one that is fixed by the token grid")
    return pattern
