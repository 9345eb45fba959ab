"""Writes an instruction as lines of Python over numpy arrays of 32 lanes.

In generated code ``R`` is the list of the warp's registers, each an array of 32 unsigned integers (predicates: bools),
``w`` the warp, ``C`` the CTA, ``I`` the instructions, ``K`` constants, ``M`` the mask of the lanes that run where they
have diverged. An instruction replaces arrays in ``R`` and never changes one.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import numpy as np

from .memory import SHARED
from .table import Opcode, find
from .text import Instruction, PtxError, split_operands

if TYPE_CHECKING:
    from .program import Program

__all__ = ["BYTES", "NUMPY", "Code"]

#: PTX type -> numpy type by its short name (``dtype.kind`` and bytes).
NUMPY = {f"{k}{8 * n}": f"{k if k in 'uf' else {'b': 'u', 's': 'i'}[k]}{n}" for k in "bsu" for n in (1, 2, 4, 8)}
NUMPY |= {"f16": "f2", "f32": "f4", "f64": "f8", "bf16": "u2", "tf32": "u4"}
NUMPY |= {"f16x2": "u4", "bf16x2": "u4", "f32x2": "u8", "e4m3x2": "u2", "e5m2x2": "u2", "pred": "?"}
#: The numpy types by that short name.
DTYPES = {n: np.dtype(n).type for n in ("u1", "u2", "u4", "u8", "i1", "i2", "i4", "i8", "f2", "f4", "f8")}
BYTES = {name: int(name[1]) for name in DTYPES}

_SPECIAL = {
    "%laneid": "LANE",
    "%warpid": "const32(w.index)",
    "%ntid.x": "const32(32 * C.warps_in_cta)",
    "%ntid.y": "const32(1)",
    "%ntid.z": "const32(1)",
    "%tid.x": "w.threads",
    "%tid.y": "const32(0)",
    "%tid.z": "const32(0)",
    # a cluster is one CTA
    "%clusterid.x": "const32(C.position[0])",
    "%clusterid.y": "const32(C.position[1])",
    "%clusterid.z": "const32(C.position[2])",
    "%cluster_ctarank": "const32(0)",
    "%cluster_ctaid.x": "const32(0)",
    **{f"%ctaid.{d}": f"const32(C.position[{i}])" for i, d in enumerate("xyz")},
    **{f"%nctaid.{d}": f"const32(C.grid[{i}])" for i, d in enumerate("xyz")},
}


class Code:
    """One instruction while it is written.

    Args:
        program: what it belongs to.
        instruction: what is written.
        index: its place in ``I``.
        mask: expression of the lanes that execute it, ``None`` for all.
    """

    def __init__(self, program: Program, instruction: Instruction, index: int, mask: str | None) -> None:
        self.program = program
        self.instruction = instruction
        self.row: Opcode
        self.row, self.part = find(instruction)
        self.operands = instruction.operands
        self.mask = mask
        self.at = f"I[{index}]"
        self.lines: list[str] = []
        self._indent = ""

    def error(self, what: str) -> PtxError:
        """An error that names the instruction."""
        i = self.instruction
        return PtxError(f"line {i.line} ({i.source}): `{i.text}`: {what}")

    def add(self, *lines: str) -> None:
        """Adds lines as they are."""
        self.lines += [self._indent + line for line in lines]

    def call(self, function: str, *arguments: object) -> str:
        """A call of a function that acts on the CTA: ``(C, w, instruction, *arguments, mask)``."""
        return f"{function}({', '.join(['C', 'w', self.at, *map(str, arguments), self.mask or 'None'])})"

    # -- reading ---------------------------------------------------------------------------------------------------
    def constant(self, value: int, kind: str) -> str:
        """The name of a constant array."""
        return self.program.constant(value, kind)

    def number(self, operand: str) -> int:
        """An operand that must be written as a number."""
        if not re.fullmatch(r"-?(0x[0-9a-fA-F]+|\d+)", operand):
            raise self.error(f"{operand} must be a number")
        return int(operand, 0)

    def index(self, register: str) -> int:
        """The place of a register in ``R``."""
        if register not in self.program.index:
            raise self.error(f"register {register} is not declared")
        return self.program.index[register]

    def predicate(self, operand: str) -> str:
        """A predicate operand, possibly negated."""
        if operand.startswith("!"):
            return f"(~{self.predicate(operand[1:])})"
        if self.program.bits[self.index(operand)] != 1:
            raise self.error(f"{operand} is not a predicate")
        return f"R[{self.index(operand)}]"

    def use(self, operand: str, kind: str) -> str:
        """An operand as an array of numpy type ``kind``: a register, a number, a special register or a symbol."""
        if operand in self.program.index:
            return self._register(self.program.index[operand], kind)
        if m := re.fullmatch(r"0[fF]([0-9a-fA-F]{8})|0[dD]([0-9a-fA-F]{16})", operand):
            width = 4 if m.group(1) else 8
            if BYTES[kind] != width:
                raise self.error(f"a constant of {width} bytes where {BYTES[kind]} are wanted")
            return f"{self.constant(int(m.group(1) or m.group(2), 16), f'u{width}')}.view({kind})"
        if re.fullmatch(r"-?(0x[0-9a-fA-F]+|\d+)U?", operand):
            value = int(operand.rstrip("U"), 0)
            return (
                f"{self.constant(value, 'u' + kind[1])}.view({kind})" if kind[0] == "f" else self.constant(value, kind)
            )
        if operand in _SPECIAL:
            return _SPECIAL[operand] if kind == "u4" else f"{_SPECIAL[operand]}.astype({kind})"
        return self.constant(self.symbol(operand), kind)

    def _register(self, i: int, kind: str) -> str:
        bits = self.program.bits[i]
        have = bits // 8
        want = BYTES[kind]
        if bits == 1:
            raise self.error("a predicate where a number is wanted")
        if have == want:
            return f"R[{i}]" if kind[0] == "u" else f"R[{i}].view({kind})"
        if kind[0] == "f" or have < want or not self.instruction.name.startswith(("st.", "cvt.")):
            raise self.error(f"a register of {have} bytes where {want} are wanted")
        low = f"R[{i}].astype(u{want})"
        return low if kind[0] == "u" else f"{low}.view({kind})"

    def symbol(self, name: str) -> int:
        """The address of a parameter among the parameters, or of shared memory."""
        kernel = self.program.kernel
        if name in kernel.shared:
            return SHARED + kernel.shared[name]
        for p in kernel.params:
            if p.name == name:
                return p.offset
        raise self.error(f"{name} is not known")

    def address(self, operand: str, kind: str = "u8") -> str:
        """``[register+offset]`` as an array of addresses."""
        m = re.fullmatch(r"\[\s*([%$\w.@]+)\s*(?:\+\s*(-?\d+))?\s*\]", operand)
        if not m:
            raise self.error(f"address {operand}")
        base, offset = m.group(1), int(m.group(2) or 0)
        if base not in self.program.index:
            value = int(base) if base.isdigit() else self.symbol(base)
            return self.constant(value + offset, kind)
        own = f"u{self.program.bits[self.program.index[base]] // 8}"
        whole = self.use(base, own)
        if offset:
            whole = f"({whole} + {self.constant(offset, own)})"
        return whole if own == kind else f"{whole}.astype({kind})"

    def vector(self, operand: str) -> list[str]:
        """``{a, b}`` as its parts; a single operand as one part."""
        return split_operands(operand[1:-1]) if operand.startswith("{") else [operand]

    def list_of(self, operand: str, kind: str) -> str:
        """A vector operand as a list of arrays."""
        return "[" + ", ".join(self.use(part, kind) for part in self.vector(operand)) + "]"

    # -- writing ---------------------------------------------------------------------------------------------------
    def _assign(self, register: str, expression: str) -> None:
        """Gives a register a new array of its own storage type, in the lanes that execute the instruction."""
        i = self.index(register)
        self.add(
            f"R[{i}] = {expression}" if self.mask is None else f"R[{i}] = where({self.mask}, {expression}, R[{i}])"
        )

    def put_predicate(self, register: str, expression: str) -> None:
        """Assigns an array of bools."""
        if register == "_":
            return
        if self.program.bits[self.index(register)] != 1:
            raise self.error(f"{register} is not a predicate")
        self._assign(register, expression)

    def put(self, register: str, expression: str, kind: str) -> None:
        """Assigns an array of type ``kind``; a wider register is filled up, by its sign if it is signed."""
        if register == "_":
            return
        have = self.program.bits[self.index(register)] // 8
        if have == 0:
            raise self.error(f"{register} is a predicate")
        want = BYTES[kind]
        if want != have and not (want < have and self.instruction.name.startswith(("ld.", "cvt."))):
            raise self.error(f"{register} has {have} bytes, {want} are written")
        if want < have:
            fill = f"i{have}" if kind[0] == "i" else f"u{have}"
            bits = f"({expression}).view(u{want})" if kind[0] == "f" else f"({expression})"
            expression = f"{bits}.astype({fill}).view(u{have})"
        elif kind[0] != "u":
            expression = f"({expression}).view(u{have})"
        self._assign(register, expression)

    def result(self, expression: str, kind: str) -> None:
        """Assigns to the first operand."""
        self.put(self.operands[0], expression, kind)

    def whole_warp(self) -> None:
        """Demands that all lanes execute the instruction, or none. What is added later runs for all lanes."""
        if self.mask is not None:
            self.add(f"if C.whole(w, {self.at}, {self.mask}):")
            self._indent += "    "
            self.add("pass")
            self.mask = None
