"""Compensations by name: what a plan's :class:`CompensationSpec` is built into."""

from __future__ import annotations

from ..configs.building import Registry
from .base import Compensation

__all__ = ["build_compensation", "compensation_class", "compensation_names", "register"]

_REGISTRY: Registry[Compensation] = Registry("compensation")

#: Class decorator: makes the compensation buildable by its ``name``.
register = _REGISTRY.register
#: Names that :func:`build_compensation` knows, sorted.
compensation_names = _REGISTRY.names
#: The class that a spec names; :class:`ConfigError` if there is none.
compensation_class = _REGISTRY.class_of
#: The compensation a spec names; :class:`ConfigError` if its name or a parameter is unknown, missing or out of range.
build_compensation = _REGISTRY.build
