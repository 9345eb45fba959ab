"""One CTA: its warps, who runs next, and what is left when all are done."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from .barriers import Mbarrier, NamedBarrier
from .faults import Deadlock, Fault
from .flight import NOTHING
from .groups import Groups
from .memory import GlobalMemory, SharedMemory
from .order import Order
from .text import Instruction

if TYPE_CHECKING:
    from .program import Program

__all__ = ["REGISTER_FILE", "Cta", "Warp"]

#: 32-bit registers of a multiprocessor.
REGISTER_FILE = 1 << 16
#: Kinds of faults after which execution cannot go on.
_FATAL = frozenset({"bounds", "alignment", "lanes", "descriptor", "trap"})
#: Stretches of instructions a warp may run.
_LIMIT = 400_000

Mask = NDArray[np.bool_]


class Warp:
    """A warp: where it is, its registers, and its operations in flight."""

    def __init__(self, cta: Cta, index: int, registers: int) -> None:
        self.cta = cta
        self.index = index
        self.threads = (np.arange(32) + 32 * index).astype(np.uint32)
        self.pc = 0
        self.pcs: NDArray[np.int64] | None = None  # of each lane, where they have diverged
        self.parked = np.zeros(32, bool)  # lanes that wait for others at bar.warp.sync
        self.values: list[Any] | None = None
        self.state = "ready"
        self.wake: Callable[[], bool] = bool
        self.why = ""
        self.at: Instruction | None = None
        self.steps = 0
        early = cta.asynchronous == "early"
        self.products, self.copies, self.stores = Groups(early), Groups(early), Groups(early)
        self.flight = NOTHING
        self.registers = registers
        self.barrier: tuple[NamedBarrier, int] | None = None
        self.waiting: Mbarrier | None = None
        self.tested: Instruction | None = None
        self.issued = 0

    def report(self, kind: str, text: str) -> None:
        """A fault of the instruction that the warp executes."""
        self.cta.report(self, kind, text)

    def block(self, why: str, wake: Callable[[], bool]) -> None:
        """Waits until ``wake`` is true."""
        self.why, self.wake = why, wake

    # -- lanes that diverge; called by generated code, which goes on at what they return -----------------------------
    def split(self, taken: Mask, there: int, next_: int) -> int:
        """All lanes together: some jump."""
        if taken.all():
            return there
        if not taken.any():
            return next_
        self.pcs = np.where(taken, there, next_).astype(np.int64)
        return -1

    def split_some(self, mask: Mask, taken: Mask, there: int, next_: int) -> int:
        """Some lanes, of which some jump."""
        self.pcs = np.where(mask, np.where(taken, there, next_), self.pcs)  # type: ignore[arg-type]
        return -1

    def jump_some(self, mask: Mask, there: int) -> int:
        """Some lanes jump."""
        self.pcs = np.where(mask, there, self.pcs)  # type: ignore[arg-type]
        return -1


class Cta:
    """A CTA of a grid.

    Args:
        program: what it executes.
        memory: global memory.
        parameters: bytes of the kernel's parameters.
        warps: how many.
        shared: bytes of shared memory.
        position, grid: of the CTA, and how many there are.
        asynchronous, schedule, seed: as :class:`.Emulator` has them.
        seen: faults that are known: (line, kind, beginning of the text).
    """

    def __init__(
        self,
        program: Program,
        memory: GlobalMemory,
        parameters: NDArray[np.uint8],
        *,
        warps: int,
        shared: int,
        position: tuple[int, int, int] = (0, 0, 0),
        grid: tuple[int, int, int] = (1, 1, 1),
        asynchronous: str = "late",
        schedule: str = "in-turn",
        seed: int = 0,
        seen: set[tuple[int, str, str]] | None = None,
    ) -> None:
        self.program = program
        self.memory = memory
        self.parameters = parameters
        self.position, self.grid = position, grid
        self.asynchronous, self.schedule = asynchronous, schedule
        self.random = random.Random(f"{seed} {position}")
        self.warps_in_cta = warps
        self.order = Order(warps)
        self.shared = SharedMemory(shared, self.order)
        self.named: dict[int, NamedBarrier] = {}
        self.mbarriers: dict[int, Mbarrier] = {}
        self.clocks: dict[int, int] = {}  # of tile loads, at addresses of mbarriers that were used before
        self.transfers: list[Callable[[], None]] = []
        self.faults: list[Fault] = []
        self.seen = set() if seen is None else seen
        self.counts = dict.fromkeys(("instructions", "mma", "wgmma", "tma"), 0)
        each = -(-program.kernel.maxnreg // 8) * 8 if program.kernel.maxnreg else 0
        #: registers that no warp has: what the launch left over, and later what setmaxnreg.dec gave back
        self.left_over = self.free = max(0, REGISTER_FILE - 32 * warps * each)
        self.warps = [Warp(self, i, each) for i in range(warps)]

    # -- faults ------------------------------------------------------------------------------------------------------
    def report(self, warp: Warp | None, kind: str, text: str) -> None:
        """Records a fault, the first of its kind at an instruction; raises it if execution cannot go on."""
        at = warp.at if warp is not None else None
        where = f"warp {warp.index}, " if warp is not None else ""
        if at is not None:
            where += f"line {at.line} ({at.source}), `{at.name}`: "
        fault = Fault(kind, f"CTA {self.position}, {where}{text}")
        key = (at.line if at else 0, kind, text[:12])
        if key not in self.seen:
            self.seen.add(key)
            self.faults.append(fault)
        if kind in _FATAL:
            raise fault

    def whole(self, warp: Warp, at: Instruction, mask: Mask) -> bool:
        """Demands that all lanes execute an instruction, or none; whether they do."""
        if mask.all():
            return True
        if mask.any():
            warp.at = at
            warp.report("lanes", f"executed by {int(mask.sum())} of 32 lanes, needs all")
        return False

    # -- running -----------------------------------------------------------------------------------------------------
    def run(self) -> None:
        """Runs all warps to their end.

        Raises:
            Fault: after which execution cannot go on.
        """
        turn = 0
        while True:
            ready = [w for w in self.warps if w.state == "ready" or (w.state == "blocked" and w.wake())]
            if not ready:
                if self.transfer():
                    continue
                if all(w.state == "done" for w in self.warps):
                    break
                self._deadlock()
            if self.schedule == "random":
                warp, budget = self.random.choice(ready), self.random.randrange(1, 6)
            else:
                warp, budget = ready[turn % len(ready)], 1 << 30
                turn += 1
            warp.state = "ready"
            self.program.run(self, warp, budget)
            if self.asynchronous == "random":
                self._advance()
            if warp.steps > _LIMIT:
                warp.report("trap", f"ran {_LIMIT} stretches of instructions: an endless loop?")
        self._ended()

    def transfer(self) -> bool:
        """Completes a tile load, if there is one."""
        if not self.transfers:
            return False
        self.transfers.pop(self.random.randrange(len(self.transfers)))()
        return True

    def _advance(self) -> None:
        """Maybe completes something in flight."""
        if self.random.random() < 0.3:
            self.transfer()
        if self.random.random() < 0.5:
            warp = self.random.choice(self.warps)
            self.random.choice((warp.products, warp.copies, warp.stores)).advance()

    def _deadlock(self) -> None:
        lines = []
        for w in self.warps:
            where = (
                f" at line {w.at.line} ({w.at.source}), `{w.at.name}`: {w.why}" if w.state == "blocked" and w.at else ""
            )
            lines.append(f"  warp {w.index} {'waits' if w.state == 'blocked' else 'has ended'}{where}")
        fault = Deadlock(f"CTA {self.position}: every warp waits\n" + "\n".join(lines))
        self.faults.append(fault)
        raise fault

    def _ended(self) -> None:
        for w in self.warps:
            for kind, groups in (("wgmma", w.products), ("cp.async", w.copies), ("bulk stores", w.stores)):
                left = groups.unfinished
                if left:
                    w.at = left[0].instruction
                    w.report("unfinished", f"the warp ends without waiting for its {kind}")
                while groups.advance():
                    pass
        for b in self.mbarriers.values():
            if b.pending != b.count or b.transactions:
                self.report(None, "barrier", f"the program ends in the middle of a phase of {b}")
        if self.free < self.left_over:
            more = self.left_over - self.free
            self.report(None, "registers", f"setmaxnreg took {more} registers more than warps of the CTA gave back")
        for first in range(0, self.warps_in_cta, 4):
            group = self.warps[first : first + 4]
            if len({w.issued for w in group}) > 1:
                counts = ", ".join(str(w.issued) for w in group)
                self.report(None, "lanes", f"warps {first} to {first + 3} issued different numbers of wgmma: {counts}")
            if len({w.registers for w in group}) > 1:
                counts = ", ".join(str(w.registers) for w in group)
                self.report(
                    None, "registers", f"warps {first} to {first + 3} have different numbers of registers: {counts}"
                )
