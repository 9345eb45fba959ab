"""Classes by name, and objects of them from specs: what patterns and compensations share."""

from __future__ import annotations

import dataclasses
from typing import Any, Generic, TypeVar

from ..errors import ConfigError, did_you_mean
from .pattern_spec import PatternSpec

__all__ = ["Registry"]

_T = TypeVar("_T")
_C = TypeVar("_C")


class Registry(Generic[_T]):
    """Frozen dataclasses with a ``name``, one kind of them.

    Args:
        kind: what they are, for messages: "pattern", "compensation".
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.known: dict[str, type[_T]] = {}

    def register(self, cls: type[_C]) -> type[_C]:
        """Class decorator: makes the class buildable by its ``name``.

        Raises:
            ConfigError: if another class has the name already.
        """
        name = cls.name  # type: ignore[attr-defined]
        if self.known.setdefault(name, cls) is not cls:  # type: ignore[arg-type]
            raise ConfigError(f"two {self.kind}s are called {name!r}; give {cls.__name__} a name of its own")
        return cls

    def names(self) -> list[str]:
        """Names that :meth:`build` knows, sorted."""
        return sorted(self.known)

    def class_of(self, spec: PatternSpec) -> type[_T]:
        """The class that a spec names.

        Raises:
            ConfigError: if there is none.
        """
        cls = self.known.get(spec.name)
        if cls is None:
            raise ConfigError(
                f"no {self.kind} is called {spec.name!r}; valid are {', '.join(self.names())}"
                + did_you_mean(spec.name, self.names())
            )
        return cls

    def build(self, spec: PatternSpec) -> _T:
        """What a spec names, with the specs nested in its parameters built as well.

        Raises:
            ConfigError: if the name or a parameter is unknown, missing or out of range.
        """
        cls = self.class_of(spec)
        fields = {_parameter(f): f for f in dataclasses.fields(cls) if f.init}  # type: ignore[arg-type]
        unknown = sorted(set(spec.kwargs) - set(fields))
        needed = sorted(n for n, f in fields.items() if _required(f) and n not in spec.kwargs)
        if unknown or needed:
            found = f"has no parameter {', '.join(unknown)}" if unknown else f"needs {', '.join(needed)}"
            raise ConfigError(f"{self.kind} {spec.name!r} {found}; its parameters are {', '.join(fields) or 'none'}")
        return cls(**{fields[name].name: self._built(value) for name, value in spec.kwargs.items()})

    def _built(self, value: Any) -> Any:
        """``value`` with every nested spec built."""
        if isinstance(value, tuple):
            return tuple(self._built(v) for v in value)
        return self.build(value) if isinstance(value, PatternSpec) else value


def _parameter(field: dataclasses.Field[Any]) -> str:
    """The name of a field in specs: its own, unless its metadata has another as ``"parameter"``."""
    return str(field.metadata.get("parameter", field.name))


def _required(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
