"""Barriers: the 16 named ones of a CTA, and mbarriers, which live in shared memory."""

from __future__ import annotations

import numpy as np

from .memory import SHARED
from .order import Order

__all__ = ["Mbarrier", "NamedBarrier", "awaited"]

#: Range of the transaction count of an mbarrier (PTX ISA 9.7.13.15.2).
TRANSACTIONS = (1 << 20) - 1


class NamedBarrier:
    """``bar``: warps come, and go on once as many threads as they name have come."""

    def __init__(self, agents: int) -> None:
        self.threads = 0
        self.generation = 0
        self.arrived: list[int] = []
        self.known = np.zeros(agents, np.int32)
        self.fenced = np.zeros(agents, np.int32)
        self.told = (self.known, self.fenced)

    def arrive(self, warp: int, order: Order) -> None:
        """A warp comes, with what it knows."""
        self.arrived.append(warp)
        np.maximum(self.known, order.known[warp], out=self.known)
        np.maximum(self.fenced, order.fenced[warp], out=self.fenced)
        order.tick(warp)
        if 32 * len(self.arrived) == self.threads:
            self.told = (self.known, self.fenced)
            self.known, self.fenced = np.zeros_like(self.known), np.zeros_like(self.fenced)
            self.arrived = []
            self.generation += 1


def awaited(phase: int, parity: int) -> bool:
    """Whether the phase of a parity, the last or the current one, is complete. Bit 0 of the operand counts."""
    return (phase & 1) != (parity & 1)


class Mbarrier:
    """An mbarrier: a phase completes when all arrivals and all bytes of its transactions have come.

    Args:
        address: in shared memory.
        count: arrivals of a phase.
        agent: of the tile loads that complete on it.
        clock: of that agent when the first phase begins.
    """

    def __init__(self, address: int, count: int, agents: int, agent: int, clock: int) -> None:
        self.address = address
        self.count = self.pending = count
        self.transactions = 0
        self.phase = 0
        self.agent = agent
        self.clock = clock
        self.waiting = 0
        self.in_flight = 0
        self.published = False  # to the copy engine, by fence.mbarrier_init
        self.known, self.fenced = np.zeros(agents, np.int32), np.zeros(agents, np.int32)
        self.told = (np.zeros(agents, np.int32), np.zeros(agents, np.int32))

    def __str__(self) -> str:
        return (
            f"the mbarrier at byte {self.address - SHARED} (phase {self.phase}, {self.pending} of {self.count} "
            f"arrivals and {self.transactions} bytes pending)"
        )

    @property
    def idle(self) -> bool:
        """Whether nobody is in the middle of using it."""
        return self.pending == self.count and not (self.transactions or self.waiting or self.in_flight)

    def arrive(self, count: int, warp: int, order: Order) -> None:
        """``count`` arrivals of a warp, with what it knows."""
        np.maximum(self.known, order.known[warp], out=self.known)
        np.maximum(self.fenced, order.fenced[warp], out=self.fenced)
        self.pending -= count
        self.complete()

    def land(self, size: int) -> None:
        """``size`` bytes of a tile load have come."""
        self.known[self.agent] = self.fenced[self.agent] = self.clock + 1
        self.transactions -= size
        self.complete()

    def complete(self) -> None:
        """Begins the next phase if this one is complete."""
        if self.pending == 0 and self.transactions == 0:
            for told, new in zip(self.told, (self.known, self.fenced), strict=True):
                np.maximum(told, new, out=told)
            self.phase += 1
            self.clock += 1
            self.pending = self.count
