"""Which families exist, and which one a model belongs to."""

from __future__ import annotations

import inspect
from functools import cache
from types import ModuleType

from ..discovery import modules_of
from ..errors import PatchError
from .base import Family
from .dense_only import DENSE_ONLY, DenseOnly

__all__ = ["dense_only_of", "families", "family_of", "register_family", "unregister_family"]

#: What :func:`register_family` was given, latest first.
_registered: list[Family] = []


@cache
def _built_in() -> tuple[Family, ...]:
    """The families of this folder by name; looked for at the first question, because modules here import this one.

    Raises:
        PatchError: if two have the same name or transformer: then the order would decide, and there is none.
    """
    found = sorted((family() for module in modules_of(__package__) for family in _families_in(module)), key=_name)
    owners: dict[str, str] = {}
    for family in found:
        for said in (f"name {family.name!r}", *(f"transformer {name!r}" for name in family.transformers)):
            other = owners.setdefault(said, type(family).__name__)
            if other != type(family).__name__:
                raise PatchError(f"{other} and {type(family).__name__} both have the {said}; give it to one of them")
    return tuple(found)


def _families_in(module: ModuleType) -> list[type[Family]]:
    """The families that a module defines; imported and abstract ones are not."""
    return [
        cls
        for cls in vars(module).values()
        if inspect.isclass(cls)
        and issubclass(cls, Family)
        and cls.__module__ == module.__name__
        and not inspect.isabstract(cls)
    ]


def _name(family: Family) -> str:
    return family.name


def families() -> tuple[Family, ...]:
    """All families, user-registered ones first, then those of this folder by name."""
    return (*_registered, *_built_in())


def family_of(model: object) -> Family | None:
    """The family of a transformer, or ``None`` if no family knows it."""
    return next((family for family in families() if family.matches(model)), None)


def dense_only_of(model: object) -> DenseOnly | None:
    """The kind of a video model that is known and stays dense, or ``None``."""
    return next((kind for kind in DENSE_ONLY if kind.matches(model)), None)


def register_family(family: Family) -> None:
    """Adds a family for your own transformer; it is asked before the built-in ones."""
    _registered.insert(0, family)


def unregister_family(family: Family) -> None:
    """Takes a family out again; models that it has patched stay patched.

    Raises:
        PatchError: if it is not registered.
    """
    if family not in _registered:
        raise PatchError(
            f"the family {family.name!r} is not registered; pass the object that register_family was given"
        )
    _registered.remove(family)
