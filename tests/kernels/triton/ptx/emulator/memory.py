"""Global and shared memory of an emulated GPU: bytes, what of them may be touched, and who touched them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .order import Actor, Order

__all__ = ["GLOBAL", "PARAMETERS", "SHARED", "WINDOW", "GlobalMemory", "SharedMemory"]

#: Where memory begins. Shared memory has its first KiB reserved, as on a Hopper, and a window in generic addresses.
SHARED = 1024
WINDOW = 0x7D0000000000
PARAMETERS = 0x7E0000000000
GLOBAL = 0x7F1000000000

_RED_ZONE = 1024
_OUTSIDE, _EMPTY, _WRITTEN = 0, 1, 2

Bytes = NDArray[np.uint8]
Rows = NDArray[np.int64]
#: ``report(kind, text)``
Report = Callable[[str, str], None]


class GlobalMemory:
    """Allocations with red zones between them; each byte knows whether it has been written."""

    def __init__(self) -> None:
        self.data = np.full(1 << 18, 0xEE, np.uint8)
        self.state = np.zeros(1 << 18, np.uint8)
        self.top = 4096
        self.blocks: list[tuple[int, int, str]] = []
        #: address of a tensormap -> who published it: (CTA, warp, clock), and whether a fence acquired it
        self.tensormaps: dict[int, tuple[object, int, int, bool]] = {}

    def allocate(self, size: int, name: str, *, written: bool) -> int:
        """The address of ``size`` fresh bytes, a multiple of 256; ``written``: whether they count as initialised."""
        at = self.top
        self.top += (size + 255) // 256 * 256 + _RED_ZONE
        while self.top > len(self.data):
            self.data = np.concatenate([self.data, np.full(len(self.data), 0xEE, np.uint8)])
            self.state = np.concatenate([self.state, np.zeros(len(self.state), np.uint8)])
        self.state[at : at + size] = _WRITTEN if written else _EMPTY
        self.blocks.append((at, size, name))
        return GLOBAL + at

    def exclude(self, address: int, size: int) -> None:
        """Bytes of an allocation that nobody may touch."""
        self.state[address - GLOBAL : address - GLOBAL + size] = _OUTSIDE

    def place(self, address: int, size: int) -> slice:
        """The bytes of an allocation, for the host."""
        return slice(address - GLOBAL, address - GLOBAL + size)

    def describe(self, address: int) -> str:
        """An address in words."""
        at = int(address) - GLOBAL
        for start, size, name in self.blocks:
            if start - 512 <= at < start + size + 512:
                return f"byte {at - start} of {name}, which has {size}"
        return f"address {int(address):#x}"

    def rows(self, offsets: Rows, n: int) -> tuple[NDArray[np.uint8], Rows]:
        """The states of ``n`` bytes at each offset, and the index of these bytes; offsets are multiples of ``n``."""
        index = offsets[:, None] + np.arange(n)
        if offsets.size and (offsets.min() < 0 or offsets.max() + n > len(self.data)):
            inside = (offsets >= 0) & (offsets + n <= len(self.data))
            return np.where(inside[:, None], self.state[np.where(inside[:, None], index, 0)], _OUTSIDE), index
        return self.state[index], index

    def offsets(self, addresses: NDArray[np.uint64], n: int, report: Report) -> Rows:
        """Offsets of aligned addresses."""
        offsets = (addresses - np.uint64(GLOBAL)).view(np.int64)
        if (offsets % n).any():
            wrong = addresses[(offsets % n) != 0][0]
            report("alignment", f"{self.describe(wrong)} is not a multiple of {n} bytes")
        return offsets

    def read(self, addresses: NDArray[np.uint64], n: int, report: Report) -> Bytes:
        """``[len(addresses), n]`` bytes."""
        offsets = self.offsets(addresses, n, report)
        state, index = self.rows(offsets, n)
        if state.size and state.min() < _WRITTEN:
            self._complain("reads", addresses, state, report)
        return self.data[index]

    def write(self, addresses: NDArray[np.uint64], data: Bytes, report: Report) -> None:
        """Writes ``[len(addresses), n]`` bytes."""
        n = data.shape[1]
        offsets = self.offsets(addresses, n, report)
        state, index = self.rows(offsets, n)
        if state.size and state.min() == _OUTSIDE:
            self._complain("writes", addresses, state, report)
        self.data[index] = data
        self.state[index] = _WRITTEN

    def _complain(self, verb: str, addresses: NDArray[np.uint64], state: NDArray[np.uint8], report: Report) -> None:
        worst = state.min(axis=1)
        outside = worst == _OUTSIDE
        if outside.any():
            report("bounds", f"{verb} {self.describe(addresses[outside][0])}")
        if verb == "reads" and (worst == _EMPTY).any():
            report("uninitialised", f"{verb} {self.describe(addresses[worst == _EMPTY][0])}, never written")


class SharedMemory:
    """The shared memory of a CTA: bytes, and for each byte who wrote and read it last.

    Accesses are by rows of ``unit`` bytes: row ``r`` is the bytes from ``r * unit``.
    """

    def __init__(self, size: int, order: Order) -> None:
        self.size = size
        self.order = order
        length = -(-(SHARED + size) // 128) * 128
        self.data = np.full(length, 0xCD, np.uint8)
        self.writer = np.full(length, -1, np.int16)
        self.written = np.zeros(length, np.int32)
        self.atomics = np.zeros(length, bool)  # whether the last write was an atomic
        self.readers: dict[int, NDArray[np.int32]] = {}
        self._views: dict[int, tuple[Any, Any, Any]] = {}

    def views(self, unit: int) -> tuple[Any, Any, Any]:
        """Data, writers and their clocks as rows."""
        if unit not in self._views:
            self._views[unit] = tuple(x.reshape(-1, unit) for x in (self.data, self.writer, self.written))  # type: ignore[assignment]
        return self._views[unit]

    def rows(self, addresses: NDArray[Any], unit: int, report: Report) -> Rows:
        """Addresses, shared or generic, as rows; they must be aligned and inside."""
        at = addresses.astype(np.int64)
        if at.size:
            if at.max() >= WINDOW:
                at = np.where(at >= WINDOW, at - WINDOW, at)
            if (at % unit).any():
                wrong = at[(at % unit) != 0][0]
                report("alignment", f"byte {int(wrong) - SHARED} of shared memory is not a multiple of {unit}")
            if at.min() < SHARED or at.max() + unit > SHARED + self.size:
                wrong = at[(at < SHARED) | (at + unit > SHARED + self.size)][0]
                report("bounds", f"byte {int(wrong) - SHARED} of shared memory, which has {self.size}")
        return at // unit

    def read(self, rows: Rows, unit: int, by: Actor, report: Report) -> Bytes:
        """``[len(rows), unit]`` bytes."""
        data, writers, clocks = self.views(unit)
        writer, clock = writers[rows], clocks[rows]
        if writer.size and writer.min() < 0:
            report("uninitialised", f"reads byte {self._first(rows, unit, writer < 0)} of shared memory, never written")
            writer = np.maximum(writer, 0)
        late = clock > by.known[writer]
        if late.any():
            report("race", f"{self._story(by, 'reads', rows, unit, late, writer)}, and nothing orders them")
        elif by.fenced is not None and (unseen := clock > by.fenced[writer]).any():
            report("proxy", f"{self._story(by, 'reads', rows, unit, unseen, writer)} without fence.proxy.async")
        if by.agent not in self.readers:
            self.readers[by.agent] = np.zeros(len(self.data), np.int32)
        self.readers[by.agent].reshape(-1, unit)[rows] = by.clock
        return data[rows]

    def peek(self, rows: Rows, unit: int, by: Actor, report: Report) -> Bytes:
        """What an atomic reads; other atomics are no race."""
        data, writers, clocks = self.views(unit)
        writer = writers[rows]
        if (writer < 0).any():
            report("uninitialised", f"reads byte {self._first(rows, unit, writer < 0)} of shared memory, never written")
            writer = np.maximum(writer, 0)
        late = (clocks[rows] > by.known[writer]) & ~self.atomics.reshape(-1, unit)[rows]
        if late.any():
            report("race", f"{self._story(by, 'updates', rows, unit, late, writer)}, and nothing orders them")
        return data[rows]

    def write(self, rows: Rows, unit: int, new: Bytes, by: Actor, report: Report, *, atomic: bool = False) -> None:
        """Writes ``[len(rows), unit]`` bytes."""
        data, writers, clocks = self.views(unit)
        writer = np.maximum(writers[rows], 0)
        clock = clocks[rows]
        late = clock > by.known[writer]
        if atomic and late.any():
            late &= ~self.atomics.reshape(-1, unit)[rows]
        if by.agent < self.order.warps and late.any():
            late &= data[rows] != new  # several warps may store one and the same value
        if late.any():
            report("race", f"{self._story(by, 'writes', rows, unit, late, writer)}, and nothing orders them")
        elif by.fenced is not None and (unseen := clock > by.fenced[writer]).any():
            report("proxy", f"{self._story(by, 'overwrites', rows, unit, unseen, writer)} without fence.proxy.async")
        for agent, reads in self.readers.items():
            if agent == by.agent:
                continue
            late = reads.reshape(-1, unit)[rows] > by.known[agent]
            if late.any():
                byte = self._first(rows, unit, late)
                report(
                    "race",
                    f"{self.order.name(by.agent)} writes byte {byte} of shared memory, which "
                    f"{self.order.name(agent)} may still read",
                )
        self.atomics.reshape(-1, unit)[rows] = atomic
        writers[rows] = by.agent
        clocks[rows] = by.clock
        data[rows] = new

    def _first(self, rows: Rows, unit: int, wrong: NDArray[np.bool_]) -> int:
        row, byte = np.unravel_index(int(np.argmax(wrong)), wrong.shape)
        return int(rows.ravel()[row]) * unit + int(byte) - SHARED

    def _story(
        self, by: Actor, verb: str, rows: Rows, unit: int, wrong: NDArray[np.bool_], writer: NDArray[np.int16]
    ) -> str:
        other = int(writer.ravel()[int(np.argmax(wrong))])
        return (
            f"{self.order.name(by.agent)} {verb} byte {self._first(rows, unit, wrong)} of shared memory, which "
            f"{self.order.name(other)} wrote"
        )
