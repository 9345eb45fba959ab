"""The modules of a package, found in its folder: a new file is there without a line elsewhere."""

from __future__ import annotations

import importlib
import pkgutil
from types import ModuleType

__all__ = ["modules_of"]


def modules_of(package: str) -> list[ModuleType]:
    """All modules of an imported or importable package, imported, by name; packages within it are left out.

    Args:
        package: its full name. It may lie in a folder, a wheel or a zip file.
    """
    path = importlib.import_module(package).__path__
    names = sorted(found.name for found in pkgutil.iter_modules(path) if not found.ispkg)
    return [importlib.import_module(f"{package}.{name}") for name in names]
