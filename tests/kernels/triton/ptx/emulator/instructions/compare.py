"""Comparison and selection (PTX ISA 9.7.6)."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..code import NUMPY, Code
from ..table import opcode

__all__ = ["floats"]

Array = NDArray[Any]

_BOOL = "[.<bool:and|or|xor>]"
_SIGN = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}
_UNSIGNED = {"lo": "lt", "ls": "le", "hi": "gt", "hs": "ge"}
_FLOAT = "eq|ne|lt|le|gt|ge|equ|neu|ltu|leu|gtu|geu|num|nan"
SETP = "9.7.6.2 setp"


@opcode(f"setp.<rel:eq|ne>{_BOOL}.<type:b16|b32|b64>", "d|p, a, b[, c]", SETP)
@opcode(f"setp.<rel:eq|ne|lt|le|gt|ge>{_BOOL}.<type:s16|s32|s64|u16|u32|u64>", "d|p, a, b[, c]", SETP)
@opcode(f"setp.<rel:lo|ls|hi|hs>{_BOOL}.<type:u16|u32|u64>", "d|p, a, b[, c]", SETP)
def integers(c: Code) -> None:
    kind, rel = NUMPY[c.part["type"]], c.part["rel"]
    x, y = c.use(c.operands[1], kind), c.use(c.operands[2], kind)
    _store(c, f"({x} {_SIGN[_UNSIGNED.get(rel, rel)]} {y})")


@opcode(f"setp.<rel:{_FLOAT}>{_BOOL}[.<ftz:ftz>].<type:f32|f16>", "d|p, a, b[, c]", SETP)
@opcode(f"setp.<rel:{_FLOAT}>{_BOOL}.<type:f64|bf16>", "d|p, a, b[, c]", SETP)
def numbers(c: Code) -> None:
    kind = c.part["type"]
    values = [c.use(o, NUMPY[kind]) for o in c.operands[1:3]]
    if kind == "bf16":
        values = [f"formats.from_bf16({v})" for v in values]
    if "ftz" in c.part:
        if kind == "f16":
            raise c.error(".ftz of f16 is not emulated")
        values = [f"formats.ftz({v})" for v in values]
    _store(c, f"compare.floats({c.part['rel']!r}, {', '.join(values)})")


def floats(rel: str, x: Array, y: Array) -> Array:
    """A comparison: false where one is NaN; those that end in ``u`` are true there."""
    unordered = np.isnan(x) | np.isnan(y)
    if rel in ("num", "nan"):
        return unordered if rel == "nan" else ~unordered
    less, equal = x < y, x == y
    plain = rel[:2]
    found = {
        "eq": equal,
        "ne": ~equal & ~unordered,
        "lt": less,
        "le": less | equal,
        "gt": ~less & ~equal & ~unordered,
        "ge": ~less & ~unordered,
    }[plain]
    return found | unordered if rel.endswith("u") else found


def _store(c: Code, found: str) -> None:
    """The result, combined with a third predicate; the second destination gets the opposite comparison's."""
    targets = [t.strip() for t in c.operands[0].split("|")]
    if ("bool" in c.part) != (len(c.operands) == 4) or len(targets) > 2:
        raise c.error("a third predicate belongs to and, or, xor")
    c.add(f"t_ = {found}")
    for target, value in zip(targets, ("t_", "~t_"), strict=False):
        if "bool" in c.part:
            sign = {"and": "&", "or": "|", "xor": "^"}[c.part["bool"]]
            value = f"({value} {sign} {c.predicate(c.operands[3])})"
        c.add(f"q{targets.index(target)}_ = {value}")
    for i, target in enumerate(targets):
        c.put_predicate(target, f"q{i}_")


@opcode("selp.<type:b16|b32|b64|s16|s32|s64|u16|u32|u64|f32|f64>", "d, a, b, c", "9.7.6.3 selp")
def select(c: Code) -> None:
    kind = "u" + NUMPY[c.part["type"]][1]
    c.result(f"where({c.predicate(c.operands[3])}, {c.use(c.operands[1], kind)}, {c.use(c.operands[2], kind)})", kind)


@opcode("slct.<type:b16|b32|b64|s32|u32|f32>.s32", "d, a, b, c", "9.7.6.4 slct")
def select_by_sign(c: Code) -> None:
    kind = "u" + NUMPY[c.part["type"]][1]
    x, y = c.use(c.operands[1], kind), c.use(c.operands[2], kind)
    c.result(f"where({c.use(c.operands[3], 'i4')} >= 0, {x}, {y})", kind)
