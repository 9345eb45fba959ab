"""Products of a warpgroup, asynchronous (PTX ISA 9.7.15).

Each warp multiplies its own 16 of the 64 rows when its products are due. What a product reads of shared memory counts
as read by the agent "wgmma of the warp", in the asynchronous proxy.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..code import Code
from ..formats import OPERAND_BYTES, decode
from ..groups import Operation
from ..memory import SHARED
from ..order import Actor
from ..table import opcode
from ..tensormap import swizzled
from ..text import Instruction
from . import matrix

if TYPE_CHECKING:
    from ..cta import Cta, Warp

__all__ = ["Descriptor", "Product", "core_offsets", "finish", "issue", "multiply", "operand_swizzle", "read_operand"]

Array = NDArray[Any]

#: Bytes along k of one product.
K_BYTES = 32
#: What an accumulator in flight looks like.
_IN_FLIGHT = 0x7FC0DEAD
_N = "|".join(str(n) for n in range(8, 257, 8))
_N8 = "|".join(str(n) for n in (8, 16, 24, *range(32, 257, 16)))
_SECTION = "9.7.15.5.2 wgmma.mma_async"
_TAIL = "d, a, b, scale_d, negate_a, negate_b[, transpose_a, transpose_b]"


class Descriptor(NamedTuple):
    """A matrix descriptor (9.7.15.5.1.2.2): where an operand lies in shared memory, in bytes.

    ``swizzle`` is 0 for none and 1, 2, 3 for rows of 32, 64, 128 bytes, as a tensormap counts them.
    """

    start: int
    leading: int
    stride: int
    base: int
    swizzle: int

    @classmethod
    def read(cls, word: int) -> Descriptor:
        """From its 64 bits."""
        return cls(
            (word & 0x3FFF) << 4,
            (word >> 16 & 0x3FFF) << 4,
            (word >> 32 & 0x3FFF) << 4,
            word >> 49 & 7,
            {0: 0, 1: 3, 2: 2, 3: 1}[word >> 62 & 3],
        )


def operand_swizzle(addresses: Array, mode: int) -> Array:
    """Where the bytes of an operand lie; the same pattern as a tensormap's."""
    return swizzled(addresses, mode)


