"""Which families exist, and which one a model belongs to."""

from __future__ import annotations

from .base import Family
from .wan import WanFamily

__all__ = ["families", "family_of", "register_family"]

_families: list[Family] = [WanFamily()]


def families() -> tuple[Family, ...]:
    """All families, user-registered ones first."""
    return tuple(_families)


def family_of(model: object) -> Family | None:
    """The family of a transformer, or ``None`` if no family knows it."""
    return next((family for family in _families if family.matches(model)), None)


def register_family(family: Family) -> None:
    """Adds a family for your own transformer; it is asked before the built-in ones."""
    _families.insert(0, family)
