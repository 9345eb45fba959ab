"""Matrices in the registers of a warp (PTX ISA 9.7.14)."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..code import Code
from ..formats import decode
from ..table import opcode
from ..text import Instruction

if TYPE_CHECKING:
    from ..cta import Cta, Warp

__all__ = [
    "accumulator_places",
    "gather_accumulator",
    "ldmatrix",
    "matrix_places",
    "mma",
    "movmatrix",
    "operand_bytes",
    "operand_places",
    "scatter_accumulator",
    "stmatrix",
]

Array = NDArray[Any]
Mask = NDArray[np.bool_] | None
LANE = np.arange(32)


def accumulator_places(n: int) -> tuple[Array, Array]:
    """Row and column ``[n / 2, 32]`` of each accumulator of a 16 x n product, in each lane."""
    i = np.arange(n // 2)[:, None]
    return (LANE >> 2) + 8 * (i >> 1 & 1), (i >> 2) * 8 + (LANE & 3) * 2 + (i & 1)


def operand_places(registers: int, rows: int) -> Array:
    """Where the bytes of an operand ``[rows, bytes of k]`` lie among the bytes of its registers ``[registers, 32, 4]``.

    16 rows (A): registers go down by 8 rows first, then 16 bytes along k. 8 rows (B): along k.
    """
    down = rows // 8
    places = np.empty((rows, 16 * registers // down), np.int64)
    for j in range(registers):
        for byte in range(4):
            column = 16 * (j // down) + 4 * (LANE & 3) + byte
            places[(LANE >> 2) + 8 * (j % down), column] = j * 128 + LANE * 4 + byte
    return places


@functools.lru_cache(None)
def _cached(function: Any, *arguments: int) -> Any:
    return function(*arguments)


def operand_bytes(registers: list[Array], rows: int) -> Array:
    """The bytes ``[rows, bytes of k]`` of an operand in registers."""
    return np.concatenate(registers).view(np.uint8)[_cached(operand_places, len(registers), rows)]


def gather_accumulator(registers: list[Array], n: int, kind: str) -> Array:
    """The accumulators of a 16 x n product as a matrix, float64 or int64."""
    rows, columns = _cached(accumulator_places, n)
    stack = np.stack(registers)
    if kind == "f16":
        halves = stack.view(np.float16).reshape(len(registers), 32, 2)
        values = halves.transpose(0, 2, 1).reshape(n // 2, 32).astype(np.float64)
    else:
        values = stack.view(np.float32).astype(np.float64) if kind == "f32" else stack.view(np.int32).astype(np.int64)
    out = np.empty((16, n), values.dtype)
    out[rows, columns] = values
    return out


def scatter_accumulator(matrix: Array, kind: str, saturate: bool = False) -> Array:
    """A 16 x n product as registers ``[..., 32]``; int32 wraps around, or saturates."""
    n = matrix.shape[1]
    values = matrix[_cached(accumulator_places, n)]
    if kind == "f32":
        return values.astype(np.float32).view(np.uint32)
    if kind == "s32":
        whole = values.clip(-(1 << 31), (1 << 31) - 1) if saturate else values
        return whole.astype(np.int64).astype(np.uint64).astype(np.uint32)
    halves = values.astype(np.float16).reshape(n // 4, 2, 32).transpose(0, 2, 1)
    return np.ascontiguousarray(halves).view(np.uint32).reshape(n // 4, 32)


_MMA = "9.7.14.5.14 mma"


@opcode("mma.sync.aligned.m16n8<shape:k8|k16>.row.col.<d:f16|f32>.<a:f16>.<b:f16>.<c:f16|f32>", "d, a, b, c", _MMA)
@opcode("mma.sync.aligned.m16n8<shape:k8|k16>.row.col.<d:f32>.<a:bf16>.<b:bf16>.<c:f32>", "d, a, b, c", _MMA)
@opcode("mma.sync.aligned.m16n8<shape:k4|k8>.row.col.<d:f32>.<a:tf32>.<b:tf32>.<c:f32>", "d, a, b, c", _MMA)
@opcode(
    "mma.sync.aligned.m16n8<shape:k16|k32>.row.col[.satfinite].<d:s32>.<a:s8|u8>.<b:s8|u8>.<c:s32>", "d, a, b, c", _MMA
)
@opcode("mma.sync.aligned.m16n8<shape:k32>.row.col.<d:f32>.<a:e4m3|e5m2>.<b:e4m3|e5m2>.<c:f32>", "d, a, b, c", _MMA)
@opcode("mma.sync.aligned.m16n8<shape:k16>.row.col.<d:f32>.<a:e4m3|e5m2>.<b:e4m3|e5m2>.<c:f32>", "d, a, b, c", _MMA)
def product(c: Code) -> None:
    p = c.part
    k, item = int(p["shape"][1:]), {"f16": 2, "bf16": 2, "tf32": 4}.get(p["a"], 1)
    wanted = [4 if p["d"] != "f16" else 2, k * item // 8, k * item // 16, 4 if p["c"] != "f16" else 2]
    if [len(c.vector(o)) for o in c.operands] != wanted:
        raise c.error(f"{wanted} registers wanted")
    c.whole_warp()
    a, b, acc = (c.list_of(o, "u4") for o in c.operands[1:])
    kinds = ", ".join(repr(p[x]) for x in "abcd")
    c.add("C.counts['mma'] += 1")
    c.add(f"t_ = matrix.mma({a}, {b}, {acc}, {kinds}, {'satfinite' in c.instruction.name})")
    for i, register in enumerate(c.vector(c.operands[0])):
        c.put(register, f"t_[{i}]", "u4")


def mma(a: list[Array], b: list[Array], c: list[Array], ka: str, kb: str, kc: str, kd: str, saturate: bool) -> Array:
    """``A @ B + C`` of one warp; sums in float64, which integers up to 2^53 survive, rounded once."""
    left, right = decode(operand_bytes(a, 16), ka), decode(operand_bytes(b, 8), kb)
    total = left @ right.T
    if kd == "s32":
        return scatter_accumulator(total.astype(np.int64) + gather_accumulator(c, 8, "s32"), "s32", saturate)
    return scatter_accumulator(total + gather_accumulator(c, 8, kc), kd)


# -- between shared memory and registers ---------------------------------------------------------------------------

_COUNT = {"x1": 1, "x2": 2, "x4": 4}


def matrix_places(transposed: bool) -> tuple[Array, Array]:
    """Row and column ``[32, 2]`` of the two numbers that a lane has of an 8 x 8 matrix."""
    row, column = np.stack([LANE >> 2] * 2, 1), np.stack([2 * (LANE & 3), 2 * (LANE & 3) + 1], 1)
    return (column, row) if transposed else (row, column)


@opcode(
    "ldmatrix.sync.aligned.m8n8.<count:x1|x2|x4>[.<trans:trans>].<space:shared|shared::cta>.b16",
    "d, [a]",
    "9.7.14.5.15 ldmatrix",
)
def load_matrices(c: Code) -> None:
    targets, n = c.vector(c.operands[0]), _COUNT[c.part["count"]]
    if len(targets) != n:
        raise c.error(f"{n} registers wanted")
    c.whole_warp()
    c.add(f"t_ = matrix.ldmatrix(C, w, {c.at}, {c.address(c.operands[1])}, {n}, {'trans' in c.part})")
    for i, register in enumerate(targets):
        c.put(register, f"t_[{i}]", "u4")


def ldmatrix(C: Cta, w: Warp, at: Instruction, addresses: Array, n: int, transposed: bool) -> list[Array]:
    """``n`` matrices of 8 rows of 16 bytes, whose addresses the first ``8 n`` lanes have."""
    w.at = at
    rows = C.shared.rows(addresses[: 8 * n], 16, w.report)
    data = C.shared.read(rows, 16, C.order.actor(w.index), w.report)
    numbers = np.ascontiguousarray(data).view(np.uint16).reshape(n, 8, 8)
    row, column = matrix_places(transposed)
    return [np.ascontiguousarray(m[row, column]).view(np.uint32).ravel() for m in numbers]


@opcode(
    "stmatrix.sync.aligned.m8n8.<count:x1|x2|x4>[.<trans:trans>].<space:shared|shared::cta>.b16",
    "[a], b",
    "9.7.14.5.16 stmatrix",
)
def store_matrices(c: Code) -> None:
    sources, n = c.vector(c.operands[1]), _COUNT[c.part["count"]]
    if len(sources) != n:
        raise c.error(f"{n} registers wanted")
    c.whole_warp()
    words = c.list_of(c.operands[1], "u4")
    c.add(f"matrix.stmatrix(C, w, {c.at}, {c.address(c.operands[0])}, {words}, {'trans' in c.part})")


def stmatrix(C: Cta, w: Warp, at: Instruction, addresses: Array, registers: list[Array], transposed: bool) -> None:
    """The opposite of :func:`ldmatrix`."""
    from .memory import store_shared

    n = len(registers)
    row, column = matrix_places(transposed)
    numbers = np.zeros((4, 8, 8), np.uint16)
    for i, r in enumerate(registers):
        numbers[i, row, column] = np.ascontiguousarray(r).view(np.uint16).reshape(32, 2)
    data = numbers.reshape(32, 8).view(np.uint8)
    store_shared(C, w, at, addresses, data, None if n == 4 else 8 * n > LANE)


@opcode("movmatrix.sync.aligned.m8n8.trans.b16", "d, a", "9.7.14.5.17 movmatrix")
def transpose(c: Code) -> None:
    c.whole_warp()
    c.add(f"t_ = matrix.movmatrix({c.use(c.operands[1], 'u4')})")
    c.put(c.operands[0], "t_", "u4")


def movmatrix(x: Array) -> Array:
    """An 8 x 8 matrix in registers, transposed."""
    numbers = np.zeros((8, 8), np.uint16)
    numbers[matrix_places(False)] = np.ascontiguousarray(x).view(np.uint16).reshape(32, 2)
    return np.ascontiguousarray(numbers[matrix_places(True)]).view(np.uint32).ravel()
