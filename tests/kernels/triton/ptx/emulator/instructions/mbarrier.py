"""Barriers in shared memory (PTX ISA 9.7.13.15)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from .. import barriers
from ..barriers import TRANSACTIONS, Mbarrier
from ..code import Code
from ..memory import SHARED
from ..table import opcode
from ..text import Instruction

if TYPE_CHECKING:
    from ..cta import Cta, Warp

__all__ = ["arrive", "expect", "find", "initialise", "invalidate", "test", "wait"]

Array = NDArray[Any]
Mask = NDArray[np.bool_] | None

_SPACE = ".<space:shared|shared::cta>.b64"
_SEM = "[.<sem:release|relaxed>.<scope:cta|cluster>]"
_ACQUIRE = "[.<sem:acquire|relaxed>.<scope:cta|cluster>]"


def _lanes(mask: Mask) -> list[int]:
    return list(range(32)) if mask is None else np.nonzero(mask)[0].tolist()


def find(C: Cta, w: Warp, address: int) -> Mbarrier:
    """The mbarrier at an address; there must be one, and its initialisation must come before."""
    row = int(C.shared.rows(np.array([address], np.uint64), 8, w.report)[0])
    place = 8 * row
    if place not in C.mbarriers:
        w.report("barrier", f"there is no mbarrier at byte {place - SHARED} of shared memory")
        raise C.faults[-1]
    writer, clock = int(C.shared.writer[place]), int(C.shared.written[place])
    if clock > C.order.known[w.index][writer]:
        w.report(
            "race", f"uses the mbarrier at byte {place - SHARED} that {C.order.name(writer)} initialises, not ordered"
        )
    return C.mbarriers[place]


def visible(C: Cta, w: Warp, b: Mbarrier) -> None:
    """Demands that the asynchronous proxy sees the initialisation of an mbarrier."""
    writer, clock = int(C.shared.writer[b.address]), int(C.shared.written[b.address])
    if clock > C.order.fenced[w.index][writer] and not b.published:
        w.report(
            "proxy",
            f"the copy engine uses the mbarrier at byte {b.address - SHARED}, which {C.order.name(writer)} initialised "
            "without fence.proxy.async or fence.mbarrier_init",
        )


@opcode(f"mbarrier.init{_SPACE}", "[a], count", "9.7.13.15.9 mbarrier.init")
def init(c: Code) -> None:
    c.add(c.call("mbarrier.initialise", c.address(c.operands[0]), c.use(c.operands[1], "u4")))


def initialise(C: Cta, w: Warp, at: Instruction, addresses: Array, counts: Array, mask: Mask) -> None:
    """Makes mbarriers."""
    w.at = at
    for lane in _lanes(mask):
        rows = C.shared.rows(addresses[lane : lane + 1], 8, w.report)
        place = 8 * int(rows[0])
        if place in C.mbarriers:
            if not C.mbarriers[place].idle:
                w.report("barrier", f"initialises {C.mbarriers[place]} while it is in use")
            C.clocks[place] = C.mbarriers[place].clock + 1
        if not 1 <= counts[lane] < 1 << 20:
            w.report("barrier", f"an mbarrier of {int(counts[lane])} arrivals")
        C.shared.write(rows, 8, np.zeros((1, 8), np.uint8), C.order.actor(w.index), w.report)
        agent = C.order.loads(place)
        C.mbarriers[place] = Mbarrier(place, int(counts[lane]), C.order.agents, agent, C.clocks.get(place, 0))


@opcode(f"mbarrier.inval{_SPACE}", "[a]", "9.7.13.15.10 mbarrier.inval")
def inval(c: Code) -> None:
    c.add(c.call("mbarrier.invalidate", c.address(c.operands[0])))


def invalidate(C: Cta, w: Warp, at: Instruction, addresses: Array, mask: Mask) -> None:
    """Gives the memory of mbarriers back; nobody may be in the middle of using them."""
    w.at = at
    for lane in _lanes(mask):
        b = find(C, w, int(addresses[lane]))
        if not b.idle:
            w.report("barrier", f"invalidates {b} while it is in use")
        rows = np.array([b.address // 8])
        C.shared.write(rows, 8, np.zeros((1, 8), np.uint8), C.order.actor(w.index), w.report)
        C.clocks[b.address] = b.clock + 1
        del C.mbarriers[b.address]


@opcode(f"mbarrier.arrive{_SEM}{_SPACE}", "d, [a][, count]", "9.7.13.15.13 mbarrier.arrive")
@opcode(f"mbarrier.arrive.expect_tx{_SEM}{_SPACE}", "d, [a], bytes", "9.7.13.15.13 mbarrier.arrive")
def arrival(c: Code) -> None:
    if c.operands[0] != "_":
        raise c.error("the state that an arrival returns is not emulated; wait by parity")
    extra = c.use(c.operands[2], "u4") if len(c.operands) > 2 else "None"
    expects = "expect_tx" in c.instruction.name
    count, size = ("None", extra) if expects else (extra, "None")
    c.add(c.call("mbarrier.arrive", c.address(c.operands[1]), count, size))


def arrive(
    C: Cta, w: Warp, at: Instruction, addresses: Array, counts: Array | None, sizes: Array | None, mask: Mask
) -> None:
    """Each lane arrives once, or ``counts`` times, after it has announced ``sizes`` bytes."""
    w.at = at
    lanes = _lanes(mask)
    for lane in lanes:
        b = find(C, w, int(addresses[lane]))
        if sizes is not None:
            _announce(w, b, int(sizes[lane]))
        count = 1 if counts is None else int(counts[lane])
        if count > b.pending:
            w.report("barrier", f"{count} arrivals on {b}, which are too many")
            count = b.pending
        b.arrive(count, w.index, C.order)
    if lanes:
        C.order.tick(w.index)


def _announce(w: Warp, b: Mbarrier, size: int) -> None:
    b.transactions += size
    if abs(b.transactions) > TRANSACTIONS:
        w.report("barrier", f"{b}: more bytes than an mbarrier can count")


@opcode(f"mbarrier.expect_tx[.relaxed.cta]{_SPACE}", "[a], bytes", "9.7.13.15.11 mbarrier.expect_tx")
def expect_bytes(c: Code) -> None:
    c.add(c.call("mbarrier.expect", c.address(c.operands[0]), c.use(c.operands[1], "u4")))


def expect(C: Cta, w: Warp, at: Instruction, addresses: Array, sizes: Array, mask: Mask) -> None:
    """Announces bytes."""
    w.at = at
    for lane in _lanes(mask):
        _announce(w, find(C, w, int(addresses[lane])), int(sizes[lane]))


_TRY = "9.7.13.15.16 mbarrier.test_wait, mbarrier.try_wait"


@opcode(f"mbarrier.try_wait.parity{_ACQUIRE}{_SPACE}", "p, [a], parity[, time]", _TRY, waits=True)
def wait_by_parity(c: Code) -> None:
    call = c.call("mbarrier.wait", c.address(c.operands[1]), c.use(c.operands[2], "u4"))
    if len(c.operands) > 3:
        c.use(c.operands[3], "u4")
    c.add(f"t_ = {call}", "if t_ is None: return -2")
    c.put_predicate(c.operands[0], "t_")


@opcode(f"mbarrier.test_wait.parity{_ACQUIRE}{_SPACE}", "p, [a], parity", _TRY, waits=True)
def test_by_parity(c: Code) -> None:
    c.add(f"t_ = {c.call('mbarrier.test', c.address(c.operands[1]), c.use(c.operands[2], 'u4'))}")
    c.add("if t_ is None: return -2")
    c.put_predicate(c.operands[0], "t_")


def _awaited(C: Cta, w: Warp, addresses: Array, parities: Array, mask: Mask) -> tuple[Mbarrier, int] | None:
    lanes = _lanes(mask)
    if not lanes:
        return None
    if len({(int(addresses[i]), int(parities[i]) & 1) for i in lanes}) > 1:
        w.report("lanes", "lanes wait for different mbarriers or parities, which is not emulated")
    return find(C, w, int(addresses[lanes[0]])), int(parities[lanes[0]])


def wait(C: Cta, w: Warp, at: Instruction, addresses: Array, parities: Array, mask: Mask) -> Array | None:
    """True once the phase is complete; ``None`` as long as the warp has to wait.

    With a random schedule it is false at times, as the hardware's is when its time is over.
    """
    w.at = at
    found = _awaited(C, w, addresses, parities, mask)
    if found is None:
        return np.zeros(32, bool)
    b, parity = found
    if w.waiting is not None:
        w.waiting.waiting -= 1
        w.waiting = None
    if barriers.awaited(b.phase, parity):
        C.order.learn(w.index, *b.told)
        return np.ones(32, bool)
    if C.schedule == "random" and C.random.random() < 0.1:
        return np.zeros(32, bool)
    b.waiting += 1
    w.waiting = b
    w.block(f"waits for parity {parity & 1} of {b}", lambda: barriers.awaited(b.phase, parity))
    return None


def test(C: Cta, w: Warp, at: Instruction, addresses: Array, parities: Array, mask: Mask) -> Array | None:
    """Whether the phase is complete. What is in flight gets on a little before the answer is no."""
    w.at = at
    found = _awaited(C, w, addresses, parities, mask)
    if found is None:
        return np.zeros(32, bool)
    b, parity = found
    if barriers.awaited(b.phase, parity):
        C.order.learn(w.index, *b.told)
        return np.ones(32, bool)
    if w.tested != at:
        # another warp runs before the same question is answered
        w.tested = at
        w.block(f"tests parity {parity & 1} of {b}", lambda: True)
        return None
    w.tested = None
    C.transfer()
    return np.zeros(32, bool)
