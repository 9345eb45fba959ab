"""Which registers a warp must leave alone, because a wgmma in flight works on them.

The rules (PTX ISA 9.7.15.7.1 wgmma.fence, 9.7.15.7.3 wgmma.wait_group): nobody touches the accumulator of a product
before the wait that completes it, except further products that accumulate into it; nobody writes the registers of A
before that; and a register that a product uses is ordered after its computation by a ``wgmma.fence``.

Compilers rename registers with ``mov``, which the assembler removes. So a plain ``mov`` gives what is in flight one
more name instead of touching it, and a constant or a renamed register needs no fence.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from .text import Instruction

__all__ = ["NOTHING", "Effect", "State", "effect", "follow", "tracked_registers"]

#: What a register holds of a product in flight: the product's place in its group, and the register's place in it.
Held = tuple[str, int, int]


class State(NamedTuple):
    """What is in flight in a warp.

    Args:
        fenced: whether there was a wgmma.fence at all.
        computed: registers that were written since the last one.
        groups: accumulators of the committed groups, oldest first, and last of the open group.
        operands: registers of A, likewise.
        products: how many products the open group has.
    """

    fenced: bool
    computed: frozenset[str]
    groups: tuple[frozenset[Held], ...]
    operands: tuple[frozenset[str], ...]
    products: int


NOTHING = State(False, frozenset(), (frozenset(),), (frozenset(),), 0)


@dataclass(frozen=True)
class Effect:
    """What an instruction does to registers.

    Args:
        kind: "product", "fence", "commit", "wait", "rename" or "other".
        reads, writes: registers, in the order of the operands.
        number: of a wait, the groups that stay pending; of a product, 0 if it does not read its accumulator.
    """

    instruction: Instruction
    kind: str
    reads: tuple[str, ...]
    writes: tuple[str, ...]
    number: int = 1


def effect(instruction: Instruction, writes: bool, registers: dict[str, int]) -> Effect:
    """The effect of an instruction; ``writes``: whether its first operand is a destination."""

    def within(*operands: str) -> tuple[str, ...]:
        return tuple(r for o in operands for r in re.findall(r"[%$\w.@]+", o) if r in registers)

    name, operands = instruction.name, instruction.operands
    guard = (instruction.predicate,) if instruction.predicate else ()
    if name.startswith("wgmma.mma_async"):
        a = within(operands[1]) if operands[1].startswith("{") else ()
        return Effect(instruction, "product", a, within(operands[0]), 0 if operands[3] == "0" else 1)
    for what in ("fence", "commit", "wait"):
        if name.startswith(f"wgmma.{what}"):
            return Effect(instruction, what, (), (), int(operands[0]) if operands else 1)
    target = operands[:1] if writes else ()
    sources = operands[1:] if writes else operands
    if name.startswith("mov.") and not guard and "{" not in "".join(operands):
        return Effect(instruction, "rename", within(*sources), within(*target))
    return Effect(instruction, "other", guard + within(*sources), within(*target))


def tracked_registers(effects: Iterable[Effect]) -> frozenset[str]:
    """The registers that products use, under all their names."""
    effects = list(effects)
    found = {r for e in effects if e.kind == "product" for r in e.reads + e.writes}
    renames = [e.reads + e.writes for e in effects if e.kind == "rename" and e.reads]
    size = -1
    while size != len(found):
        size = len(found)
        for pair in renames:
            if not found.isdisjoint(pair):
                found.update(pair)
    return frozenset(found)


def _holders(groups: list[set[Held]], register: str) -> list[tuple[int, Held]]:
    return [(g, held) for g, group in enumerate(groups) for held in group if held[0] == register]


def _release(groups: list[set[Held]], register: str) -> str | None:
    """A register gets a new value; a complaint if it was the last name of something in flight."""
    complaint = None
    for g, held in _holders(groups, register):
        groups[g].discard(held)
        if not any(other[1:] == held[1:] for other in groups[g]):
            complaint = f"writes {register}, the accumulator of a wgmma in flight"
    return complaint


def follow(
    effects: Iterable[Effect], state: State, tracked: frozenset[str]
) -> tuple[State, list[tuple[Instruction, str, str]]]:
    """The state after a stretch of instructions, and its faults: (instruction, kind, text)."""
    fenced, computed = state.fenced, set(state.computed)
    groups = [set(g) for g in state.groups]
    operands = [set(o) for o in state.operands]
    products = state.products
    faults: list[tuple[Instruction, str, str]] = []
    for e in effects:
        if e.kind == "fence":
            fenced, computed = True, set()
        elif e.kind == "commit":
            groups.append(set())
            operands.append(set())
            products = 0
        elif e.kind == "wait":
            if products:
                faults.append((e.instruction, "fence", "products before it are not committed"))
            keep = e.number + 1
            groups, operands = groups[-keep:], operands[-keep:]
        elif e.kind == "product":
            faults += [(e.instruction, *fault) for fault in _product(e, fenced, computed, groups, operands)]
            for r in e.writes:
                for g, held in _holders(groups, r):
                    groups[g].discard(held)
            groups[-1].update((r, products, i) for i, r in enumerate(e.writes))
            operands[-1].update(e.reads)
            products += 1
        elif e.kind == "rename":
            for r in tracked.intersection(e.writes):
                held = _holders(groups, e.reads[0]) if e.reads else []
                if any(r in o for o in operands):
                    faults.append((e.instruction, "registers", f"writes {r}, an operand of a wgmma in flight"))
                if not (held and _holders(groups, r) == [(g, (r, *h[1:])) for g, h in held]):
                    if complaint := _release(groups, r):
                        faults.append((e.instruction, "registers", complaint))
                    for g, h in held:
                        groups[g].add((r, *h[1:]))
                computed.discard(r)
                if e.reads and e.reads[0] in computed:
                    computed.add(r)
        else:
            for r in tracked.intersection(e.reads):
                if _holders(groups, r):
                    faults.append((e.instruction, "registers", f"reads {r}, the accumulator of a wgmma in flight"))
            for r in tracked.intersection(e.writes):
                if any(r in o for o in operands):
                    faults.append((e.instruction, "registers", f"writes {r}, an operand of a wgmma in flight"))
                if complaint := _release(groups, r):
                    faults.append((e.instruction, "registers", complaint))
                computed.add(r)
    after = State(
        fenced,
        frozenset(computed),
        tuple(map(frozenset, groups)),
        tuple(map(frozenset, operands)),
        products,
    )
    return after, faults


def _product(
    e: Effect, fenced: bool, computed: set[str], groups: list[set[Held]], operands: list[set[str]]
) -> Iterable[tuple[str, str]]:
    """What is wrong with a product where it is issued."""
    if not fenced:
        yield "fence", "no wgmma.fence before it"
    needed = e.reads + e.writes if e.number else e.reads
    if late := [r for r in needed if r in computed]:
        yield "fence", f"{late[0]} was computed after the last wgmma.fence"
    if taken := [r for r in e.reads if _holders(groups, r)]:
        yield "registers", f"multiplies {taken[0]}, the accumulator of a wgmma in flight"
    if taken := [r for r in e.writes if any(r in o for o in operands)]:
        yield "registers", f"accumulates into {taken[0]}, an operand of a wgmma in flight"
