"""Number formats as bits, and roundings between them.

A value travels as ``float64`` where it must be exact and is rounded once, by :func:`rounded`, to a :class:`Format`.
The format that occurs everywhere, bfloat16 from float32, has a fast way of its own with the same result.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "BF16",
    "E4M3",
    "E5M2",
    "F16",
    "F32",
    "OPERAND_BYTES",
    "TF32",
    "Format",
    "decode",
    "encode",
    "from_bf16",
    "ftz",
    "rounded",
    "to_bf16",
]

Array = NDArray[np.generic]


@dataclass(frozen=True)
class Format:
    """A binary floating-point format.

    Args:
        name: as PTX has it.
        bits: of one value in memory.
        precision: bits of the significand with the leading one.
        exponent: smallest exponent of a normal number.
        largest: largest finite value.
        nan: bits of the NaN that conversions return.
        infinite: whether there are infinities.
    """

    name: str
    bits: int
    precision: int
    exponent: int
    largest: float
    nan: int
    infinite: bool = True


F32 = Format("f32", 32, 24, -126, float(np.finfo(np.float32).max), 0x7FFFFFFF)
F16 = Format("f16", 16, 11, -14, 65504.0, 0x7FFF)
BF16 = Format("bf16", 16, 8, -126, float.fromhex("0x1.fep127"), 0x7FFF)
TF32 = Format("tf32", 32, 11, -126, float.fromhex("0x1.ffcp127"), 0x7FFFFFFF)
E4M3 = Format("e4m3", 8, 4, -6, 448.0, 0x7F, infinite=False)
E5M2 = Format("e5m2", 8, 3, -14, 57344.0, 0x7F)

#: Bytes of one element of a matrix operand.
OPERAND_BYTES = {"bf16": 2, "f16": 2, "tf32": 4, "e4m3": 1, "e5m2": 1, "s8": 1, "u8": 1}


def rounded(x: Array, form: Format, mode: str = "rn", saturate: bool = False) -> Array:
    """``x`` (float64) as values of ``form``, still float64.

    Args:
        mode: "rn" nearest and even on a tie, "rna" nearest and away from zero on a tie, "rz" towards zero, "rm" down,
            "rp" up.
        saturate: what is too large becomes the largest finite value, infinities too; otherwise infinity.
    """
    _, exponent = np.frexp(np.where(np.isfinite(x), x, 1.0))
    unit = np.maximum(exponent - form.precision, form.exponent - form.precision + 1)
    scaled = np.ldexp(x, -unit)
    if mode == "rna":
        whole = np.copysign(np.floor(np.abs(scaled) + 0.5), scaled)
    else:
        whole = {"rn": np.rint, "rz": np.trunc, "rm": np.floor, "rp": np.ceil}[mode](scaled)
    result = np.ldexp(whole, unit)
    large = np.abs(result) > form.largest
    if large.any():
        kept = large & (np.isfinite(x) | saturate)
        limit = form.largest if saturate or not form.infinite or mode == "rz" else np.inf
        result = np.where(kept, np.copysign(limit, x), result)
    return result


def encode(x: Array, form: Format, mode: str = "rn", saturate: bool = False) -> Array:
    """``x`` (float64 or float32) rounded to ``form``, as unsigned integers of its width."""
    wide = x.astype(np.float64)
    value = rounded(wide, form, mode, saturate)
    kind = {8: np.uint8, 16: np.uint16, 32: np.uint32}[form.bits]
    if form is F16:
        bits = value.astype(np.float16).view(np.uint16)
    elif form is BF16:
        bits = (value.astype(np.float32).view(np.uint32) >> np.uint32(16)).astype(np.uint16)
    elif form.bits == 32:
        bits = value.astype(np.float32).view(np.uint32)
    else:
        bits = _small(value, form)
    return np.where(np.isnan(wide), kind(form.nan), bits)


def _small(value: Array, form: Format) -> Array:
    """Bits of values of an 8-bit format."""
    fraction = form.precision - 1
    mantissa, exponent = np.frexp(np.where(np.isfinite(value), np.abs(value), 0.0))
    bias = 1 - form.exponent
    normal = np.abs(value) >= 2.0**form.exponent
    field = np.where(normal, exponent - 1 + bias, 0)
    steps = np.where(
        normal, mantissa * 2 ** (fraction + 1) - 2**fraction, np.abs(value) * 2.0 ** (fraction - form.exponent)
    )
    steps = np.where(np.isfinite(value), steps, 0).astype(np.int64)
    bits = (field.astype(np.int64) << fraction) | steps
    infinity = (1 << (7 - fraction)) - 1 << fraction
    bits = np.where(np.isinf(value), infinity, bits)
    return (bits | np.where(np.signbit(value), 128, 0)).astype(np.uint8)


def to_bf16(x: Array) -> Array:
    """float32 -> bits of bfloat16, nearest even."""
    bits = x.view(np.uint32)
    result = ((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)).astype(np.uint16)
    nan = x != x
    return np.where(nan, np.uint16(BF16.nan), result) if nan.any() else result


def from_bf16(bits: Array) -> Array:
    """Bits of bfloat16 -> float32."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def ftz(x: Array) -> Array:
    """float32 with subnormal numbers as zeros of their sign."""
    return np.where(np.abs(x) < np.float32(2.0**-126), np.copysign(np.float32(0), x), x)


def _table(form: Format) -> Array:
    """The values of all 256 bit patterns of an 8-bit format."""
    fraction = form.precision - 1
    bits = np.arange(256)
    field, steps = bits >> fraction & (1 << (7 - fraction)) - 1, bits & (1 << fraction) - 1
    value = np.where(
        field == 0,
        steps * 2.0 ** (form.exponent - fraction),
        (1 + steps / 2**fraction) * 2.0 ** (field - 1 + form.exponent),
    )
    top = (1 << (7 - fraction)) - 1
    if form.infinite:
        value = np.where(field == top, np.where(steps == 0, np.inf, np.nan), value)
    else:
        value = np.where((bits & 127) == 127, np.nan, value)
    return np.where(bits & 128, -value, value).astype(np.float32)


VALUES = {"e4m3": _table(E4M3), "e5m2": _table(E5M2)}


def decode(raw: Array, kind: str) -> Array:
    """Bytes of matrix elements along the last axis -> their values, float64.

    tf32 operands are read from float32 with the lower 13 bits ignored.
    """
    raw = np.ascontiguousarray(raw)
    if kind == "bf16":
        return from_bf16(raw.view(np.uint16)).astype(np.float64)
    if kind == "f16":
        return raw.view(np.float16).astype(np.float64)
    if kind == "tf32":
        return (raw.view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32).astype(np.float64)
    if kind in VALUES:
        return VALUES[kind][raw].astype(np.float64)
    return raw.view({"s8": np.int8, "u8": np.uint8}[kind]).astype(np.float64)
