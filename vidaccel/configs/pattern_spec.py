"""The name and the parameters of a pattern or a compensation, as plans and files hold them."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, TypeAlias, TypeVar

from ..errors import ConfigError

__all__ = ["CompensationSpec", "ParamValue", "PatternSpec"]

#: What a parameter may be. Whole numbers and fractions differ: 2 is two tiles or tokens, 1.0 the whole axis.
ParamValue: TypeAlias = "bool | int | float | str | PatternSpec | tuple[ParamValue, ...] | None"

_MAX_DEPTH = 6
_MAX_ITEMS = 64
_S = TypeVar("_S", bound="PatternSpec")


@dataclass(frozen=True, eq=False, repr=False)
class PatternSpec:
    """A pattern by name, not yet built. Make it with :meth:`make`.

    Args:
        name: the pattern's name in the registry of ``vidaccel.patterns``.
        params: (name, value) pairs, kept sorted by name; lists become tuples.

    Raises:
        ConfigError: if a name is not an identifier, or a value is not a plain value, a tuple of them or a spec.
    """

    kind: ClassVar[str] = "pattern"

    name: str
    params: tuple[tuple[str, ParamValue], ...] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name.isidentifier():
            raise ConfigError(f"a {self.kind}'s name is {self.name!r}; give a name such as 'sliding_tile'")
        named = {key: _frozen(value, f"{self.name}.{key}", _MAX_DEPTH) for key, value in self.params}
        for key in named:
            if not isinstance(key, str) or not key.isidentifier() or key == "name":
                raise ConfigError(f"{self.kind} {self.name!r} has a parameter called {key!r}; give an identifier")
        if len(named) != len(self.params):
            raise ConfigError(f"{self.kind} {self.name!r} names a parameter twice; give each one once")
        object.__setattr__(self, "params", tuple(sorted(named.items())))

    @classmethod
    def make(cls: type[_S], name: str, **params: Any) -> _S:
        """The spec of that name with these parameters."""
        return cls(name, tuple(params.items()))

    @property
    def kwargs(self) -> dict[str, ParamValue]:
        """The parameters as keyword arguments."""
        return dict(self.params)

    @cached_property
    def key(self) -> str:
        """One canonical text per spec. Unlike Python's ``==`` it tells 1, 1.0 and True apart."""
        return json.dumps(self.to_data(), sort_keys=True)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, PatternSpec) and self.kind == other.kind and self.key == other.key

    def __hash__(self) -> int:
        return hash(self.key)

    def __str__(self) -> str:
        inside = ", ".join(f"{key}={_text(value)}" for key, value in self.params)
        return f"{self.name}({inside})" if inside else self.name

    def __repr__(self) -> str:
        return f"{type(self).__name__}<{self}>"

    def to_data(self) -> dict[str, Any]:
        """Plain data for JSON or YAML: ``{"name": ..., parameter: value, ...}``."""
        return {"name": self.name, **{key: _plain(value) for key, value in self.params}}

    @classmethod
    def from_data(cls: type[_S], data: object) -> _S:
        """The inverse of :meth:`to_data`; a bare text is a name without parameters.

        Raises:
            ConfigError: if the data is neither a text nor a mapping with a ``name``.
        """
        return _spec(cls, data, _MAX_DEPTH)


@dataclass(frozen=True, eq=False, repr=False)
class CompensationSpec(PatternSpec):
    """A compensation by name, not yet built: ``"none"``, ``"pooled_tail"`` or one of ``vidaccel.compensation``."""

    kind: ClassVar[str] = "compensation"


def _spec(cls: type[_S], data: object, depth: int) -> _S:
    if isinstance(data, str):
        return cls(data)
    if not isinstance(data, Mapping) or "name" not in data:
        raise ConfigError(f"a {cls.kind} is {_short(data)}; give its name, or a mapping with 'name' and its parameters")
    if depth == 0:
        raise ConfigError(f"patterns are nested deeper than {_MAX_DEPTH} levels; unite them in one flat union")
    params = {key: _nested(value, depth - 1) for key, value in data.items() if key != "name"}
    return cls(data["name"], tuple(params.items()))


def _nested(value: Any, depth: int) -> Any:
    if isinstance(value, Mapping):
        return _spec(PatternSpec, value, depth)
    if isinstance(value, list | tuple) and depth > 0:
        return tuple(_nested(item, depth - 1) for item in value)
    return value  # what is no valid value is named by _frozen


def _frozen(value: Any, where: str, depth: int) -> ParamValue:
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{where} is {value!r}; give a finite number")
    if value is None or isinstance(value, bool | int | float | str | PatternSpec):
        return value
    if isinstance(value, list | tuple):
        if depth == 0 or len(value) > _MAX_ITEMS:
            raise ConfigError(f"{where} is nested deeper than {_MAX_DEPTH} levels or longer than {_MAX_ITEMS} items")
        return tuple(_frozen(item, where, depth - 1) for item in value)
    raise ConfigError(f"{where} is {_short(value)}; give a number, text, true/false, null, a list of them or a pattern")


def _plain(value: ParamValue) -> Any:
    if isinstance(value, PatternSpec):
        return value.to_data()
    return [_plain(item) for item in value] if isinstance(value, tuple) else value


def _text(value: ParamValue) -> str:
    if isinstance(value, tuple):
        return f"({', '.join(_text(item) for item in value)}{',' if len(value) == 1 else ''})"
    return str(value) if isinstance(value, PatternSpec) else repr(value)


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
