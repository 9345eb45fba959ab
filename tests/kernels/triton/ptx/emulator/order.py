"""Happens-before, by vector clocks: a race is found whatever the order in which the warps happen to run.

Every agent that touches memory has a clock: each warp, its products (wgmma), its copies (cp.async) and its bulk stores,
and for each mbarrier the tile loads that complete on it. ``known[w][a]`` is the clock of agent ``a`` up to which warp
``w`` comes after it; ``fenced[w][a]`` that up to which the asynchronous proxy, in operations that ``w`` issues, may see
what ``a`` wrote (``fence.proxy.async``).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

__all__ = ["Actor", "Order"]

#: Most addresses of mbarriers in one CTA.
MBARRIERS = 256

Clock = np.ndarray[Any, np.dtype[np.int32]]


@dataclass(frozen=True)
class Actor:
    """Who touches memory, when by its own clock, and what it comes after.

    Args:
        agent: its number.
        clock: of this access.
        known: what it comes after.
        fenced: for the asynchronous proxy, what it may see; ``None`` for ordinary accesses.
    """

    agent: int
    clock: int
    known: Clock
    fenced: Clock | None = None


class Order:
    """The clocks of one CTA."""

    def __init__(self, warps: int) -> None:
        self.warps = warps
        self.agents = 4 * warps + MBARRIERS
        self.known = [np.zeros(self.agents, np.int32) for _ in range(warps)]
        self.fenced = [np.zeros(self.agents, np.int32) for _ in range(warps)]
        for w in range(warps):
            self.known[w][w] = 1
        self._mbarriers: dict[int, int] = {}

    def products(self, warp: int) -> int:
        """The agent of a warp's wgmma."""
        return self.warps + warp

    def copies(self, warp: int) -> int:
        """The agent of a warp's cp.async."""
        return 2 * self.warps + warp

    def stores(self, warp: int) -> int:
        """The agent of a warp's bulk stores."""
        return 3 * self.warps + warp

    def loads(self, address: int) -> int:
        """The agent of the tile loads that complete on the mbarrier at an address."""
        agent = self._mbarriers.setdefault(address, 4 * self.warps + len(self._mbarriers))
        if agent >= self.agents:
            raise ValueError(f"more than {MBARRIERS} addresses of mbarriers in a CTA are not emulated")
        return agent

    def name(self, agent: int) -> str:
        """An agent in words."""
        if agent >= 4 * self.warps:
            return "a tile load"
        kind, warp = divmod(agent, self.warps)
        return f"{('', 'wgmma of ', 'cp.async of ', 'a bulk store of ')[kind]}warp {warp}"

    def actor(self, warp: int) -> Actor:
        """A warp's own ordinary access, now."""
        return Actor(warp, int(self.known[warp][warp]), self.known[warp])

    def issue(self, warp: int) -> tuple[Clock, Clock]:
        """What an operation issued now comes after, and may see; what the warp does later is not part of it."""
        known, fenced = self.known[warp].copy(), self.fenced[warp].copy()
        self.tick(warp)
        return known, fenced

    def tick(self, warp: int) -> None:
        """What the warp does from now on is not part of what it has told others."""
        self.known[warp][warp] += 1

    def fence(self, warp: int) -> None:
        """``fence.proxy.async``: the asynchronous proxy may see all that the warp knows of."""
        np.maximum(self.fenced[warp], self.known[warp], out=self.fenced[warp])
        self.tick(warp)

    def learn(self, warp: int, known: Clock, fenced: Clock) -> None:
        """The warp comes after what a barrier has collected."""
        np.maximum(self.known[warp], known, out=self.known[warp])
        np.maximum(self.fenced[warp], fenced, out=self.fenced[warp])
