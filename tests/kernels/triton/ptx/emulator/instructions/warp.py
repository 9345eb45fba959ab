"""What the lanes of a warp tell each other (PTX ISA 9.7.9.6 shfl.sync, 9.7.13)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..code import NUMPY, Code
from ..table import opcode
from ..text import Instruction

if TYPE_CHECKING:
    from ..cta import Cta, Warp

__all__ = ["ballot", "elect", "gather", "match", "members", "redux", "shuffle", "sources", "vote"]

Array = NDArray[Any]
Mask = NDArray[np.bool_] | None
LANE = np.arange(32)
u4 = np.uint32


def members(C: Cta, w: Warp, at: Instruction, named: Array, mask: Mask) -> Array:
    """The lanes that take part. Those that execute must be those that the member mask names and have not ended."""
    active = np.ones(32, bool) if mask is None else mask
    w.at = at
    if not active.any():
        return active
    wanted = named[active]
    if (wanted != wanted[0]).any():
        w.report("lanes", "lanes name different members")
    listed = (int(wanted[0]) >> LANE & 1).astype(bool)
    ended = np.zeros(32, bool) if w.pcs is None else w.pcs >= 1 << 40
    if (listed & ~ended != active).any():
        w.report(
            "lanes",
            f"the member mask names {int(wanted[0]):#010x}, executed by {sum(1 << int(i) for i in LANE[active]):#010x}",
        )
    return active


def _mask(c: Code, operand: str) -> str:
    return c.call("warp.members", c.use(operand, "u4"))


@opcode("shfl.sync.<mode:up|down|bfly|idx>.b32", "d|p, a, b, c, members", "9.7.9.6 shfl.sync")
def shuffle_words(c: Code) -> None:
    targets = [t.strip() for t in c.operands[0].split("|")]
    words = ", ".join(c.use(o, "u4") for o in c.operands[1:4])
    c.add(f"m_ = {_mask(c, c.operands[4])}")
    c.add(f"t_, q_ = warp.shuffle(w, {words}, {c.part['mode']!r}, m_)")
    c.put(targets[0], "t_", "u4")
    if len(targets) > 1:
        c.put_predicate(targets[1], "q_")


def sources(b: Array, control: Array, mode: str) -> tuple[Array, Array]:
    """The lane that each lane reads, and whether it is inside its segment.

    The control word has the clamp in bits 0 to 4 and the mask of the segment in bits 8 to 12.
    """
    by, clamp, segment = b.astype(np.int64) & 31, control.astype(np.int64) & 31, control.astype(np.int64) >> 8 & 31
    limit = (LANE & segment) | (clamp & ~segment)
    lane = {
        "up": LANE - by,
        "down": LANE + by,
        "bfly": LANE ^ by,
        "idx": (LANE & segment) | (by & ~segment),
    }[mode]
    return lane, lane >= limit if mode == "up" else lane <= limit


def shuffle(w: Warp, x: Array, b: Array, control: Array, mode: str, active: Array) -> tuple[Array, Array]:
    """The words of other lanes; a lane whose source is outside of its segment keeps its own."""
    lane, inside = sources(b, control, mode)
    source = np.where(inside, lane, LANE)
    if (active & ~active[source]).any():
        w.report("lanes", "reads a lane that does not take part")
    return x[source], inside


@opcode("vote.sync.<mode:all|any|uni>.pred", "d, a, members", "9.7.13.9 vote.sync")
@opcode("vote.sync.<mode:ballot>.b32", "d, a, members", "9.7.13.9 vote.sync")
def votes(c: Code) -> None:
    c.add(f"m_ = {_mask(c, c.operands[2])}")
    if c.part["mode"] == "ballot":
        c.result(f"warp.ballot({c.predicate(c.operands[1])}, m_)", "u4")
    else:
        c.put_predicate(c.operands[0], f"warp.vote({c.predicate(c.operands[1])}, {c.part['mode']!r}, m_)")


def ballot(p: Array, active: Array) -> Array:
    """The lanes where ``p`` is true, as bits."""
    return np.full(32, sum(1 << int(i) for i in LANE[p & active]), u4)


def vote(p: Array, mode: str, active: Array) -> Array:
    """Whether ``p`` is true in all lanes, in any, or the same in all."""
    chosen = p[active]
    answer = {"all": chosen.all(), "any": chosen.any(), "uni": chosen.all() or not chosen.any()}[mode]
    return np.full(32, bool(answer))


@opcode("activemask.b32", "d", "9.7.13.11 activemask")
def active_lanes(c: Code) -> None:
    c.result(f"warp.ballot(np.ones(32, bool), {c.mask or 'np.ones(32, bool)'})", "u4")


@opcode("redux.sync.<op:add|min|max>.<type:u32|s32>", "d, a, members", "9.7.13.12 redux.sync")
@opcode("redux.sync.<op:and|or|xor>.<type:b32>", "d, a, members", "9.7.13.12 redux.sync")
def reduce(c: Code) -> None:
    kind = NUMPY[c.part["type"]]
    c.add(f"m_ = {_mask(c, c.operands[2])}")
    c.result(f"warp.redux({c.use(c.operands[1], kind)}, {c.part['op']!r}, m_)", kind)


def redux(x: Array, op: str, active: Array) -> Array:
    """One reduction over the lanes, for all of them."""
    function = {
        "add": np.add,
        "min": np.minimum,
        "max": np.maximum,
        "and": np.bitwise_and,
        "or": np.bitwise_or,
        "xor": np.bitwise_xor,
    }[op]
    chosen = x[active]
    return np.full(32, function.reduce(chosen, dtype=x.dtype) if chosen.size else 0, x.dtype)


@opcode("match.<mode:any>.sync.<type:b32|b64>", "d, a, members", "9.7.13.10 match.sync")
def match_lanes(c: Code) -> None:
    c.add(f"m_ = {_mask(c, c.operands[2])}")
    c.result(f"warp.match({c.use(c.operands[1], NUMPY[c.part['type']])}, m_)", "u4")


def match(x: Array, active: Array) -> Array:
    """For each lane, the lanes with the same value."""
    same = (x[:, None] == x[None, :]) & active[None, :]
    return (same.astype(np.uint64) << LANE.astype(np.uint64)).sum(axis=1).astype(u4)


@opcode("elect.sync", "d|p, members", "9.7.13.14 elect.sync")
def elect_leader(c: Code) -> None:
    word, predicate = (t.strip() for t in c.operands[0].split("|"))
    c.add(f"q_ = warp.elect({_mask(c, c.operands[1])})")
    c.put(word, "np.full(32, int(q_.argmax()), u4)", "u4")
    c.put_predicate(predicate, "q_")


def elect(active: Array) -> Array:
    """True in one lane that takes part, the lowest; which one, PTX leaves open."""
    leader = np.zeros(32, bool)
    leader[int(np.argmax(active))] = True
    return leader


@opcode("bar.warp.sync", "members", "9.7.13.2 bar.warp.sync", waits=True)
def warp_barrier(c: Code) -> None:
    if c.instruction.predicate:  # lanes whose predicate is false never come
        c.add(_mask(c, c.operands[0]))
    else:
        c.add(f"if not {c.call('warp.gather', c.use(c.operands[0], 'u4'))}: return -3")


def gather(C: Cta, w: Warp, at: Instruction, named: Array, mask: Mask) -> bool:
    """Whether all lanes that the member mask names have come; if none of the others can move, they never will."""
    missing = np.zeros(32, bool) if mask is None else ~mask & (w.pcs < 1 << 40)  # type: ignore[operator]
    if (missing & (int(named[0]) >> LANE & 1).astype(bool) & ~w.parked).any():
        return False
    members(C, w, at, named, mask)
    return True
