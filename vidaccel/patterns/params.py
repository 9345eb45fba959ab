"""Window sizes as plans write them: whole numbers are absolute, fractions are shares of an axis."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, TypeAlias

from ..errors import ConfigError

__all__ = [
    "Extent",
    "Extents",
    "check_count",
    "check_coverage",
    "check_extent",
    "check_extents",
    "check_flag",
    "check_share",
    "resolve",
    "spell",
]

#: ``2`` is two tiles or tokens, ``0.5`` half of the axis, ``1.0`` all of it.
Extent: TypeAlias = int | float
#: One :data:`Extent` per axis, in (frames, height, width) order.
Extents: TypeAlias = tuple[Extent, Extent, Extent]


def check_extent(owner: str, field: str, value: Any) -> None:
    """Raises :class:`ConfigError` unless ``value`` is a whole number >= 1 or a fraction in (0, 1]."""
    whole = isinstance(value, int) and not isinstance(value, bool) and value >= 1
    if not whole and not (isinstance(value, float) and 0.0 < value <= 1.0):
        raise ConfigError(
            f"{owner}: {field} is {value!r}; give a whole number of at least 1, or a fraction of the axis above 0.0"
            " and up to 1.0"
        )


def check_extents(owner: str, field: str, value: Any) -> Extents:
    """The three checked extents of ``value`` as a tuple.

    Raises:
        ConfigError: unless ``value`` is a sequence of three extents.
    """
    if not isinstance(value, Sequence) or isinstance(value, str) or len(value) != 3:
        raise ConfigError(f"{owner}: {field} is {value!r}; give three numbers in (frames, height, width) order")
    for axis, extent in zip(("frames", "height", "width"), value, strict=True):
        check_extent(owner, f"{field} along {axis}", extent)
    frames, height, width = value
    return frames, height, width


def check_coverage(owner: str, field: str, value: Any) -> None:
    """Raises :class:`ConfigError` unless ``value`` is a share in [0, 1)."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1:
        raise ConfigError(f"{owner}: {field} is {value!r}; give a share of a block from 0 up to, not including, 1")


def check_share(owner: str, field: str, value: Any, *, zero: bool = False) -> None:
    """Raises :class:`ConfigError` unless ``value`` is a share in (0, 1], or in [0, 1] with ``zero``."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not 0 <= value <= 1 or (value == 0 and not zero):
        raise ConfigError(f"{owner}: {field} is {value!r}; give a share {'from' if zero else 'above'} 0 and up to 1")


def check_count(owner: str, field: str, value: Any, least: int = 1) -> None:
    """Raises :class:`ConfigError` unless ``value`` is a whole number of at least ``least``."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ConfigError(f"{owner}: {field} is {value!r}; give a whole number of at least {least}")


def check_flag(owner: str, field: str, value: Any) -> None:
    """Raises :class:`ConfigError` unless ``value`` is true or false."""
    if not isinstance(value, bool):
        raise ConfigError(f"{owner}: {field} is {value!r}; give true or false")


def resolve(extent: Extent, axis: int) -> int:
    """An extent on an axis of ``axis`` positions: at least 1, at most the axis, fractions rounded half up."""
    wanted = math.floor(extent * axis + 0.5) if isinstance(extent, float) else extent
    return max(1, min(wanted, axis))


def spell(extents: Sequence[Extent]) -> str:
    """``(3, 5, 0.5)`` as ``3x5x0.5``."""
    return "x".join(f"{e:g}" if isinstance(e, float) else str(e) for e in extents)
