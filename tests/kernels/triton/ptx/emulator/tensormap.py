"""Tensormaps: how the copy engine finds a tile of a tensor in global memory.

The 128 bytes of a tensormap are opaque on the device. The order of the fields here is the emulator's own; a program can
only write them with ``tensormap.replace`` or get them from the host.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["FIELDS", "SIZE", "TensorMap", "place", "swizzled"]

#: Bytes of a tensormap.
SIZE = 128
#: Field -> (offset, bytes of one entry, entries); names and values as in PTX ISA 9.7.9.27 tensormap.replace.
FIELDS = {
    "global_address": (0, 8, 1),
    "rank": (8, 4, 1),
    "elemtype": (12, 4, 1),
    "interleave_layout": (16, 4, 1),
    "swizzle_mode": (20, 4, 1),
    "fill_mode": (24, 4, 1),
    "box_dim": (32, 4, 5),
    "element_stride": (52, 4, 5),
    "global_dim": (72, 4, 5),
    "global_stride": (96, 8, 4),
}
#: Element types by their number in PTX: name and bytes.
ELEMENTS = {
    0: ("u8", 1),
    1: ("u16", 2),
    2: ("u32", 4),
    3: ("s32", 4),
    4: ("u64", 8),
    5: ("s64", 8),
    6: ("f16", 2),
    7: ("f32", 4),
    8: ("f32.ftz", 4),
    9: ("f64", 8),
    10: ("bf16", 2),
    11: ("tf32", 4),
    12: ("tf32.ftz", 4),
}
#: Bytes of a row that a swizzle permutes.
SPANS = {0: 16, 1: 32, 2: 64, 3: 128}


def place(field: str, entry: int = 0) -> tuple[int, int]:
    """Offset and size of an entry of a field."""
    offset, size, entries = FIELDS[field]
    if not 0 <= entry < entries:
        raise ValueError(f"{field} has entries 0 to {entries - 1}, not {entry}")
    return offset + size * entry, size


def swizzled(addresses: NDArray[np.int64], mode: int) -> NDArray[np.int64]:
    """Where bytes lie in swizzled shared memory: address bits 7 to 9 flip bits 4 to 6, as many as the mode has."""
    return addresses ^ (((addresses >> 7) & ((1 << mode) - 1)) << 4)


@dataclass(frozen=True)
class TensorMap:
    """The fields of a tensormap; lists have the innermost dimension first.

    Args:
        base: address of the tensor.
        element: number of the element type.
        box: sizes of a tile in elements.
        shape: sizes of the tensor in elements.
        strides: in bytes, without the innermost.
        swizzle: 0 none, 1 to 3 for rows of 32, 64 or 128 bytes.
        fill: what elements outside of the tensor are read as: 0 zero, 1 NaN.
    """

    base: int
    element: int
    box: tuple[int, ...]
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    swizzle: int = 0
    fill: int = 0
    interleave: int = 0
    steps: tuple[int, ...] = ()

    @classmethod
    def read(cls, raw: bytes) -> TensorMap:
        """From its 128 bytes."""

        def get(field: str, entry: int = 0) -> int:
            offset, size = place(field, entry)
            return int.from_bytes(raw[offset : offset + size], "little")

        rank = min(get("rank") + 1, 5)
        each = {f: tuple(get(f, i) for i in range(rank)) for f in ("box_dim", "global_dim", "element_stride")}
        return cls(
            get("global_address"),
            get("elemtype"),
            each["box_dim"],
            each["global_dim"],
            tuple(get("global_stride", i) for i in range(rank - 1)),
            get("swizzle_mode"),
            get("fill_mode"),
            get("interleave_layout"),
            each["element_stride"],
        )

    def write(self) -> bytes:
        """Its 128 bytes."""
        raw = bytearray(SIZE)

        def put(field: str, values: Sequence[int]) -> None:
            for i, value in enumerate(values):
                offset, size = place(field, i)
                raw[offset : offset + size] = int(value).to_bytes(size, "little")

        put("global_address", [self.base])
        put("rank", [len(self.shape) - 1])
        put("elemtype", [self.element])
        put("interleave_layout", [self.interleave])
        put("swizzle_mode", [self.swizzle])
        put("fill_mode", [self.fill])
        put("box_dim", self.box)
        put("element_stride", self.steps or (1,) * len(self.shape))
        put("global_dim", self.shape)
        put("global_stride", self.strides)
        return bytes(raw)

    @property
    def item(self) -> int:
        """Bytes of an element."""
        return ELEMENTS[self.element][1]

    @property
    def size(self) -> int:
        """Bytes of a tile."""
        return math.prod(self.box) * self.item

    def problems(self) -> list[str]:
        """What the hardware does not take (CUDA driver API, cuTensorMapEncodeTiled)."""
        if self.element not in ELEMENTS:
            return [f"element type {self.element}"]
        found = []
        if self.base % 16:
            found.append("the base is not a multiple of 16 bytes")
        if any(s % 16 or not 0 < s < 1 << 40 for s in self.strides):
            found.append(f"strides {self.strides}, which must be multiples of 16 bytes below 2^40")
        if any(not 1 <= b <= 256 for b in self.box):
            found.append(f"box {self.box}, whose sizes must be 1 to 256")
        if any(not 1 <= d <= 1 << 32 for d in self.shape):
            found.append(f"shape {self.shape}")
        inner = self.box[0] * self.item
        if inner % 16:
            found.append(f"rows of {inner} bytes, which must be a multiple of 16")
        if self.swizzle not in SPANS:
            found.append(f"swizzle {self.swizzle}")
        elif self.swizzle and inner > SPANS[self.swizzle]:
            found.append(f"rows of {inner} bytes, more than the {SPANS[self.swizzle]} that are swizzled")
        if any(s != 1 for s in self.steps):
            found.append("element strides other than 1, which are not emulated")
        if self.interleave:
            found.append("interleaving, which is not emulated")
        if self.fill not in (0, 1):
            found.append(f"fill mode {self.fill}")
        return found

    def tile(self, corner: Sequence[int]) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """Addresses of the elements of a tile, in the order in which they lie in shared memory (innermost fastest), and
        which are inside of the tensor."""
        address = np.full(1, self.base, np.int64)
        inside = np.ones(1, bool)
        for d in reversed(range(len(self.shape))):
            i = corner[d] + np.arange(self.box[d], dtype=np.int64)
            address = (address[:, None] + i * (self.item if d == 0 else self.strides[d - 1])).ravel()
            inside = (inside[:, None] & ((i >= 0) & (i < self.shape[d]))).ravel()
        return address, inside

    def filling(self) -> NDArray[np.uint8]:
        """The bytes of an element outside of the tensor."""
        kind, size = ELEMENTS[self.element]
        if not self.fill:
            return np.zeros(size, np.uint8)
        if kind[0] in "us":
            raise ValueError(f"fill mode NaN needs a floating type, not {kind}")
        return np.array([0xFF] * (size - 1) + [0x7F], np.uint8)
