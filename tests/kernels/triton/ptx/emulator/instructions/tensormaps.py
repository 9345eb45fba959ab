"""Tensormaps that a program makes itself (PTX ISA 9.7.9.27, 9.7.13.16)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..code import NUMPY, Code
from ..memory import GLOBAL
from ..table import opcode
from ..tensormap import FIELDS, SIZE, place
from ..text import Instruction

if TYPE_CHECKING:
    from ..cta import Cta, Warp

__all__ = ["acquire", "publish", "replace"]

Array = NDArray[Any]
Mask = NDArray[np.bool_] | None

_REPLACE = "9.7.9.27 tensormap.replace"


@opcode("tensormap.replace.tile.<field:global_address>.shared::cta.b1024.<type:b64>", "[a], value", _REPLACE)
@opcode("tensormap.replace.tile.<field:rank>.shared::cta.b1024.<type:b32>", "[a], value", _REPLACE)
@opcode(
    "tensormap.replace.tile.<field:box_dim|global_dim|element_stride>.shared::cta.b1024.<type:b32>",
    "[a], entry, value",
    _REPLACE,
)
@opcode("tensormap.replace.tile.<field:global_stride>.shared::cta.b1024.<type:b64>", "[a], entry, value", _REPLACE)
@opcode(
    "tensormap.replace.tile.<field:elemtype|interleave_layout|swizzle_mode|fill_mode>.shared::cta.b1024.<type:b32>",
    "[a], value",
    _REPLACE,
)
def replace_field(c: Code) -> None:
    field = c.part["field"]
    entry = c.number(c.operands[1]) if len(c.operands) == 3 else 0
    if not 0 <= entry < FIELDS[field][2]:
        raise c.error(f"{field} has no entry {entry}")
    if len(c.operands) == 2 and field not in ("global_address", "rank"):
        c.number(c.operands[1])
    value = c.use(c.operands[-1], NUMPY[c.part["type"]])
    c.add(c.call("tensormaps.replace", c.address(c.operands[0]), repr(field), entry, value))


def replace(
    C: Cta, w: Warp, at: Instruction, addresses: Array, field: str, entry: int, values: Array, mask: Mask
) -> None:
    """Writes one entry of a field of tensormaps in shared memory."""
    w.at = at
    offset, size = place(field, entry)
    for lane in range(32) if mask is None else np.nonzero(mask)[0]:
        rows = C.shared.rows(addresses[lane : lane + 1] + addresses.dtype.type(offset), size, w.report)
        raw = np.frombuffer(int(values[lane]).to_bytes(8, "little")[:size], np.uint8)
        C.shared.write(rows, size, raw.reshape(1, size), C.order.actor(w.index), w.report)


@opcode(
    "tensormap.cp_fenceproxy.global.shared::cta.tensormap::generic.release.<scope:cta|gpu|sys>.sync.aligned",
    "[a], [b], size",
    "9.7.13.16 tensormap.cp_fenceproxy",
)
def copy_and_fence(c: Code) -> None:
    if c.number(c.operands[2]) != SIZE:
        raise c.error("a tensormap has 128 bytes")
    c.whole_warp()
    c.add(f"tensormaps.publish(C, w, {c.at}, {c.address(c.operands[0])}, {c.address(c.operands[1])})")


def publish(C: Cta, w: Warp, at: Instruction, to: Array, of: Array) -> None:
    """Copies a tensormap from shared to global memory, for the copy engine to use."""
    w.at = at
    pieces = np.arange(0, SIZE, 16).astype(np.uint64)
    rows = C.shared.rows(of[0] + pieces, 16, w.report)
    data = C.shared.read(rows, 16, C.order.actor(w.index), w.report)
    C.memory.write(to[0].astype(np.uint64) + pieces, data, w.report)
    C.memory.tensormaps[int(to[0])] = (C, w.index, int(C.order.known[w.index][w.index]), False)
    C.order.tick(w.index)


@opcode("fence.proxy.tensormap::generic.acquire.<scope:cta|cluster|gpu|sys>", "[a], size", "9.7.13.4 membar, fence")
def fence(c: Code) -> None:
    if c.number(c.operands[1]) != SIZE:
        raise c.error("a tensormap has 128 bytes")
    c.add(c.call("tensormaps.acquire", c.address(c.operands[0])))


def acquire(C: Cta, w: Warp, at: Instruction, addresses: Array, mask: Mask) -> None:
    """Makes published tensormaps visible to the copy engine."""
    w.at = at
    for address in {int(a) for a in (addresses if mask is None else addresses[mask])}:
        published = C.memory.tensormaps.get(address)
        if published is None:
            if address < GLOBAL:
                w.report("descriptor", f"a tensormap at {address:#x}, which is not in global memory")
            w.report("fence", "acquires a tensormap that was never published")
        else:
            C.memory.tensormaps[address] = (*published[:3], True)
