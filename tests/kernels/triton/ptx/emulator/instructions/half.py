"""Arithmetic in float16 and bfloat16, one or two numbers in a register (PTX ISA 9.7.4).

Sums, products and multiply-adds of these formats are exact in float64 where it matters, and are rounded once.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..code import NUMPY, Code
from ..formats import BF16, F16, encode, from_bf16
from ..table import opcode
from .floating import larger, saturate, smaller

__all__ = ["evaluate"]

Array = NDArray[Any]

_F16 = "<type:f16|f16x2>"
_BF16 = "<type:bf16|bf16x2>"


@opcode(f"add[.rn][.ftz][.sat].{_F16}", "d, a, b", "9.7.4.1 add")
@opcode(f"add[.rn].{_BF16}", "d, a, b", "9.7.4.1 add")
@opcode(f"sub[.rn][.ftz][.sat].{_F16}", "d, a, b", "9.7.4.2 sub")
@opcode(f"sub[.rn].{_BF16}", "d, a, b", "9.7.4.2 sub")
@opcode(f"mul[.rn][.ftz][.sat].{_F16}", "d, a, b", "9.7.4.3 mul")
@opcode(f"mul[.rn].{_BF16}", "d, a, b", "9.7.4.3 mul")
@opcode(f"fma.rn[.ftz][.sat].{_F16}", "d, a, b, c", "9.7.4.4 fma")
@opcode(f"fma.rn[.ftz].relu.{_F16}", "d, a, b, c", "9.7.4.4 fma")
@opcode(f"fma.rn[.relu].{_BF16}", "d, a, b, c", "9.7.4.4 fma")
@opcode(f"min[.ftz][.NaN].{_F16}", "d, a, b", "9.7.4.7 min")
@opcode(f"min[.NaN].{_BF16}", "d, a, b", "9.7.4.7 min")
@opcode(f"max[.ftz][.NaN].{_F16}", "d, a, b", "9.7.4.8 max")
@opcode(f"max[.NaN].{_BF16}", "d, a, b", "9.7.4.8 max")
@opcode(f"tanh.approx.{_F16}", "d, a", "9.7.4.9 tanh")
@opcode(f"tanh.approx.{_BF16}", "d, a", "9.7.4.9 tanh")
@opcode(f"ex2.approx.{_F16}", "d, a", "9.7.4.10 ex2")
@opcode(f"ex2.approx.ftz.{_BF16}", "d, a", "9.7.4.10 ex2")
def arithmetic(c: Code) -> None:
    kind = NUMPY[c.part["type"]].replace("f2", "u2")
    values = ", ".join(c.use(o, kind) for o in c.operands[1:])
    c.result(f"half.evaluate({c.instruction.name!r}, {values})", kind)


@opcode(f"neg[.ftz].{_F16}", "d, a", "9.7.4.5 neg")
@opcode(f"neg.{_BF16}", "d, a", "9.7.4.5 neg")
@opcode(f"abs[.ftz].{_F16}", "d, a", "9.7.4.6 abs")
@opcode(f"abs.{_BF16}", "d, a", "9.7.4.6 abs")
def sign(c: Code) -> None:
    if ".ftz" in c.instruction.name:
        raise c.error(".ftz is not emulated here")
    kind = NUMPY[c.part["type"]].replace("f2", "u2")
    bits = {"u2": 0x8000, "u4": 0x80008000}[kind]
    x = c.use(c.operands[1], kind)
    flip = c.instruction.name.startswith("neg")
    c.result(f"({x} ^ {kind}({bits}))" if flip else f"({x} & {kind}({bits - 1 if kind == 'u2' else 0x7FFF7FFF}))", kind)


_FUNCTIONS = {
    "add": lambda x, y: x + y,
    "sub": lambda x, y: x - y,
    "mul": lambda x, y: x * y,
    "fma": lambda x, y, z: _sum_to_odd(x * y, z),
    "ex2": np.exp2,
    "tanh": np.tanh,
}


def _sum_to_odd(x: Array, y: Array) -> Array:
    """``x + y`` in float64; where it is not exact, the neighbour with an odd last bit, so that a rounding after it is
    as if it were exact."""
    total = x + y
    part = total - x
    lost = (x - (total - part)) + (y - part)
    change = (lost != 0) & ((total.view(np.uint64) & np.uint64(1)) == 0) & np.isfinite(total)
    return np.where(change, np.nextafter(total, np.where(lost > 0, np.inf, -np.inf)), total)


def evaluate(name: str, *operands: Array) -> Array:
    """An instruction on registers of 16 or 32 bits."""
    parts = name.split(".")
    form = BF16 if "bf16" in parts[-1] else F16

    def flushed(x: Array) -> Array:
        return np.where(np.abs(x) < 2.0**form.exponent, np.copysign(0.0, x), x) if "ftz" in parts else x

    values = []
    for register in operands:
        bits = register.view(np.uint16)
        values.append(flushed((from_bf16(bits) if form is BF16 else bits.view(np.float16)).astype(np.float64)))
    if parts[0] in ("min", "max"):
        result = (smaller if parts[0] == "min" else larger)(*values, "NaN" in parts)
    else:
        result = _FUNCTIONS[parts[0]](*values)
    if "sat" in parts:
        result = saturate(result)
    if "relu" in parts:
        result = np.where(result > 0, result, np.where(np.isnan(result), result, 0.0))
    bits = encode(result, form)
    if "ftz" in parts:
        bits = encode(flushed((from_bf16(bits) if form is BF16 else bits.view(np.float16)).astype(np.float64)), form)
    return bits.view(operands[0].dtype)
