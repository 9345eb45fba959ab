"""Jumps, barriers of the CTA, fences (PTX ISA 9.7.12, 9.7.13)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..barriers import NamedBarrier
from ..code import Code
from ..table import opcode
from ..text import Instruction

if TYPE_CHECKING:
    from ..cta import Cta, Warp

__all__ = ["arrive", "branch_by_index", "fence_proxy", "give_up", "publish_barriers", "synchronise"]

Array = NDArray[Any]
Mask = NDArray[np.bool_] | None
_END = 1 << 40


def _jump(c: Code) -> None:
    raise c.error("a jump is written by the program")


opcode("bra[.uni]", "target", "9.7.12.3 bra", jumps=True)(_jump)
opcode("brx.idx", "index, targets", "9.7.12.4 brx.idx", jumps=True)(_jump)
opcode("ret", "", "9.7.12.6 ret", jumps=True)(_jump)
opcode("exit", "", "9.7.12.7 exit", jumps=True)(_jump)


def branch_by_index(w: Warp, index: Array, table: list[int], mask: Mask) -> int:
    """Each lane jumps to a label of a table."""
    chosen = index if mask is None else index[mask]
    if chosen.max() >= len(table):
        w.report("trap", f"jumps to entry {int(chosen.max())} of a table of {len(table)}")
    there = np.array(table, np.int64)[np.minimum(index, len(table) - 1)]
    if mask is None:
        if (there == there[0]).all():
            return int(there[0])
        w.pcs = there
    else:
        w.pcs = np.where(mask, there, w.pcs)
    return -1


_BAR = "9.7.13.1 bar, barrier"


@opcode("bar[.cta].<what:sync>", "a[, b]", _BAR, waits=True)
@opcode("barrier[.cta].<what:sync>[.aligned]", "a[, b]", _BAR, waits=True)
def barrier_sync(c: Code) -> None:
    c.whole_warp()
    threads = c.use(c.operands[1], "u4") if len(c.operands) > 1 else "None"
    c.add(f"if not control.synchronise(C, w, {c.at}, {c.use(c.operands[0], 'u4')}, {threads}): return -2")


@opcode("bar[.cta].<what:arrive>", "a, b", _BAR)
@opcode("barrier[.cta].<what:arrive>[.aligned]", "a, b", _BAR)
def barrier_arrive(c: Code) -> None:
    c.whole_warp()
    c.add(f"control.arrive(C, w, {c.at}, {c.use(c.operands[0], 'u4')}, {c.use(c.operands[1], 'u4')})")


def _join(C: Cta, w: Warp, number: Array, threads: Array | None) -> NamedBarrier:
    """A warp comes to a named barrier."""
    for values in (number, threads):
        if values is not None and (values != values[0]).any():
            w.report("lanes", "an operand of the barrier differs between lanes")
    wanted = 32 * C.warps_in_cta if threads is None else int(threads[0])
    if number[0] > 15:
        w.report("barrier", f"there are barriers 0 to 15, not {int(number[0])}")
    if wanted % 32 or not 0 < wanted <= 32 * C.warps_in_cta:
        w.report("barrier", f"a barrier of {wanted} threads in a CTA of {32 * C.warps_in_cta}")
    b = C.named.setdefault(int(number[0]), NamedBarrier(C.order.agents))
    if b.arrived and b.threads != wanted:
        w.report("barrier", f"comes to barrier {int(number[0])} of {wanted} threads, where others wait for {b.threads}")
    if w.index in b.arrived:
        w.report("barrier", f"comes to barrier {int(number[0])} twice before it is complete")
    b.threads = wanted
    b.arrive(w.index, C.order)
    return b


def arrive(C: Cta, w: Warp, at: Instruction, number: Array, threads: Array) -> None:
    """Comes to a barrier without waiting."""
    w.at = at
    _join(C, w, number, threads)


def synchronise(C: Cta, w: Warp, at: Instruction, number: Array, threads: Array | None) -> bool:
    """Comes to a barrier; whether all have come."""
    w.at = at
    if w.barrier is None:
        b = _join(C, w, number, threads)
        w.barrier = b, b.generation - (not b.arrived)
    b, generation = w.barrier
    if b.generation > generation:
        w.barrier = None
        C.order.learn(w.index, *b.told)
        C.order.tick(w.index)
        return True
    w.block(
        f"barrier {int(number[0])}, to which {32 * len(b.arrived)} of {b.threads} threads have come",
        lambda: b.generation > generation,
    )
    return False


_FENCE = "9.7.13.4 membar, fence"


@opcode("membar.<scope:cta|gl|sys>", "", _FENCE)
@opcode("fence.<sem:sc|acq_rel|acquire|release>.<scope:cta|cluster|gpu|sys>", "", _FENCE)
@opcode("fence.proxy.async.global", "", _FENCE)
def memory_fence(c: Code) -> None:
    """Orders a thread's own accesses, which the emulator never reorders; it makes nothing known to other threads."""


@opcode("fence.proxy.async[.<space:shared::cta|shared::cluster>]", "", _FENCE)
def proxy_fence(c: Code) -> None:
    c.add(f"if ({c.mask}).any(): control.fence_proxy(C, w)" if c.mask else "control.fence_proxy(C, w)")


def fence_proxy(C: Cta, w: Warp) -> None:
    """What the warp knows of is there for the asynchronous proxy."""
    C.order.fence(w.index)


@opcode("fence.mbarrier_init.release.cluster", "", _FENCE)
def barrier_fence(c: Code) -> None:
    c.add(f"if ({c.mask}).any(): control.publish_barriers(C, w)" if c.mask else "control.publish_barriers(C, w)")


def publish_barriers(C: Cta, w: Warp) -> None:
    """The mbarriers that the warp knows of are there for the copy engine."""
    for b in C.mbarriers.values():
        writer = int(C.shared.writer[b.address])
        b.published |= bool(C.shared.written[b.address] <= C.order.known[w.index][writer])


@opcode("griddepcontrol.<what:launch_dependents|wait>", "", "9.7.13.13 griddepcontrol")
@opcode("nanosleep.u32", "t", "9.7.19.2 nanosleep")
def nothing(c: Code) -> None:
    """Grids run one after another, and time is not emulated."""
    for o in c.operands:
        c.use(o, "u4")


@opcode("prefetch.global.<level:L1|L2>", "[a]", "9.7.9.15 prefetch")
def prefetch(c: Code) -> None:
    c.address(c.operands[0])  # a prefetch of any address is harmless


@opcode(
    "createpolicy.fractional.<first:L2::evict_last|L2::evict_first|L2::evict_unchanged|L2::evict_normal>[.L2::evict_unchanged].b64",
    "d[, fraction]",
    "9.7.9.18 createpolicy",
)
def policy(c: Code) -> None:
    c.result(c.constant(0, "u8"), "u8")  # changes nothing, see memory.py


@opcode("trap", "", "9.7.19.4 trap")
def trap(c: Code) -> None:
    c.add(f"if ({c.mask}).any(): control.give_up(w, {c.at})" if c.mask else f"control.give_up(w, {c.at})")


def give_up(w: Warp, at: Instruction) -> None:
    """The program stops itself."""
    w.at = at
    w.report("trap", "the program gave up")
