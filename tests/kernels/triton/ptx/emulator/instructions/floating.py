"""Arithmetic in float32 and float64 (PTX ISA 9.7.3).

Approximate functions are numpy's, which are more exact than the hardware's. NaNs come out as NaNs, of any bits.
"""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..code import NUMPY, Code
from ..table import opcode

__all__ = ["fma", "fma64", "larger", "saturate", "smaller"]

Array = NDArray[Any]
f4, f8, u4, u8 = np.float32, np.float64, np.uint32, np.uint64
_SIGN = {"add": "+", "sub": "-", "mul": "*", "div": "/"}


def _inputs(c: Code, kind: str) -> list[str]:
    """The operands, flushed if the instruction flushes."""
    flush = ".ftz" in c.instruction.name
    return [f"formats.ftz({c.use(o, kind)})" if flush else c.use(o, kind) for o in c.operands[1:]]


def _output(c: Code, expression: str, kind: str) -> None:
    """The result, flushed and saturated if the instruction does."""
    if ".ftz" in c.instruction.name:
        expression = f"formats.ftz({expression})"
    if ".sat" in c.instruction.name:
        expression = f"floating.saturate({expression})"
    c.result(expression, kind)


def saturate(x: Array) -> Array:
    """Between 0 and 1; NaN is 0."""
    return np.where(x > 0, np.minimum(x, x.dtype.type(1)), x.dtype.type(0))


@opcode("add[.rn][.ftz][.sat].<type:f32>", "d, a, b", "9.7.3.3 add")
@opcode("add[.rn].<type:f64>", "d, a, b", "9.7.3.3 add")
@opcode("sub[.rn][.ftz][.sat].<type:f32>", "d, a, b", "9.7.3.4 sub")
@opcode("sub[.rn].<type:f64>", "d, a, b", "9.7.3.4 sub")
@opcode("mul[.rn][.ftz][.sat].<type:f32>", "d, a, b", "9.7.3.5 mul")
@opcode("mul[.rn].<type:f64>", "d, a, b", "9.7.3.5 mul")
@opcode("div.<mode:rn|full|approx>[.ftz].<type:f32>", "d, a, b", "9.7.3.8 div")
@opcode("div.rn.<type:f64>", "d, a, b", "9.7.3.8 div")
def arithmetic(c: Code) -> None:
    kind = NUMPY[c.part["type"]]
    x, y = _inputs(c, kind)
    _output(c, f"({x} {_SIGN[c.instruction.name[:3]]} {y})", kind)


@opcode("add[.rn][.ftz].f32x2", "d, a, b", "9.7.3.3 add")
@opcode("sub[.rn][.ftz].f32x2", "d, a, b", "9.7.3.4 sub")
@opcode("mul[.rn][.ftz].f32x2", "d, a, b", "9.7.3.5 mul")
@opcode("fma.rn[.ftz].f32x2", "d, a, b, c", "9.7.3.6 fma")
def pairs(c: Code) -> None:
    values = [f"{c.use(o, 'u8')}.view(f4)" for o in c.operands[1:]]
    flush = ".ftz" in c.instruction.name
    values = [f"formats.ftz({v})" for v in values] if flush else values
    name = c.instruction.name[:3]
    whole = f"floating.fma({', '.join(values)})" if name == "fma" else f"({values[0]} {_SIGN[name]} {values[1]})"
    c.result(f"{f'formats.ftz({whole})' if flush else whole}.view(u8)", "u8")


@opcode("fma.rn[.ftz][.sat].<type:f32>", "d, a, b, c", "9.7.3.6 fma")
@opcode("fma.rn.<type:f64>", "d, a, b, c", "9.7.3.6 fma")
def multiply_add(c: Code) -> None:
    kind = NUMPY[c.part["type"]]
    _output(c, f"floating.fma{'64' if kind == 'f8' else ''}({', '.join(_inputs(c, kind))})", kind)


def fma(x: Array, y: Array, z: Array) -> Array:
    """``x * y + z`` of float32, rounded once.

    The product is exact in float64. The sum is rounded there and again to float32, which differs from one rounding only
    where it lies exactly between two float32; then it is moved towards the exact sum first.
    """
    product, third = x.astype(f8) * y, z.astype(f8)
    total = product + third
    between = (total.view(u8) & u8(0x1FFFFFFF)) == u8(0x10000000)
    small = np.abs(total) < 2.0**-125
    if not (between | small).any():
        return total.astype(f4)
    # what the sum lost (Knuth's two-sum), and the neighbour with an odd last bit on that side
    part = total - product
    lost = (product - (total - part)) + (third - part)
    even = (total.view(u8) & u8(1)) == 0
    towards = np.where(lost > 0, np.inf, -np.inf)
    odd = np.where((lost != 0) & even & np.isfinite(total), np.nextafter(total, towards), total)
    return odd.astype(f4)


