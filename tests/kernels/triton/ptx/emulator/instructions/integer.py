"""Integer arithmetic, bits and shifts (PTX ISA 9.7.1 and 9.7.8)."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..code import BYTES, NUMPY, Code
from ..table import opcode

__all__ = ["bfe", "bfi", "bfind", "brev", "clz", "divide", "high", "lop3", "popc", "remainder", "shf", "shl", "shr"]

Array = NDArray[Any]
u4, u8 = np.uint32, np.uint64

_INTS = "u16|u32|u64|s16|s32|s64"
_BITS = "b16|b32|b64"
_WIDER = {"u2": "u4", "i2": "i4", "u4": "u8", "i4": "i8"}


@opcode(f"add.<type:{_INTS}>", "d, a, b", "9.7.1.1 add")
@opcode(f"sub.<type:{_INTS}>", "d, a, b", "9.7.1.2 sub")
@opcode(f"min.<type:{_INTS}>", "d, a, b", "9.7.1.12 min")
@opcode(f"max.<type:{_INTS}>", "d, a, b", "9.7.1.13 max")
def two_numbers(c: Code) -> None:
    kind = NUMPY[c.part["type"]]
    x, y = c.use(c.operands[1], kind), c.use(c.operands[2], kind)
    name = c.instruction.name[:3]
    sign = {"add": "+", "sub": "-"}.get(name)
    c.result(f"({x} {sign} {y})" if sign else f"np.{name}imum({x}, {y})", kind)


@opcode("add.sat.s32", "d, a, b", "9.7.1.1 add")
@opcode("sub.sat.s32", "d, a, b", "9.7.1.2 sub")
def saturating(c: Code) -> None:
    x, y = (c.use(o, "i4") for o in c.operands[1:])
    sign = "+" if c.instruction.name.startswith("add") else "-"
    c.result(f"({x}.astype(i8) {sign} {y}).clip(-(1 << 31), (1 << 31) - 1).astype(i4)", "i4")


@opcode(f"mul.<part:lo|hi>.<type:{_INTS}>", "d, a, b", "9.7.1.3 mul")
@opcode("mul.<part:wide>.<type:u16|u32|s16|s32>", "d, a, b", "9.7.1.3 mul")
@opcode(f"mad.<part:lo|hi>.<type:{_INTS}>", "d, a, b, c", "9.7.1.4 mad")
@opcode("mad.<part:wide>.<type:u16|u32|s16|s32>", "d, a, b, c", "9.7.1.4 mad")
def multiply(c: Code) -> None:
    kind, part = NUMPY[c.part["type"]], c.part["part"]
    x, y = c.use(c.operands[1], kind), c.use(c.operands[2], kind)
    if part == "wide":
        out = _WIDER[kind]
        product = f"({x}.astype({out}) * {y}.astype({out}))"
    else:
        out = kind
        product = f"({x} * {y})" if part == "lo" else f"integer.high({x}, {y})"
    c.result(f"({product} + {c.use(c.operands[3], out)})" if len(c.operands) > 3 else product, out)


def high(x: Array, y: Array) -> Array:
    """The upper half of the product."""
    bits = 8 * x.dtype.itemsize
    if bits == 64:
        return np.array([int(p) * int(q) >> 64 & (1 << 64) - 1 for p, q in zip(x, y, strict=True)], u8).view(x.dtype)
    wide = np.int64 if x.dtype.kind == "i" else u8
    return (x.astype(wide) * y.astype(wide) >> wide(bits)).astype(x.dtype)


@opcode(f"div.<type:{_INTS}>", "d, a, b", "9.7.1.8 div")
@opcode(f"rem.<type:{_INTS}>", "d, a, b", "9.7.1.9 rem")
def division(c: Code) -> None:
    kind = NUMPY[c.part["type"]]
    name = "divide" if c.instruction.name.startswith("div") else "remainder"
    c.result(f"integer.{name}({c.use(c.operands[1], kind)}, {c.use(c.operands[2], kind)})", kind)


def divide(x: Array, y: Array) -> Array:
    """The quotient, towards zero; by zero all ones, for which PTX has no rule."""
    unsigned = f"u{x.dtype.itemsize}"
    p, q = (np.where(v < 0, 0 - v.view(unsigned), v.view(unsigned)) for v in (x, y))
    whole = p // np.where(q == 0, 1, q).astype(unsigned)
    if x.dtype.kind == "i":
        whole = np.where((x < 0) != (y < 0), 0 - whole, whole)
    return np.where(y == 0, ~np.zeros_like(whole), whole).view(x.dtype)


def remainder(x: Array, y: Array) -> Array:
    """What the quotient leaves, with the sign of ``x``."""
    return (x - divide(x, y) * y).astype(x.dtype)


@opcode("abs.<type:s16|s32|s64>", "d, a", "9.7.1.10 abs")
@opcode("neg.<type:s16|s32|s64>", "d, a", "9.7.1.11 neg")
def sign(c: Code) -> None:
    kind = NUMPY[c.part["type"]]
    x = c.use(c.operands[1], kind)
    c.result(f"np.abs({x})" if c.instruction.name.startswith("abs") else f"(-{x})", kind)


@opcode("popc.<type:b32|b64>", "d, a", "9.7.1.14 popc")
@opcode("clz.<type:b32|b64>", "d, a", "9.7.1.15 clz")
@opcode("bfind[.shiftamt].<type:u32|u64|s32|s64>", "d, a", "9.7.1.16 bfind")
def count(c: Code) -> None:
    name = c.instruction.name.split(".")[0]
    more = f", {'shiftamt' in c.instruction.name}" if name == "bfind" else ""
    c.result(f"integer.{name}({c.use(c.operands[1], NUMPY[c.part['type']])}{more})", "u4")


def popc(x: Array) -> Array:
    """How many bits are one."""
    return np.bitwise_count(x).astype(u4)


def clz(x: Array) -> Array:
    """How many zeros lead."""
    return np.array([8 * x.dtype.itemsize - int(v).bit_length() for v in x], u4)


def bfind(x: Array, amount: bool) -> Array:
    """The highest bit that differs from the sign, or by how much to shift left to bring it on top; -1 if none does."""
    bits = 8 * x.dtype.itemsize
    at = np.array([(~int(v) if int(v) < 0 else int(v)).bit_length() - 1 for v in x], np.int64)
    return np.where(at < 0, -1, bits - 1 - at if amount else at).astype(np.int32).view(u4)


@opcode("brev.<type:b32|b64>", "d, a", "9.7.1.18 brev")
def reverse(c: Code) -> None:
    kind = NUMPY[c.part["type"]]
    c.result(f"integer.brev({c.use(c.operands[1], kind)})", kind)


def brev(x: Array) -> Array:
    """The bits in reverse order."""
    bits = 8 * x.dtype.itemsize
    return np.array([int(f"{int(v):0{bits}b}"[::-1], 2) for v in x], x.dtype)


@opcode("bfe.<type:u32|u64|s32|s64>", "d, a, b, c", "9.7.1.19 bfe")
def extract(c: Code) -> None:
    kind = NUMPY[c.part["type"]]
    x = c.use(c.operands[1], kind)
    if c.operands[2].isdigit() and c.operands[3].isdigit():  # the usual case is two shifts
        first, length, bits = int(c.operands[2]), int(c.operands[3]), 8 * BYTES[kind]
        if length > 0 and first + length <= bits:
            c.result(f"(({x} << {kind}({bits - first - length})) >> {kind}({bits - length}))", kind)
            return
    c.result(f"integer.bfe({x}, {c.use(c.operands[2], 'u4')}, {c.use(c.operands[3], 'u4')})", kind)


def bfe(x: Array, first: Array, length: Array) -> Array:
    """A field of bits; beyond it, and beyond the number, its highest bit if signed."""
    bits = 8 * x.dtype.itemsize
    out = []
    for v, p, n in zip(x.view(f"u{x.dtype.itemsize}").tolist(), first.tolist(), length.tolist(), strict=True):
        p, n = p & 255, n & 255
        field = v >> p & (1 << n) - 1
        top = min(p + n - 1, bits - 1)
        have = max(0, min(n, bits - p))
        if x.dtype.kind == "i" and n and v >> top & 1:
            field |= -1 << have
        out.append(field & (1 << bits) - 1)
    return np.array(out, f"u{x.dtype.itemsize}").view(x.dtype)


@opcode("bfi.<type:b32|b64>", "d, a, b, c, e", "9.7.1.20 bfi")
def insert(c: Code) -> None:
    kind = NUMPY[c.part["type"]]
    numbers = f"{c.use(c.operands[3], 'u4')}, {c.use(c.operands[4], 'u4')}"
    c.result(f"integer.bfi({c.use(c.operands[1], kind)}, {c.use(c.operands[2], kind)}, {numbers})", kind)


def bfi(x: Array, into: Array, first: Array, length: Array) -> Array:
    """``into`` with a field of bits from ``x``."""
    limit = (1 << 8 * x.dtype.itemsize) - 1
    out = []
    for v, w, p, n in zip(x.tolist(), into.tolist(), first.tolist(), length.tolist(), strict=True):
        field = ((1 << (n & 255)) - 1) << (p & 255) & limit
        out.append(w & ~field | v << (p & 255) & field)
    return np.array(out, x.dtype)


# -- logic and shifts ----------------------------------------------------------------------------------------------


@opcode(f"and.<type:{_BITS}|pred>", "d, a, b", "9.7.8.1 and")
@opcode(f"or.<type:{_BITS}|pred>", "d, a, b", "9.7.8.2 or")
@opcode(f"xor.<type:{_BITS}|pred>", "d, a, b", "9.7.8.3 xor")
def logic(c: Code) -> None:
    sign = {"a": "&", "o": "|", "x": "^"}[c.instruction.name[0]]
    if c.part["type"] == "pred":
        c.put_predicate(c.operands[0], f"({c.predicate(c.operands[1])} {sign} {c.predicate(c.operands[2])})")
        return
    kind = NUMPY[c.part["type"]]
    c.result(f"({c.use(c.operands[1], kind)} {sign} {c.use(c.operands[2], kind)})", kind)


@opcode(f"not.<type:{_BITS}|pred>", "d, a", "9.7.8.4 not")
def invert(c: Code) -> None:
    if c.part["type"] == "pred":
        c.put_predicate(c.operands[0], f"(~{c.predicate(c.operands[1])})")
        return
    kind = NUMPY[c.part["type"]]
    c.result(f"(~{c.use(c.operands[1], kind)})", kind)


@opcode("lop3.b32", "d, a, b, c, table", "9.7.8.6 lop3")
def any_logic(c: Code) -> None:
    table = c.number(c.operands[4])
    if not 0 <= table < 256:
        raise c.error("the table must be 0 to 255")
    c.result(f"integer.lop3({', '.join(c.use(o, 'u4') for o in c.operands[1:4])}, {table})", "u4")


def lop3(x: Array, y: Array, z: Array, table: int) -> Array:
    """The function of three bits whose value for (x, y, z) is bit ``4x + 2y + z`` of the table."""
    out = np.zeros(32, u4)
    for i in range(8):
        if table >> i & 1:
            out |= (x if i & 4 else ~x) & (y if i & 2 else ~y) & (z if i & 1 else ~z)
    return out


@opcode("shf.<side:l|r>.<mode:clamp|wrap>.b32", "d, a, b, c", "9.7.8.7 shf")
def funnel(c: Code) -> None:
    words = ", ".join(c.use(o, "u4") for o in c.operands[1:])
    c.result(f"integer.shf({words}, {c.part['side']!r}, {c.part['mode']!r})", "u4")


def shf(low: Array, high_: Array, by: Array, side: str, mode: str) -> Array:
    """Shifts the 64 bits of two words: left, and its upper word; or right, and its lower word."""
    n = (by & u4(31) if mode == "wrap" else np.minimum(by, u4(32))).astype(u8)
    both = (high_.astype(u8) << u8(32)) | low
    return ((both << n) >> u8(32) if side == "l" else both >> n).astype(u4)


@opcode(f"shl.<type:{_BITS}>", "d, a, b", "9.7.8.8 shl")
@opcode(f"shr.<type:{_BITS}|{_INTS}>", "d, a, b", "9.7.8.9 shr")
def shift(c: Code) -> None:
    kind, name = NUMPY[c.part["type"]], c.instruction.name[:3]
    x, by = c.use(c.operands[1], kind), c.operands[2]
    if by.isdigit() and int(by) < 8 * BYTES[kind]:
        c.result(f"({x} {'<<' if name == 'shl' else '>>'} {kind}({by}))", kind)
    else:
        c.result(f"integer.{name}({x}, {c.use(by, 'u4')})", kind)


def shl(x: Array, by: Array) -> Array:
    """Left; by the width or more gives 0."""
    bits = 8 * x.dtype.itemsize
    return np.where(by >= bits, x.dtype.type(0), x << np.minimum(by, bits - 1).astype(x.dtype))


def shr(x: Array, by: Array) -> Array:
    """Right; by the width or more gives 0, or the sign of what is signed."""
    bits = 8 * x.dtype.itemsize
    kept = x >> np.minimum(by, bits - 1).astype(x.dtype)
    return kept if x.dtype.kind == "i" else np.where(by >= bits, x.dtype.type(0), kept)
