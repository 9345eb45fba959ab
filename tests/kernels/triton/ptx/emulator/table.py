"""The table of opcodes: what is emulated, in which forms, by which section of the PTX ISA.

A form is written like PTX, with what varies in angle brackets: ``mul.<part:lo|hi>.<type:s32|u32>`` takes four opcodes,
``add[.ftz].f32`` two. What no form takes is an error when a program is loaded; nothing is ignored. Section numbers are
those of PTX ISA 8.7.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .text import Instruction, PtxError

if TYPE_CHECKING:
    from .code import Code

__all__ = ["TABLE", "Opcode", "find", "opcode"]

Emitter = Callable[["Code"], None]


@dataclass(frozen=True)
class Opcode:
    """One row of the table.

    Args:
        form: opcode and modifiers.
        operands: their names; those in square brackets at the end may be missing. The destinations are called ``d`` and
            ``p``, a pair ``d|p``.
        section: of the PTX ISA.
        emit: writes the Python code of one instruction.
        waits: whether a warp may have to wait at it.
        jumps: whether it ends a stretch of instructions.
    """

    form: str
    operands: str
    section: str
    emit: Emitter
    waits: bool = False
    jumps: bool = False

    @property
    def pattern(self) -> re.Pattern[str]:
        """Matches the opcodes of this form; what varies is in named groups."""
        out = ""
        for literal, name, choices, begin, end in re.findall(r"([\w.:]+)|<(\w+):([^>]+)>|(\[)|(\])", self.form):
            if literal:
                out += re.escape(literal)
            elif name:
                out += f"(?P<{name}>{'|'.join(map(re.escape, choices.split('|')))})"
            elif begin:
                out += "(?:"
            elif end:
                out += ")?"
        return re.compile(out)

    @property
    def counts(self) -> tuple[int, int]:
        """Fewest and most operands."""
        needed, _, more = self.operands.partition("[,")
        least = len([o for o in needed.split(",") if o.strip()])
        return least, least + len([o for o in more.strip("] ").split(",") if o.strip()])

    @property
    def writes(self) -> bool:
        """Whether the first operand is a destination."""
        return self.operands.startswith(("d", "p"))

    @property
    def names(self) -> list[str]:
        """Every opcode of the form."""
        return _expand(self.form)


def _expand(form: str) -> list[str]:
    if m := re.search(r"\[([^\[\]]*)\]", form):
        return _expand(form[: m.start()] + form[m.end() :]) + _expand(form[: m.start()] + m.group(1) + form[m.end() :])
    if m := re.search(r"<\w+:([^>]+)>", form):
        return [x for choice in m.group(1).split("|") for x in _expand(form[: m.start()] + choice + form[m.end() :])]
    return [form]


TABLE: dict[str, list[Opcode]] = {}


def opcode(
    form: str, operands: str, section: str, *, waits: bool = False, jumps: bool = False
) -> Callable[[Emitter], Emitter]:
    """Declares a form; what it decorates writes its code."""

    def declare(emit: Emitter) -> Emitter:
        row = Opcode(form, operands, section, emit, waits, jumps)
        TABLE.setdefault(re.match(r"\w+", form).group(), []).append(row)  # type: ignore[union-attr]
        return emit

    return declare


_FOUND: dict[str, tuple[Opcode, dict[str, str]]] = {}


def find(instruction: Instruction) -> tuple[Opcode, dict[str, str]]:
    """The row for an instruction, and what stands for each part of its form that varies.

    Raises:
        PtxError: if there is none, or it has another number of operands.
    """
    name = instruction.name
    where = f"line {instruction.line} ({instruction.source}): `{instruction.text}`"
    if name not in _FOUND:
        base = name.split(".")[0]
        if base == "tcgen05":
            raise PtxError(f"{where}: tcgen05 (sm_100, sm_103) is not emulated; compile for sm_80, 86, 89, 90 or 120")
        for row in TABLE.get(base, []):
            if m := row.pattern.fullmatch(name):
                _FOUND[name] = row, {k: v for k, v in m.groupdict().items() if v is not None}
                break
        else:
            known = [row.form for row in TABLE.get(base, [])]
            raise PtxError(f"{where}: not emulated; forms of {base} that are: {', '.join(known) or 'none'}")
    row, parts = _FOUND[name]
    least, most = row.counts
    if not least <= len(instruction.operands) <= most:
        raise PtxError(f"{where}: {len(instruction.operands)} operands, {row.form} has {row.operands}")
    return row, parts
