"""Counts the bytes of tensors while code runs, on any device."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vidaccel.engine.ops import attention_of

__all__ = ["Buffer", "LiveBytes"]


@dataclass(frozen=True)
class Buffer:
    """One tensor's memory: its bytes, how many entries of its dtype they hold, its shape, and what made it."""

    bytes: int
    entries: int
    shape: tuple[int, ...]
    operator: str

    def __str__(self) -> str:
        return f"{'x'.join(map(str, self.shape))} by {self.operator.removeprefix('aten.').split('.')[0]}"


class LiveBytes(TorchDispatchMode):
    """Counts the storages that operators make, until they are freed; what was there before does not count.

    Buffers inside of one operator, as fused attention has them, are not seen: use the allocator's own peak where there
    is one (``torch.cuda.max_memory_allocated``).

    Attributes:
        now, peak: bytes of the storages that are alive, and most of them at one time.
        largest: the largest one.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.largest = Buffer(0, 0, (), "none")
        self._known: dict[int, int] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given = dict(kwargs or {})
        for leaf in tree_leaves((args, given)):
            if isinstance(leaf, torch.Tensor):
                self._note(leaf, 0)
        if func is torch.ops.vidaccel.attention.default:
            with self:  # or what it does inside would not be seen
                out = attention_of(*args, **given)
        else:
            out = func(*args, **given)
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor) and self._note(leaf, leaf.untyped_storage().nbytes()):
                size = leaf.untyped_storage().nbytes()
                self.peak = max(self.peak, self.now)
                if size > self.largest.bytes:
                    self.largest = Buffer(size, size // leaf.element_size(), tuple(leaf.shape), str(func))
        return out

    def _note(self, x: torch.Tensor, size: int) -> bool:
        """Whether the storage of x is new; it counts with this size until it is freed."""
        if x.layout != torch.strided:
            return False
        storage = x.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return False
        self._known[key] = size
        self.now += size
        weakref.finalize(storage, self._freed, key)
        return True

    def _freed(self, key: int) -> None:
        self.now -= self._known.pop(key)
