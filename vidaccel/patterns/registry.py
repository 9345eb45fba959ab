"""Patterns by name: what a plan's :class:`PatternSpec` is built into."""

from __future__ import annotations

import dataclasses
from typing import Any, TypeVar

from ..configs.pattern_spec import PatternSpec
from ..errors import ConfigError
from .base import Pattern, StaticPattern

__all__ = ["build_pattern", "build_static", "pattern_class", "pattern_names", "register"]

_PATTERNS: dict[str, type[Pattern]] = {}
_P = TypeVar("_P", bound=Pattern)


def register(cls: type[_P]) -> type[_P]:
    """Class decorator: makes the pattern buildable by its ``name``.

    Raises:
        ConfigError: if another class has the name already.
    """
    if _PATTERNS.setdefault(cls.name, cls) is not cls:
        raise ConfigError(f"two patterns are called {cls.name!r}; give {cls.__name__} a name of its own")
    return cls


def pattern_names() -> list[str]:
    """Names that :func:`build_pattern` knows, sorted."""
    return sorted(_PATTERNS)


def build_pattern(spec: PatternSpec) -> Pattern:
    """The pattern that a spec names, with the specs nested in its parameters built as well.

    Raises:
        ConfigError: if the name or a parameter is unknown, missing or out of range.
    """
    cls = pattern_class(spec)
    fields = {_parameter(f): f for f in dataclasses.fields(cls) if f.init}
    unknown = sorted(set(spec.kwargs) - set(fields))
    needed = sorted(n for n, f in fields.items() if _required(f) and n not in spec.kwargs)
    if unknown or needed:
        found = f"has no parameter {', '.join(unknown)}" if unknown else f"needs {', '.join(needed)}"
        raise ConfigError(f"pattern {spec.name!r} {found}; its parameters are {', '.join(fields) or 'none'}")
    return cls(**{fields[name].name: _built(value) for name, value in spec.kwargs.items()})


def build_static(spec: PatternSpec) -> StaticPattern:
    """The static pattern that a spec names.

    Raises:
        ConfigError: as :func:`build_pattern`, and if the pattern chooses its blocks in each call.
    """
    pattern = build_pattern(spec)
    if not isinstance(pattern, StaticPattern):
        raise ConfigError(f"pattern {spec} chooses its blocks in each call; give one that is fixed by the token grid")
    return pattern


def pattern_class(spec: PatternSpec) -> type[Pattern]:
    """The class that a spec names.

    Raises:
        ConfigError: if there is none.
    """
    cls = _PATTERNS.get(spec.name)
    if cls is None:
        raise ConfigError(f"no pattern is called {spec.name!r}; valid are {', '.join(pattern_names())}")
    return cls


def _parameter(field: dataclasses.Field[Any]) -> str:
    """The name of a field in specs: its own, unless its metadata has another as ``"parameter"``."""
    return str(field.metadata.get("parameter", field.name))


def _required(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _built(value: Any) -> Any:
    """``value`` with every nested spec built into its pattern."""
    if isinstance(value, tuple):
        return tuple(_built(v) for v in value)
    return build_pattern(value) if isinstance(value, PatternSpec) else value
