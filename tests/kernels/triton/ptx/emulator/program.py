"""A kernel as Python functions: one for each stretch of instructions, for a whole warp and for some of its lanes.

Lanes that diverge run by themselves, those with the lowest program counter first, until they meet again. Everything is
checked when a program is loaded; functions are compiled when they are first reached.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import formats
from .code import BYTES, DTYPES, Code
from .cta import Cta, Warp
from .flight import effect, follow, tracked_registers
from .instructions import MODULES
from .table import find
from .text import Instruction, Kernel, Label, PtxError, parse

__all__ = ["END", "Program", "load"]

#: The program counter of what has ended.
END = 1 << 40
#: What a register holds before it is written.
_POISON = {
    1: np.zeros(32, bool),
    8: np.full(32, 0xBA, np.uint8),
    16: np.full(32, 0x7FFB, np.uint16),
    32: np.full(32, 0x7FC0BEEF, np.uint32),
    64: np.full(32, 0x7FF80000DEADBEEF, np.uint64),
}
_LANE = np.arange(32, dtype=np.uint32)


class Program:
    """A kernel that can be run.

    Raises:
        PtxError: for an opcode, operand or name that is not emulated, with its line; nothing has run then.
    """

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel
        for name, bits in kernel.registers.items():
            if bits not in _POISON:
                raise PtxError(f"register {name} of {bits} bits is not emulated")
        self.index = {name: i for i, name in enumerate(kernel.registers)}
        self.bits = list(kernel.registers.values())
        self.constants: list[NDArray[Any]] = []
        self._constant: dict[tuple[int, str], int] = {}
        self.instructions = [b for b in kernel.body if isinstance(b, Instruction)]
        self.stretches, self.labels = self._stretches()
        self._full: dict[int, Callable[..., int]] = {}
        self._some: dict[int, Callable[..., int]] = {}
        self.namespace: dict[str, Any] = {
            "np": np,
            "where": np.where,
            "formats": formats,
            "const32": functools.lru_cache(None)(lambda value: np.full(32, value, np.uint32)),
            "K": self.constants,
            "I": self.instructions,
            "LANE": _LANE,
            "END": END,
            **DTYPES,
            **MODULES,
        }
        for s in range(len(self.stretches)):
            self._write(s, masked=True)  # the masked version has every check of the other
        effects = [effect(i, find(i)[0].writes, kernel.registers) for i in self.instructions]
        self._tracked = tracked_registers(effects)
        self._effects = [
            [
                effects[i]
                for i in stretch
                if effects[i].kind not in ("other", "rename")
                or not self._tracked.isdisjoint(effects[i].reads + effects[i].writes)
            ]
            for stretch in self.stretches
        ]
        self._followed: dict[Any, Any] = {}

    # -- structure -----------------------------------------------------------------------------------------------------
    def _stretches(self) -> tuple[list[list[int]], dict[str, int]]:
        """Instructions by stretches: labels begin one, jumps end one, what may wait is alone in one."""
        stretches: list[list[int]] = [[]]
        labels: dict[str, int] = {}
        n = 0
        for item in self.kernel.body:
            if isinstance(item, Label):
                if stretches[-1]:
                    stretches.append([])
                labels[item.name] = len(stretches) - 1
                continue
            row, _ = find(item)
            if row.waits and stretches[-1]:
                stretches.append([])
            stretches[-1].append(n)
            n += 1
            if row.waits or row.jumps:
                stretches.append([])
        if not stretches[-1]:
            stretches.pop()
        return stretches, labels

    def constant(self, value: int, kind: str) -> str:
        """The name of an array of 32 times ``value``, for generated code."""
        bits = value & (1 << 8 * BYTES[kind]) - 1
        key = (bits, kind)
        if key not in self._constant:
            array = np.full(32, bits, f"u{BYTES[kind]}").view(kind)
            array.flags.writeable = False
            self._constant[key] = len(self.constants)
            self.constants.append(array)
        return f"K[{self._constant[key]}]"

    # -- code ----------------------------------------------------------------------------------------------------------
    def _write(self, s: int, masked: bool) -> str:
        """The source of a stretch."""
        lines: list[str] = []
        next_ = s + 1 if s + 1 < len(self.stretches) else END
        for j in self.stretches[s]:
            instruction = self.instructions[j]
            code = Code(self, instruction, j, None)
            guard = None
            if instruction.predicate:
                guard = code.predicate(("!" if instruction.negated else "") + instruction.predicate)
            if code.row.jumps:
                lines.append(f"return {self._jump(code, guard, next_, masked)}")
                break
            code.mask = guard if not masked else f"(M & {guard})" if guard else "M"
            code.row.emit(code)
            lines += code.lines
        else:
            lines.append(f"return {next_}")
        return f"def f(R, w, C{', M' if masked else ''}):\n" + "".join(f"    {line}\n" for line in lines)

    def _compiled(self, s: int, masked: bool) -> Callable[..., int]:
        local: dict[str, Any] = {}
        exec(
            compile(self._write(s, masked), f"<stretch {s}{' of some lanes' if masked else ''}>", "exec"),
            self.namespace,
            local,
        )
        return local["f"]

    def _place(self, code: Code, label: str) -> int:
        if label not in self.labels:
            raise code.error(f"there is no label {label}")
        return self.labels[label]

    def _jump(self, code: Code, guard: str | None, next_: int, masked: bool) -> str:
        """The expression of where a jump leads: a stretch, or -1 if the lanes have diverged."""
        instruction = code.instruction
        if instruction.name == "brx.idx":
            if guard is not None or instruction.operands[1] not in self.kernel.tables:
                raise code.error("needs a table of targets and no predicate")
            table = [self._place(code, label) for label in self.kernel.tables[instruction.operands[1]]]
            entry, mask = code.use(instruction.operands[0], "u4"), "M" if masked else "None"
            return f"control.branch_by_index(w, {entry}, {table}, {mask})"
        there = "END" if instruction.name in ("ret", "exit") else str(self._place(code, instruction.operands[0]))
        if guard is None:
            return f"w.jump_some(M, {there})" if masked else there
        return f"w.split_some(M, {guard}, {there}, {next_})" if masked else f"w.split({guard}, {there}, {next_})"

    # -- running -------------------------------------------------------------------------------------------------------
    def _follow(self, w: Warp, pc: int) -> None:
        """Keeps account of the registers of products in flight."""
        key = (pc, w.flight)
        if key not in self._followed:
            self._followed[key] = follow(self._effects[pc], w.flight, self._tracked)
        w.flight, faults = self._followed[key]
        for instruction, kind, text in faults:
            w.at = instruction
            w.report(kind, text)

    def run(self, C: Cta, w: Warp, budget: int) -> None:
        """Runs a warp until it waits, ends, or has done ``budget`` stretches."""
        if w.values is None:
            w.values = [_POISON[bits] for bits in self.bits]
        R = w.values
        w.state = "ready"
        while budget > 0:
            budget -= 1
            w.steps += 1
            if w.pcs is None:
                pc = w.pc
                if pc >= END:
                    w.state = "done"
                    return
                f = self._full.get(pc)
                if f is None:
                    f = self._full[pc] = self._compiled(pc, False)
                if self._effects[pc]:
                    self._follow(w, pc)
                C.counts["instructions"] += len(self.stretches[pc])
                to = f(R, w, C)
                if to >= 0:
                    w.pc = to
            else:
                alive = w.pcs < END
                if not alive.any():
                    w.state = "done"
                    return
                free = alive & ~w.parked
                pc = int(w.pcs[free if free.any() else alive].min())
                M = w.pcs == pc
                if M.all():
                    w.pc, w.pcs = pc, None
                    w.parked = np.zeros(32, bool)
                    continue
                f = self._some.get(pc)
                if f is None:
                    f = self._some[pc] = self._compiled(pc, True)
                if self._effects[pc]:
                    self._follow(w, pc)
                C.counts["instructions"] += len(self.stretches[pc])
                to = f(R, w, C, M)
                w.parked = w.parked | M if to == -3 else w.parked & ~M
                if to >= 0:
                    w.pcs = np.where(M, to, w.pcs)
            if to == -2:
                w.state = "blocked"
                return


_PROGRAMS: dict[str, Program] = {}


def load(text: str) -> Program:
    """The program of a PTX module; loaded once a process."""
    if text not in _PROGRAMS:
        _PROGRAMS[text] = Program(parse(text))
    return _PROGRAMS[text]