def core_offsets(rows: int, item: int, transposed: bool, d: Descriptor) -> Array:
    """Offset from the start of each 16-byte piece of an operand, before the swizzle.

    K-major ``[rows, 2]``: pieces along k. MN-major (16-bit numbers) ``[rows / 8, 16]``: 8 rows at
    one k (9.7.15.5.1.2).
    """
    span = 16 << d.swizzle
    if not transposed:
        i, piece = np.arange(rows)[:, None], np.arange(K_BYTES // 16)[None, :]
        along = piece * (16 if d.swizzle else d.leading)
        return (i % 8) * span + (i // 8) * d.stride + along
    i, k = np.arange(rows // 8)[:, None], np.arange(K_BYTES // item)[None, :]
    pieces = 1 << d.swizzle
    if not d.swizzle:
        return i * d.stride + (k % 8) * 16 + (k // 8) * d.leading
    return (i % pieces) * 16 + (i // pieces) * d.leading + (k % 8) * span + (k // 8) * d.stride


def read_operand(
    C: Cta, w: Warp, word: int, rows: int, kind: str, transposed: bool, by: Actor, part: slice = slice(None)
) -> Array:
    """The rows ``part`` of an operand in shared memory as numbers ``[rows, k]``."""
    d = Descriptor.read(word)
    item = OPERAND_BYTES[kind]
    if d.base:
        w.report("descriptor", f"matrix base offset {d.base} is not emulated")
    if d.swizzle and not transposed and d.start % (16 << d.swizzle) + K_BYTES > 16 << d.swizzle:
        w.report("descriptor", f"the operand at byte {d.start - SHARED} crosses a swizzled row")
    if transposed and item != 2:
        w.report("descriptor", "only operands of 16-bit numbers can be MN-major")
    offsets = core_offsets(rows, item, transposed, d)
    offsets = offsets[part.start // 8 : part.stop // 8] if transposed and part.start is not None else offsets[part]
    addresses = operand_swizzle(d.start + offsets, d.swizzle)
    pieces = C.shared.rows(addresses.ravel(), 16, w.report)
    data = C.shared.read(pieces, 16, by, w.report).reshape(*addresses.shape, 16)
    if transposed:  # [rows / 8, k, 8 numbers]
        numbers = np.ascontiguousarray(data).view(np.uint16)
        data = np.ascontiguousarray(numbers.transpose(0, 2, 1)).view(np.uint8).reshape(-1, K_BYTES)
    return decode(data.reshape(-1, K_BYTES), kind)


class Product(NamedTuple):
    """A wgmma with the values of its operands when it was issued.

    ``a`` is a descriptor or the registers of A; ``old`` the accumulators that are added to, ``None`` for none; ``new``
    those that it will fill; ``kinds`` the formats of a, b and d.
    """

    n: int
    kinds: tuple[str, str, str]
    a: int | list[Array]
    b: int
    negate: tuple[bool, bool]
    transposed: tuple[bool, bool]
    old: list[Array] | None
    new: Array
    saturate: bool


@opcode(f"wgmma.mma_async.sync.aligned.m64n<n:{_N}>k16.<d:f16|f32>.<a:f16>.<b:f16>", _TAIL, _SECTION)
@opcode(f"wgmma.mma_async.sync.aligned.m64n<n:{_N}>k16.<d:f32>.<a:bf16>.<b:bf16>", _TAIL, _SECTION)
@opcode(f"wgmma.mma_async.sync.aligned.m64n<n:{_N}>k8.<d:f32>.<a:tf32>.<b:tf32>", _TAIL, _SECTION)
@opcode(f"wgmma.mma_async.sync.aligned.m64n<n:{_N}>k32.<d:f16|f32>.<a:e4m3|e5m2>.<b:e4m3|e5m2>", _TAIL, _SECTION)
@opcode(
    f"wgmma.mma_async.sync.aligned.m64n<n:{_N8}>k32[.satfinite].<d:s32>.<a:s8|u8>.<b:s8|u8>",
    "d, a, b, scale_d",
    _SECTION,
)
def product(c: Code) -> None:
    p = c.part
    n = int(p["n"])
    d = c.vector(c.operands[0])
    if len(d) != n // (4 if p["d"] == "f16" else 2):
        raise c.error(f"{len(d)} accumulators")
    in_registers = c.operands[1].startswith("{")
    if in_registers:
        if len(c.vector(c.operands[1])) != 4:
            raise c.error("A has 4 registers")
        a = c.list_of(c.operands[1], "u4")
    else:
        a = f"wgmma.uniform(w, {c.at}, {c.use(c.operands[1], 'u8')})"
    b = f"wgmma.uniform(w, {c.at}, {c.use(c.operands[2], 'u8')})"
    flags = [c.number(o) for o in c.operands[4:]]
    if any(f not in (1, -1) for f in flags[:2]) or any(f not in (0, 1) for f in flags[2:]):
        raise c.error("negations are 1 or -1, transpositions 0 or 1")
    if flags[2:] and len(flags) != (3 if in_registers else 4):
        raise c.error("a transposition for each operand in shared memory is wanted")
    if flags[2:] and p["a"] not in ("f16", "bf16"):
        raise c.error("only operands of 16-bit numbers can be transposed")
    negate = tuple(f == -1 for f in flags[:2]) or (False, False)
    transposed = tuple(map(bool, ([0] if in_registers else []) + flags[2:])) if flags[2:] else (False, False)
    scale = c.operands[3]
    accumulate = str(c.number(scale) != 0) if scale.isdigit() else f"wgmma.uniform(w, {c.at}, {c.predicate(scale)})"
    targets = ", ".join(f"R[{c.index(r)}]" for r in d)
    c.whole_warp()
    c.add(
        f"d_ = np.full(({len(d)}, 32), {_IN_FLIGHT}, u4)",
        f"o_ = [{targets}] if {accumulate} else None",
        f"wgmma.issue(C, w, {c.at}, wgmma.Product({n}, {(p['a'], p['b'], p['d'])}, {a}, {b}, {negate}, {transposed}, "
        f"o_, d_, {'satfinite' in c.instruction.name}))",
        f"{targets}, = d_",
    )


def uniform(w: Warp, at: Instruction, values: Array) -> Any:
    """What all lanes must agree on."""
    if (values != values[0]).any():
        w.at = at
        w.report("lanes", "an operand that must be the same differs between lanes")
    return values[0].item()


def issue(C: Cta, w: Warp, at: Instruction, product: Product) -> None:
    """Puts a product in flight."""
    known, fenced = C.order.issue(w.index)
    w.issued += 1
    C.counts["wgmma"] += 1

    def run(clock: int) -> None:
        w.at = at
        multiply(C, w, product, Actor(C.order.products(w.index), clock, known, fenced))

    w.products.issue(Operation(at, run))


def multiply(C: Cta, w: Warp, p: Product, by: Actor) -> None:
    """Fills the accumulators of a product."""
    ka, kb, kd = p.kinds
    first = 16 * (w.index % 4)
    if isinstance(p.a, list):
        a = decode(matrix.operand_bytes(p.a, 16), ka)
    else:
        a = read_operand(C, w, p.a, 64, ka, p.transposed[0], by, slice(first, first + 16))
    b = read_operand(C, w, p.b, p.n, kb, p.transposed[1], by)
    total = a @ b.T
    if p.negate[0] != p.negate[1]:
        total = -total
    if kd == "s32":
        total = total.astype(np.int64)
    if p.old is not None:
        total = total + matrix.gather_accumulator(p.old, p.n, kd)
    p.new[:] = matrix.scatter_accumulator(total, kd, p.saturate)


@opcode("wgmma.fence.sync.aligned", "", "9.7.15.7.1 wgmma.fence")
def fence(c: Code) -> None:
    c.whole_warp()  # what it orders is kept in flight.py


@opcode("wgmma.commit_group.sync.aligned", "", "9.7.15.7.2 wgmma.commit_group")
def commit(c: Code) -> None:
    c.whole_warp()
    c.add("w.products.commit()")


@opcode("wgmma.wait_group.sync.aligned", "n", "9.7.15.7.3 wgmma.wait_group")
def wait(c: Code) -> None:
    c.whole_warp()
    c.add(f"wgmma.finish(C, w, {c.at}, {c.number(c.operands[0])})")


def finish(C: Cta, w: Warp, at: Instruction, pending: int) -> None:
    """Completes all but the last groups; what they have read may be overwritten then."""
    w.at = at
    w.products.wait(pending)
    agent = C.order.products(w.index)
    C.order.known[w.index][agent] = C.order.fenced[w.index][agent] = w.products.complete
