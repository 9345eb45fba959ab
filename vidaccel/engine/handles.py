"""Numbers that stand for objects of the engine in the operators that a compiled graph sees."""

from __future__ import annotations

import itertools
import weakref
from typing import TYPE_CHECKING, Generic, TypeVar

import torch

from ..errors import PatchError

if TYPE_CHECKING:
    from .gate import ForwardGate
    from .site import AttentionSite

__all__ = ["GATES", "SITES", "Handles"]

_T = TypeVar("_T")
_numbers = itertools.count()


class Handles(Generic[_T]):
    """Objects by a one-element int64 CPU tensor each, as long as somebody else keeps them.

    Args:
        what: what an object is part of, for the error.
    """

    def __init__(self, what: str) -> None:
        self._what = what
        self._objects: weakref.WeakValueDictionary[int, _T] = weakref.WeakValueDictionary()

    def new(self, of: _T) -> torch.Tensor:
        """A new handle."""
        number = next(_numbers)
        self._objects[number] = of
        return torch.tensor([number], dtype=torch.int64)

    def find(self, handle: torch.Tensor) -> _T | None:
        """What a handle stands for, or ``None`` if it is gone."""
        return self._objects.get(int(handle))

    def get(self, handle: torch.Tensor) -> _T:
        """The same.

        Raises:
            PatchError: if it is gone.
        """
        found = self.find(handle)
        if found is None:
            raise PatchError(f"this {self._what}'s session is gone; unpatch the pipeline and patch it again")
        return found


SITES: Handles[AttentionSite] = Handles("attention layer")
GATES: Handles[ForwardGate] = Handles("transformer")
