"""Asynchronous copies between global and shared memory (PTX ISA 9.7.9.25): cp.async, and tiles by tensormaps."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..code import Code
from ..groups import Operation
from ..memory import GLOBAL, PARAMETERS, SHARED, WINDOW
from ..order import Actor
from ..table import opcode
from ..tensormap import SIZE, SPANS, TensorMap, swizzled
from ..text import Instruction, split_operands
from . import mbarrier

if TYPE_CHECKING:
    from ..cta import Cta, Warp

__all__ = ["copy", "finish_copies", "finish_stores", "load_tile", "read_tile", "store_tile", "tile_rows", "write_tile"]

Array = NDArray[Any]
Mask = NDArray[np.bool_] | None

_HINT = "[.<hint:L2::cache_hint>]"
_PREFETCH = "[.<prefetch:L2::64B|L2::128B|L2::256B>]"


@opcode(
    f"cp.async.<cache:ca>.<space:shared|shared::cta>.global{_HINT}{_PREFETCH}",
    "[a], [b], size[, source_size, policy]",
    "9.7.9.25.3.1 cp.async",
)
@opcode(
    f"cp.async.<cache:cg>.<space:shared|shared::cta>.global{_HINT}{_PREFETCH}",
    "[a], [b], size[, source_size, policy]",
    "9.7.9.25.3.1 cp.async",
)
def copy_async(c: Code) -> None:
    size = c.number(c.operands[2])
    if size not in ((16,) if c.part["cache"] == "cg" else (4, 8, 16)):
        raise c.error(f"copies of {size} bytes")
    optional = list(c.operands[3:])
    if "hint" in c.part:
        if not optional:
            raise c.error("a cache policy belongs to .L2::cache_hint")
        c.use(optional.pop(), "u8")
    if len(optional) > 1:
        raise c.error("a cache policy belongs to .L2::cache_hint")
    given = c.use(optional[0], "u4") if optional else "None"
    c.add(c.call("copies.copy", c.address(c.operands[0]), c.address(c.operands[1]), size, given))


def copy(C: Cta, w: Warp, at: Instruction, to: Array, of: Array, size: int, given: Array | None, mask: Mask) -> None:
    """Each lane copies ``size`` bytes; of them only ``given`` are read, the others are zeros."""
    w.at = at
    chosen = slice(None) if mask is None else mask
    rows = C.shared.rows(to[chosen], size, w.report)
    if not rows.size:
        return
    of = of[chosen].copy()
    count = np.full(len(rows), size) if given is None else given[chosen].astype(np.int64)
    if (count > size).any():
        w.report("bounds", f"reads {int(count.max())} bytes in a copy of {size}")
    known, _ = C.order.issue(w.index)

    def run(clock: int) -> None:
        w.at = at
        data = np.zeros((len(rows), size), np.uint8)
        for n in np.unique(count[count > 0]).tolist():
            some = count == n
            data[some, :n] = C.memory.read(of[some], n, w.report) if size % n == 0 else _odd(C, w, of[some], n)
        C.shared.write(rows, size, data, Actor(C.order.copies(w.index), clock, known), w.report)

    w.copies.issue(Operation(at, run))


def _odd(C: Cta, w: Warp, addresses: Array, n: int) -> Array:
    """``n`` bytes from each address, one by one."""
    each = (addresses[:, None] + np.arange(n, dtype=np.uint64)).ravel()
    return C.memory.read(each, 1, w.report).reshape(-1, n)


@opcode("cp.async.commit_group", "", "9.7.9.25.3.2 cp.async.commit_group")
def commit_copies(c: Code) -> None:
    c.add("w.copies.commit()")


@opcode("cp.async.wait_group", "n", "9.7.9.25.3.3 cp.async.wait_group")
def wait_for_groups(c: Code) -> None:
    c.add(f"copies.finish_copies(C, w, {c.at}, {c.number(c.operands[0])})")


@opcode("cp.async.wait_all", "", "9.7.9.25.3.3 cp.async.wait_all")
def wait_for_all(c: Code) -> None:
    c.add("w.copies.commit()", f"copies.finish_copies(C, w, {c.at}, 0)")


def finish_copies(C: Cta, w: Warp, at: Instruction, pending: int) -> None:
    """Completes all but the last groups of cp.async."""
    w.at = at
    w.copies.wait(pending)
    C.order.known[w.index][C.order.copies(w.index)] = w.copies.complete


# -- tiles ---------------------------------------------------------------------------------------------------------

_RANKS = "<rank:1d|2d|3d|4d|5d>"
_TENSOR = "9.7.9.25.5.2 cp.async.bulk.tensor"


@opcode(
    f"cp.async.bulk.tensor.{_RANKS}.<to:shared::cluster|shared::cta>.global[.tile].mbarrier::complete_tx::bytes{_HINT}",
    "[a], [map], [barrier][, policy]",
    _TENSOR,
)
@opcode(f"cp.async.bulk.tensor.{_RANKS}.global.shared::cta[.tile].bulk_group{_HINT}", "[map], [a][, policy]", _TENSOR)
def tensor(c: Code) -> None:
    load = "to" in c.part
    if (len(c.operands) > (3 if load else 2)) != ("hint" in c.part):
        raise c.error("a cache policy belongs to .L2::cache_hint")
    if "hint" in c.part:
        c.use(c.operands[-1], "u8")
    descriptor = c.operands[1 if load else 0]
    address, corner = split_operands(descriptor[1:-1])
    coordinates = c.vector(corner)
    if len(coordinates) != int(c.part["rank"][0]):
        raise c.error(f"{len(coordinates)} coordinates")
    numbers = "[" + ", ".join(c.use(x, "i4") for x in coordinates) + "]"
    place = c.address(c.operands[0 if load else 1])
    barrier = [c.address(c.operands[2])] if load else []
    c.add(c.call(f"copies.{'load' if load else 'store'}_tile", place, c.use(address, "u8"), numbers, *barrier))


def find_map(C: Cta, w: Warp, address: int, rank: int) -> TensorMap:
    """The tensormap at a generic address, checked: what hardware takes, and in global memory that it is published."""
    if PARAMETERS <= address < PARAMETERS + len(C.parameters):
        raw = C.parameters[address - PARAMETERS : address - PARAMETERS + SIZE]
    elif address >= GLOBAL:
        pieces = address + np.arange(0, SIZE, 16, dtype=np.uint64)
        raw = C.memory.read(pieces.astype(np.uint64), 16, w.report).ravel()
        published = C.memory.tensormaps.get(address)
        if published is None:
            w.report("fence", "uses a tensormap in global memory that no tensormap.cp_fenceproxy published")
        else:
            owner, warp, clock, acquired = published
            if not acquired:
                w.report("fence", "uses a tensormap before a fence.proxy.tensormap acquires it")
            if owner is C and clock > C.order.known[w.index][warp]:
                w.report("race", f"uses the tensormap that warp {warp} publishes, and nothing orders them")
    else:
        w.report("descriptor", f"a tensormap at {address:#x}, which is neither a parameter nor in global memory")
        raise C.faults[-1]
    if address % 64:
        w.report("alignment", "the tensormap is not aligned to 64 bytes")
    found = TensorMap.read(raw.tobytes())
    if problems := found.problems():
        w.report("descriptor", f"the tensormap has {'; '.join(problems)}")
    if len(found.shape) != rank:
        w.report("descriptor", f"{rank} coordinates for a tensormap of rank {len(found.shape)}")
    return found


def tile_rows(w: Warp, t: TensorMap, place: int) -> Array:
    """Where the 16-byte pieces of a tile lie in shared memory, as rows of 16 bytes, in the order of the tensor."""
    if place % 128:
        w.report("alignment", f"the tile at byte {place - SHARED} of shared memory is not aligned to 128")
    if t.swizzle and place % (8 * SPANS[t.swizzle]):
        w.report(
            "alignment", f"the tile at byte {place - SHARED} is not aligned to {8 * SPANS[t.swizzle]}, for its swizzle"
        )
    return swizzled(place + 16 * np.arange(t.size // 16, dtype=np.int64), t.swizzle)


def read_tile(C: Cta, w: Warp, t: TensorMap, corner: list[int]) -> Array:
    """The bytes of a tile of global memory, ``[elements, bytes of one]``."""
    addresses, inside = t.tile(corner)
    data = np.empty((len(addresses), t.item), np.uint8)
    data[~inside] = t.filling() if not inside.all() else 0
    if inside.any():
        data[inside] = C.memory.read(addresses[inside].astype(np.uint64), t.item, w.report)
    return data


def write_tile(C: Cta, w: Warp, t: TensorMap, corner: list[int], data: Array) -> None:
    """Stores a tile; what is outside of the tensor is left out."""
    addresses, inside = t.tile(corner)
    C.memory.write(addresses[inside].astype(np.uint64), data.reshape(-1, t.item)[inside], w.report)


def _each(mask: Mask) -> list[int]:
    return list(range(32)) if mask is None else np.nonzero(mask)[0].tolist()


def load_tile(
    C: Cta, w: Warp, at: Instruction, places: Array, maps: Array, corner: list[Array], bars: Array, mask: Mask
) -> None:
    """Each lane that executes it loads a tile, which completes on an mbarrier."""
    w.at = at
    for lane in _each(mask):
        t = find_map(C, w, int(maps[lane]), len(corner))
        b = mbarrier.find(C, w, int(bars[lane]))
        mbarrier.visible(C, w, b)
        _issue_load(C, w, at, t, _offset(places[lane]), [int(x[lane]) for x in corner], b)


def _offset(address: Any) -> int:
    return int(address) - (WINDOW if address >= WINDOW else 0)


def _issue_load(
    C: Cta, w: Warp, at: Instruction, t: TensorMap, place: int, corner: list[int], b: mbarrier.Mbarrier
) -> None:
    known, fenced = C.order.issue(w.index)
    b.in_flight += 1
    C.counts["tma"] += 1
    phase = b.phase

    def run() -> None:
        before, w.at = w.at, at
        b.in_flight -= 1
        if b.phase != phase:
            w.report("barrier", f"the bytes of a load issued in phase {phase} come in phase {b.phase} of {b}")
        if C.mbarriers.get(b.address) is not b:
            w.report("barrier", f"the bytes of a load come when {b} is gone")
        rows = C.shared.rows(tile_rows(w, t, place), 16, w.report)
        data = read_tile(C, w, t, corner).reshape(-1, 16)
        C.shared.write(rows, 16, data, Actor(b.agent, b.clock + 1, known, fenced), w.report)
        b.land(t.size)
        w.at = before

    if C.asynchronous == "early":
        run()
    else:
        C.transfers.append(run)


def store_tile(C: Cta, w: Warp, at: Instruction, places: Array, maps: Array, corner: list[Array], mask: Mask) -> None:
    """Each lane that executes it stores a tile."""
    w.at = at
    for lane in _each(mask):
        t = find_map(C, w, int(maps[lane]), len(corner))
        _issue_store(C, w, at, t, _offset(places[lane]), [int(x[lane]) for x in corner])


def _issue_store(C: Cta, w: Warp, at: Instruction, t: TensorMap, place: int, corner: list[int]) -> None:
    known, fenced = C.order.issue(w.index)
    C.counts["tma"] += 1

    def run(clock: int) -> None:
        w.at = at
        rows = C.shared.rows(tile_rows(w, t, place), 16, w.report)
        data = C.shared.read(rows, 16, Actor(C.order.stores(w.index), clock, known, fenced), w.report)
        write_tile(C, w, t, corner, data)

    w.stores.issue(Operation(at, run))


@opcode("cp.async.bulk.commit_group", "", "9.7.9.25.5.5 cp.async.bulk.commit_group")
def commit_stores(c: Code) -> None:
    c.add(f"if ({c.mask}).any(): w.stores.commit()" if c.mask else "w.stores.commit()")


@opcode("cp.async.bulk.wait_group[.<read:read>]", "n", "9.7.9.25.5.6 cp.async.bulk.wait_group")
def wait_for_stores(c: Code) -> None:
    call = f"copies.finish_stores(C, w, {c.at}, {c.number(c.operands[0])})"
    c.add(f"if ({c.mask}).any(): {call}" if c.mask else call)


def finish_stores(C: Cta, w: Warp, at: Instruction, pending: int) -> None:
    """Completes all but the last groups of bulk stores; what they have read may be overwritten then."""
    w.at = at
    w.stores.wait(pending)
    C.order.known[w.index][C.order.stores(w.index)] = w.stores.complete
