"""Moves between registers (PTX ISA 9.7.9)."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..code import BYTES, NUMPY, Code
from ..memory import PARAMETERS, WINDOW
from ..table import opcode

__all__ = ["prmt", "selectors"]

Array = NDArray[Any]


@opcode("mov.pred", "d, a", "9.7.9.3 mov")
def predicate(c: Code) -> None:
    value = c.operands[1]
    if re.fullmatch(r"-?\d+", value):
        c.put_predicate(c.operands[0], f"np.full(32, {int(value) != 0})")
    else:
        c.put_predicate(c.operands[0], c.predicate(value))


@opcode("mov.<type:b16|b32|b64|u16|u32|u64|s16|s32|s64|f32|f64>", "d, a", "9.7.9.3 mov")
def move(c: Code) -> None:
    kind = "u" + NUMPY[c.part["type"]][1]
    if any(o.startswith("{") for o in c.operands):
        _packed(c, kind)
    else:
        c.result(c.use(c.operands[1], kind), kind)


def _packed(c: Code, kind: str) -> None:
    """Vectors of parts, the first lowest (9.7.9.4 mov)."""
    target, source = c.operands
    parts = c.vector(target if target.startswith("{") else source)
    if BYTES[kind] % len(parts):
        raise c.error(f"{len(parts)} parts of {BYTES[kind]} bytes")
    part = f"u{BYTES[kind] // len(parts)}"
    if target.startswith("{"):
        c.add(f"t_ = np.ascontiguousarray({c.use(source, kind)}).view({part}).reshape(32, {len(parts)})")
        for i, register in enumerate(parts):
            c.put(register, f"t_[:, {i}].copy()", part)
    else:
        columns = ", ".join(c.use(p, part) for p in parts)
        c.result(f"np.stack([{columns}], axis=1).view({kind}).ravel()", kind)


@opcode("prmt.b32[.<mode:f4e|b4e|rc8|ecl|ecr|rc16>]", "d, a, b, c", "9.7.9.7 prmt")
def permute(c: Code) -> None:
    words = ", ".join(c.use(o, "u4") for o in c.operands[1:])
    c.result(f"moves.prmt({words}, {c.part.get('mode', '')!r})", "u4")


def selectors(control: Array, mode: str) -> tuple[Array, Array]:
    """For each byte of the result ``[4, 32]``: which of the eight bytes, and whether its sign instead of the byte."""
    place = np.arange(4)[:, None]
    if not mode:
        nibble = control.astype(np.int64) >> 4 * place
        return nibble & 7, (nibble & 8) != 0
    k = (control.astype(np.int64) & 3)[None, :]
    which = {
        "f4e": k + place,
        "b4e": (k - place) % 8,
        "rc8": k + 0 * place,
        "ecl": np.maximum(k, place),
        "ecr": np.minimum(k, place),
        "rc16": 2 * (k & 1) + (place & 1),
    }[mode]
    return which, np.zeros_like(which, bool)


def prmt(x: Array, y: Array, control: Array, mode: str) -> Array:
    """Four of the eight bytes of two words."""
    both = np.stack([x, y], axis=1).view(np.uint8)
    which, sign = selectors(control, mode)
    picked = both[np.arange(32)[None, :], which]
    picked = np.where(sign, np.where(picked & 128, 255, 0), picked).astype(np.uint8)
    return np.ascontiguousarray(picked.T).view(np.uint32).ravel()


@opcode("cvta[.<to:to>].<space:global|shared|shared::cta|param|local>.u64", "d, a", "9.7.9.20 cvta")
def generic_address(c: Code) -> None:
    space = c.part["space"].split("::")[0]
    if space == "local":
        raise c.error("local memory is not emulated")
    x = c.use(c.operands[1], "u8")
    if space in ("shared", "param"):
        window = WINDOW if space == "shared" else PARAMETERS
        x = f"({x} {'-' if 'to' in c.part else '+'} u8({window}))"
    c.result(x, "u8")
