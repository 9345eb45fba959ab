"""Other projects' kernels as targets of ours: they run when they are asked for by name, and after a self-test.

A file of this folder with ``NAME``, ``PACKAGES``, ``block_sparse_attention`` and ``why_not`` is one of them; nothing of
the project is imported before it is asked for. None of them has been run on a GPU here.
"""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache
from types import ModuleType

__all__ = ["modules"]


@cache
def modules() -> tuple[ModuleType, ...]:
    """The files of this folder that are a peer, in the order of their names."""
    found = (importlib.import_module(f"{__name__}.{one.name}") for one in pkgutil.iter_modules(__path__))
    return tuple(module for module in found if hasattr(module, "NAME"))