def fma64(x: Array, y: Array, z: Array) -> Array:
    """``x * y + z`` of float64, rounded once."""
    out = x * y + z
    for i in np.nonzero(np.isfinite(out))[0]:
        if np.isfinite(x[i]) and np.isfinite(y[i]) and np.isfinite(z[i]):
            exact = Fraction(float(x[i])) * Fraction(float(y[i])) + Fraction(float(z[i]))
            if exact:
                out[i] = float(exact)
    return out


@opcode("abs[.ftz].<type:f32>", "d, a", "9.7.3.9 abs")
@opcode("abs.<type:f64>", "d, a", "9.7.3.9 abs")
@opcode("neg[.ftz].<type:f32>", "d, a", "9.7.3.10 neg")
@opcode("neg.<type:f64>", "d, a", "9.7.3.10 neg")
def sign(c: Code) -> None:
    kind = NUMPY[c.part["type"]]
    (x,) = _inputs(c, kind)
    c.result(f"np.abs({x})" if c.instruction.name.startswith("abs") else f"(-{x})", kind)


@opcode("copysign.<type:f32|f64>", "d, a, b", "9.7.3.2 copysign")
def copy_sign(c: Code) -> None:
    kind = NUMPY[c.part["type"]]
    c.result(f"np.copysign({c.use(c.operands[2], kind)}, {c.use(c.operands[1], kind)})", kind)


@opcode("min[.ftz][.<nan:NaN>].<type:f32>", "d, a, b[, c]", "9.7.3.11 min")
@opcode("min.<type:f64>", "d, a, b", "9.7.3.11 min")
@opcode("max[.ftz][.<nan:NaN>].<type:f32>", "d, a, b[, c]", "9.7.3.12 max")
@opcode("max.<type:f64>", "d, a, b", "9.7.3.12 max")
def extreme(c: Code) -> None:
    kind = NUMPY[c.part["type"]]
    whole, *more = _inputs(c, kind)
    name = "smaller" if c.instruction.name.startswith("min") else "larger"
    for x in more:  # a third operand exists from sm_100 on
        whole = f"floating.{name}({whole}, {x}, {'nan' in c.part})"
    c.result(whole, kind)


def smaller(x: Array, y: Array, nan: bool) -> Array:
    """The smaller number, -0 below +0. A NaN gives way to a number, or with ``nan`` it wins."""
    out = np.minimum(x, y) if nan else np.fmin(x, y)
    zero = (x == 0) & (y == 0)
    return np.where(zero & np.signbit(x), x, np.where(zero, y, out)) if zero.any() else out


def larger(x: Array, y: Array, nan: bool) -> Array:
    """The larger number, as :func:`smaller` has it."""
    out = np.maximum(x, y) if nan else np.fmax(x, y)
    zero = (x == 0) & (y == 0)
    return np.where(zero & np.signbit(x), y, np.where(zero, x, out)) if zero.any() else out


_FUNCTIONS = {
    "rcp": "(f{n}(1) / {x})",
    "sqrt": "np.sqrt({x})",
    "rsqrt": "(f{n}(1) / np.sqrt({x}))",
    "sin": "np.sin({x})",
    "cos": "np.cos({x})",
    "lg2": "np.log2({x})",
    "ex2": "np.exp2({x})",
    "tanh": "np.tanh({x})",
}


@opcode("rcp.<mode:rn|approx>[.ftz].<type:f32>", "d, a", "9.7.3.13 rcp")
@opcode("rcp.rn.<type:f64>", "d, a", "9.7.3.13 rcp")
@opcode("sqrt.<mode:rn|approx>[.ftz].<type:f32>", "d, a", "9.7.3.15 sqrt")
@opcode("sqrt.rn.<type:f64>", "d, a", "9.7.3.15 sqrt")
@opcode("rsqrt.approx[.ftz].<type:f32>", "d, a", "9.7.3.16 rsqrt")
@opcode("sin.approx[.ftz].<type:f32>", "d, a", "9.7.3.18 sin")
@opcode("cos.approx[.ftz].<type:f32>", "d, a", "9.7.3.19 cos")
@opcode("lg2.approx[.ftz].<type:f32>", "d, a", "9.7.3.20 lg2")
@opcode("ex2.approx[.ftz].<type:f32>", "d, a", "9.7.3.21 ex2")
@opcode("tanh.approx.<type:f32>", "d, a", "9.7.3.22 tanh")
def function(c: Code) -> None:
    kind = NUMPY[c.part["type"]]
    (x,) = _inputs(c, kind)
    _output(c, _FUNCTIONS[c.instruction.name.split(".")[0]].format(x=x, n=kind[1]), kind)
