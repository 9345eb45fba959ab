"""Conversions between number formats (PTX ISA 9.7.9.21 cvt)."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..code import NUMPY, Code
from ..formats import BF16, E4M3, E5M2, F16, F32, TF32, VALUES, Format, encode, to_bf16
from ..table import opcode

__all__ = ["integers", "narrow", "narrow_pair", "to_integer", "whole", "widen_pair"]

Array = NDArray[Any]

SECTION = "9.7.9.21 cvt"
_INTS = "u8|u16|u32|u64|s8|s16|s32|s64"
_FORMATS: dict[str, Format] = {f.name: f for f in (F32, F16, BF16, TF32, E4M3, E5M2)}
_WHOLE = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}


def _types(c: Code) -> tuple[str, str]:
    return c.part["to"], c.part["of"]


@opcode(f"cvt[.sat].<to:{_INTS}>.<of:{_INTS}>", "d, a", SECTION)
def between_integers(c: Code) -> None:
    to, of = (NUMPY[t] for t in _types(c))
    x = c.use(c.operands[1], of)
    if ".sat" in c.instruction.name:
        c.result(f"convert.integers({x}, {to})", to)
    else:
        c.result(f"{x}.astype({to})", to)


def integers(x: Array, to: type) -> Array:
    """Integers, at the ends of the new range if they are outside of it."""
    low, high = np.iinfo(to).min, np.iinfo(to).max
    return np.array([min(max(int(v), low), high) for v in x], to)


@opcode(f"cvt.<mode:rni|rzi|rmi|rpi>[.ftz][.sat].<to:{_INTS}>.<of:f16|f32|f64>", "d, a", SECTION)
@opcode(f"cvt.<mode:rni|rzi|rmi|rpi>.<to:{_INTS}>.<of:bf16>", "d, a", SECTION)
def float_to_integer(c: Code) -> None:
    to, of = _types(c)
    x = _value(c, c.operands[1], of)
    c.result(f"convert.to_integer({x}, {c.part['mode']!r}, {NUMPY[to]})", NUMPY[to])


def to_integer(x: Array, mode: str, to: type) -> Array:
    """Whole numbers of a float, at the ends of the range if they are outside of it; NaN is 0."""
    number = _WHOLE[mode](x.astype(np.float64))
    limits = np.iinfo(to)
    low, high = float(limits.min), float(limits.max)
    inside = (number >= low) & (number < high)
    out = np.where(inside, number, 0).astype(to)
    return np.where(number < low, limits.min, np.where(number >= high, limits.max, out)).astype(to)


@opcode(f"cvt.<mode:rn|rz|rm|rp>[.sat].<to:f16|bf16>.<of:{_INTS}>", "d, a", SECTION)
@opcode(f"cvt.<mode:rn|rz|rm|rp>[.sat].<to:f32|f64>.<of:{_INTS}>", "d, a", SECTION)
def integer_to_float(c: Code) -> None:
    to, of = _types(c)
    x = c.use(c.operands[1], NUMPY[of])
    if ".sat" in c.instruction.name:
        raise c.error(".sat is not emulated here")
    if to == "f64" or (to == "f32" and c.part["mode"] == "rn"):
        if to == "f64" and of in ("u64", "s64") and c.part["mode"] != "rn":
            raise c.error("only rn is emulated here")
        c.result(f"{x}.astype({NUMPY[to]})", NUMPY[to])
        return
    if of in ("u64", "s64"):
        raise c.error("64-bit integers are emulated to f32 and f64 with rn only")
    c.result(f"convert.narrow({x}, {to!r}, {c.part['mode']!r}, False)", f"u{2 if to != 'f32' else 4}")


def _value(c: Code, operand: str, kind: str) -> str:
    """A float operand as an array of floats."""
    if kind == "bf16":
        return f"formats.from_bf16({c.use(operand, 'u2')})"
    x = c.use(operand, NUMPY[kind])
    return f"formats.ftz({x})" if ".ftz" in c.instruction.name and kind == "f32" else x


@opcode("cvt.<to:f32>.<of:f16|bf16>", "d, a", SECTION)
@opcode("cvt.<to:f64>.<of:f16|bf16|f32>", "d, a", SECTION)
def exact(c: Code) -> None:
    to, of = _types(c)
    c.result(f"{_value(c, c.operands[1], of)}.astype({NUMPY[to]})", NUMPY[to])


@opcode("cvt.<mode:rn|rz|rm|rp>[.ftz].<to:f32>.<of:f64>", "d, a", SECTION)
@opcode("cvt.<mode:rm|rp>.<to:f16>.<of:f32>", "d, a", SECTION)
@opcode("cvt.<mode:rn|rz|rm|rp>.<to:f16>.<of:f64|bf16>", "d, a", SECTION)
@opcode("cvt.<mode:rn|rz>[.relu][.satfinite].<to:f16>.<of:f32>", "d, a", SECTION)
@opcode("cvt.<mode:rn|rz>[.relu][.satfinite].<to:bf16>.<of:f32>", "d, a", SECTION)
@opcode("cvt.<mode:rn|rz|rm|rp>.<to:bf16>.<of:f16|f64>", "d, a", SECTION)
@opcode("cvt.<mode:rna>[.satfinite].<to:tf32>.<of:f32>", "d, a", SECTION)
@opcode("cvt.<mode:rn|rz>[.relu][.satfinite].<to:tf32>.<of:f32>", "d, a", SECTION)
def rounding(c: Code) -> None:
    to, of = _types(c)
    x = _value(c, c.operands[1], of)
    out = f"u{_FORMATS[to].bits // 8}"
    options = f"{'satfinite' in c.instruction.name}, {'relu' in c.instruction.name}"
    whole_ = f"convert.narrow({x}, {to!r}, {c.part['mode']!r}, {options})"
    if ".ftz" in c.instruction.name:
        whole_ = f"formats.ftz({whole_}.view(f4)).view(u4)"
    c.result(whole_, out)


def narrow(x: Array, to: str, mode: str, saturate: bool, relu: bool = False) -> Array:
    """Numbers rounded to a format, as bits."""
    if relu:
        x = np.where(x < 0, x.dtype.type(0), x) + x.dtype.type(0)
    if to == "bf16" and mode == "rn" and not saturate and x.dtype == np.float32:
        return to_bf16(x)
    return encode(x, _FORMATS[to], mode, saturate)


@opcode("cvt.<mode:rn|rz>[.relu][.satfinite].<to:bf16x2|f16x2>.<of:f32>", "d, a, b", SECTION)
@opcode("cvt.<mode:rn>.satfinite[.relu].<to:e4m3x2|e5m2x2>.<of:f32>", "d, a, b", SECTION)
def pack(c: Code) -> None:
    to = c.part["to"].removesuffix("x2")
    options = f"{c.part['mode']!r}, {'satfinite' in c.instruction.name}, {'relu' in c.instruction.name}"
    high, low = (c.use(o, "f4") for o in c.operands[1:])
    c.result(f"convert.narrow_pair({high}, {low}, {to!r}, {options})", NUMPY[c.part["to"]])


def narrow_pair(high: Array, low: Array, to: str, mode: str, saturate: bool, relu: bool) -> Array:
    """Two numbers rounded into one register; the first becomes the upper half."""
    both = narrow(np.concatenate([low, high]), to, mode, saturate, relu)
    bits = 8 * both.dtype.itemsize
    wide = np.dtype(f"u{both.dtype.itemsize * 2}").type
    return (both[32:].astype(wide) << wide(bits)) | both[:32]


@opcode("cvt.rn.satfinite[.relu].<to:e4m3x2|e5m2x2>.f16x2", "d, a", SECTION)
def pack_halves(c: Code) -> None:
    x = c.use(c.operands[1], "u4")
    to = c.part["to"].removesuffix("x2")
    halves = [f"({x} >> u4({s})).astype(u2).view(f2)" for s in (16, 0)]
    c.result(f"convert.narrow_pair({', '.join(halves)}, {to!r}, 'rn', True, {'relu' in c.instruction.name})", "u2")


@opcode("cvt.rn[.relu].f16x2.<of:e4m3x2|e5m2x2>", "d, a", SECTION)
def unpack(c: Code) -> None:
    relu = "relu" in c.instruction.name
    c.result(f"convert.widen_pair({c.use(c.operands[1], 'u2')}, {c.part['of'].removesuffix('x2')!r}, {relu})", "u4")


def widen_pair(x: Array, of: str, relu: bool) -> Array:
    """Two 8-bit numbers as two float16."""
    values = VALUES[of][np.ascontiguousarray(x).view(np.uint8).reshape(32, 2)]
    if relu:
        values = np.where(values < 0, np.float32(0), values)
    return np.ascontiguousarray(values.astype(np.float16)).view(np.uint32).ravel()


@opcode("cvt.<mode:rni|rzi|rmi|rpi>[.ftz][.sat].<to:f32>.f32", "d, a", SECTION)
@opcode("cvt.<mode:rni|rzi|rmi|rpi>.<to:f16>.f16", "d, a", SECTION)
@opcode("cvt.<mode:rni|rzi|rmi|rpi>.<to:f64>.f64", "d, a", SECTION)
def to_whole(c: Code) -> None:
    x = _value(c, c.operands[1], c.part["to"])
    number = f"convert.whole({x}, {c.part['mode']!r})"
    c.result(f"floating.saturate({number})" if ".sat" in c.instruction.name else number, NUMPY[c.part["to"]])


@opcode("cvt[.ftz][.sat].f32.f32", "d, a", SECTION)
def same(c: Code) -> None:
    x = _value(c, c.operands[1], "f32")
    c.result(f"floating.saturate({x})" if ".sat" in c.instruction.name else x, "f4")


def whole(x: Array, mode: str) -> Array:
    """Whole numbers of the same format."""
    return _WHOLE[mode](x)
