"""Loads, stores and atomics (PTX ISA 9.7.9.8 ld, 9.7.9.11 st, 9.7.13.5 atom, 9.7.13.6 red).

CTAs run one after another, so the ordering words of an access (``.acquire``, ``.gpu``) change nothing; neither do cache
words. They are declared all the same.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..code import BYTES, NUMPY, Code
from ..memory import GLOBAL, PARAMETERS
from ..table import opcode
from ..text import Instruction

if TYPE_CHECKING:
    from ..cta import Cta, Warp

__all__ = [
    "atomic",
    "generic_kind",
    "load_global",
    "load_parameters",
    "load_shared",
    "load_where",
    "store_global",
    "store_shared",
]

Array = NDArray[Any]
Mask = NDArray[np.bool_] | None

_TYPES = "b8|b16|b32|b64|u8|u16|u32|u64|s8|s16|s32|s64|f32|f64"
_SHARED = "shared|shared::cta"
_EVICT = "[.<evict:L1::evict_last|L1::evict_first|L1::evict_normal|L1::evict_unchanged|L1::no_allocate>]"
_HINT = "[.<hint:L2::cache_hint>]"
_ORDER = "[.<order:weak|volatile>]"
_VECTOR = "[.<vector:v2|v4>]"
_CACHE = "[.<cache:ca|cg|cs|lu|cv>]"


@opcode(f"ld.<space:param>{_VECTOR}.<type:{_TYPES}>", "d, [a]", "9.7.9.8 ld")
@opcode(f"ld{_ORDER}.<space:{_SHARED}>{_VECTOR}.<type:{_TYPES}>", "d, [a]", "9.7.9.8 ld")
@opcode(f"ld{_ORDER}.<space:global>{_CACHE}{_EVICT}{_HINT}{_VECTOR}.<type:{_TYPES}>", "d, [a][, policy]", "9.7.9.8 ld")
@opcode(
    f"ld.<space:global>{_CACHE}.nc{_EVICT}{_HINT}{_VECTOR}.<type:{_TYPES}>", "d, [a][, policy]", "9.7.9.9 ld.global.nc"
)
@opcode(
    f"ld.<order:relaxed|acquire>.<scope:cta|gpu|sys>.<space:global>{_EVICT}{_HINT}{_VECTOR}.<type:{_TYPES}>",
    "d, [a][, policy]",
    "9.7.9.8 ld",
)
@opcode(f"ld{_VECTOR}.<type:{_TYPES}>", "d, [a]", "9.7.9.8 ld")
def load(c: Code) -> None:
    _policy(c, 2)
    kind = NUMPY[c.part["type"]]
    targets = c.vector(c.operands[0])
    _count(c, targets)
    size = BYTES[kind] * len(targets)
    space = {"param": "parameters", "": "where"}.get(c.part.get("space", ""), c.part.get("space", "").split("::")[0])
    c.add(f"t_ = {c.call(f'memory.load_{space}', c.address(c.operands[1]), size)}.view({kind})")
    for i, register in enumerate(targets):
        c.put(register, f"t_[:, {i}].copy()", kind)


@opcode(f"st{_ORDER}.<space:{_SHARED}>{_VECTOR}.<type:{_TYPES}>", "[a], b", "9.7.9.11 st")
@opcode(f"st{_ORDER}.<space:global>{_CACHE}{_EVICT}{_HINT}{_VECTOR}.<type:{_TYPES}>", "[a], b[, policy]", "9.7.9.11 st")
@opcode(
    f"st.<order:relaxed|release>.<scope:cta|gpu|sys>.<space:global>{_EVICT}{_HINT}{_VECTOR}.<type:{_TYPES}>",
    "[a], b[, policy]",
    "9.7.9.11 st",
)
def store(c: Code) -> None:
    _policy(c, 2)
    kind = "u" + NUMPY[c.part["type"]][1]
    sources = c.vector(c.operands[1])
    _count(c, sources)
    data = ", ".join(c.use(s, kind) for s in sources)
    space = c.part["space"].split("::")[0]
    c.add(c.call(f"memory.store_{space}", c.address(c.operands[0]), f"np.stack([{data}], axis=1).view(u1)"))


def _count(c: Code, parts: list[str]) -> None:
    wanted = {"v2": 2, "v4": 4}.get(c.part.get("vector", ""), 1)
    if len(parts) != wanted:
        raise c.error(f"{len(parts)} registers, {wanted} wanted")


def _policy(c: Code, plain: int) -> None:
    """A cache policy is an operand exactly where the opcode says so; it changes nothing."""
    if (len(c.operands) > plain) != ("hint" in c.part):
        raise c.error("a cache policy belongs to .L2::cache_hint")
    if len(c.operands) > plain:
        c.use(c.operands[plain], "u8")


def _spread(values: Array, mask: Mask, n: int) -> Array:
    """What the lanes that execute have loaded, with zeros for the others."""
    if mask is None:
        return values
    full = np.zeros((32, n), np.uint8)
    full[mask] = values
    return full


def load_shared(C: Cta, w: Warp, at: Instruction, addresses: Array, n: int, mask: Mask) -> Array:
    """``[32, n]`` bytes of shared memory."""
    w.at = at
    rows = C.shared.rows(addresses if mask is None else addresses[mask], n, w.report)
    return _spread(C.shared.read(rows, n, C.order.actor(w.index), w.report), mask, n)


def load_global(C: Cta, w: Warp, at: Instruction, addresses: Array, n: int, mask: Mask) -> Array:
    """``[32, n]`` bytes of global memory."""
    w.at = at
    return _spread(C.memory.read(addresses if mask is None else addresses[mask], n, w.report), mask, n)


def load_parameters(C: Cta, w: Warp, at: Instruction, addresses: Array, n: int, mask: Mask) -> Array:
    """``[32, n]`` bytes of the kernel's parameters."""
    w.at = at
    place = (addresses if mask is None else addresses[mask]).astype(np.int64)
    place = np.where(place >= PARAMETERS, place - PARAMETERS, place)  # generic, or among the parameters
    if place.size and (place.min() < 0 or place.max() + n > len(C.parameters)):
        w.report("bounds", f"byte {int(place.max())} of the parameters, of which there are {len(C.parameters)}")
    return _spread(C.parameters[place[:, None] + np.arange(n)], mask, n)


def generic_kind(addresses: Array) -> Array:
    """Where generic addresses lead: 0 shared memory, 1 parameters, 2 global memory."""
    return (addresses >= np.uint64(PARAMETERS)).astype(np.int64) + (addresses >= np.uint64(GLOBAL))


def load_where(C: Cta, w: Warp, at: Instruction, addresses: Array, n: int, mask: Mask) -> Array:
    """``[32, n]`` bytes from generic addresses."""
    kinds = generic_kind(addresses)
    out = np.zeros((32, n), np.uint8)
    for kind, function in enumerate((load_shared, load_parameters, load_global)):
        chosen = (kinds == kind) if mask is None else (kinds == kind) & mask
        if chosen.any():
            out[chosen] = function(C, w, at, addresses, n, chosen)[chosen]
    return out


def store_shared(C: Cta, w: Warp, at: Instruction, addresses: Array, data: Array, mask: Mask) -> None:
    """Stores ``[32, n]`` bytes into shared memory."""
    w.at = at
    if mask is not None:
        addresses, data = addresses[mask], data[mask]
    n = data.shape[1]
    rows = C.shared.rows(addresses, n, w.report)
    if not rows.size:
        return
    order = np.argsort(rows, kind="stable")
    twice = rows[order][1:] == rows[order][:-1]
    if twice.any() and (data[order][1:] != data[order][:-1])[twice].any():
        w.report("race", "lanes store different values to one place in shared memory")
    if C.mbarriers:
        first, last = rows * n, rows * n + n
        for place in [b for b in C.mbarriers if ((first < b + 8) & (last > b)).any()]:
            if not C.mbarriers[place].idle:
                w.report("barrier", f"overwrites {C.mbarriers[place]} while it is in use")
            C.clocks[place] = C.mbarriers.pop(place).clock + 1
    C.shared.write(rows, n, data, C.order.actor(w.index), w.report)


def store_global(C: Cta, w: Warp, at: Instruction, addresses: Array, data: Array, mask: Mask) -> None:
    """Stores ``[32, n]`` bytes into global memory."""
    w.at = at
    if mask is None:
        C.memory.write(addresses, data, w.report)
    else:
        C.memory.write(addresses[mask], data[mask], w.report)


# -- atomics -------------------------------------------------------------------------------------------------------

_SEM = "[.<order:relaxed|acquire|release|acq_rel>][.<scope:cta|cluster|gpu|sys>]"
_SPACE = f".<space:global|{_SHARED}>"
_ATOM = {
    "add": "u32|s32|u64|f32|f64",
    "min": "u32|s32|u64|s64",
    "max": "u32|s32|u64|s64",
    "and": "b32|b64",
    "or": "b32|b64",
    "xor": "b32|b64",
    "exch": "b32|b64",
    "inc": "u32",
    "dec": "u32",
}
_OPERATIONS = {
    "add": lambda old, new: old + new,
    "min": min,
    "max": max,
    "and": lambda old, new: old & new,
    "or": lambda old, new: old | new,
    "xor": lambda old, new: old ^ new,
    "exch": lambda old, new: new,
    "inc": lambda old, new: old.dtype.type(0) if old >= new else old + old.dtype.type(1),
    "dec": lambda old, new: new if old == 0 or old > new else old - old.dtype.type(1),
}


def atom(c: Code) -> None:
    """``atom`` returns the old value, ``red`` does not."""
    returns = c.instruction.name.startswith("atom")
    kind = NUMPY[c.part["type"]]
    operands = c.operands[1:] if returns else c.operands
    values = [c.use(o, kind) for o in operands[1:]] + (["None"] if len(operands) == 2 else [])
    space = c.part["space"].split("::")[0]
    call = c.call("memory.atomic", c.address(operands[0]), *values, repr(c.part["op"]), repr(space))
    if returns:
        c.result(f"{call}.view({kind})", kind)
    else:
        c.add(call)


# Triton writes the space first, which the assembler takes as well
for _where in (_SEM + _SPACE, f"{_SPACE}.<scope:cta|cluster|gpu|sys>.<order:relaxed|acquire|release|acq_rel>"):
    for _op, _kinds in _ATOM.items():
        opcode(f"atom{_where}.<op:{_op}>.<type:{_kinds}>", "d, [a], b", "9.7.13.5 atom")(atom)
        if _op != "exch":
            opcode(f"red{_where}.<op:{_op}>.<type:{_kinds}>", "[a], b", "9.7.13.6 red")(atom)
    opcode(f"atom{_where}.<op:cas>.<type:b16|b32|b64>", "d, [a], b, c", "9.7.13.5 atom")(atom)


def atomic(
    C: Cta,
    w: Warp,
    at: Instruction,
    addresses: Array,
    values: Array,
    swap: Array | None,
    op: str,
    space: str,
    mask: Mask,
) -> Array:
    """One lane after another; the old values. With ``swap`` (cas) where the old value equals ``values``."""
    w.at = at
    old = np.zeros_like(values)
    n = values.dtype.itemsize
    for lane in range(32) if mask is None else np.nonzero(mask)[0]:
        place = addresses[lane : lane + 1]
        if space == "global":
            cell = C.memory.read(place, n, w.report).view(values.dtype).ravel()
        else:
            rows = C.shared.rows(place, n, w.report)
            cell = C.shared.peek(rows, n, C.order.actor(w.index), w.report).view(values.dtype).ravel()
        old[lane] = cell[0]
        if swap is not None:
            new = swap[lane] if cell[0] == values[lane] else cell[0]
        else:
            new = _OPERATIONS[op](cell[0], values[lane])
        raw = np.array([[new]], values.dtype).view(np.uint8)
        if space == "global":
            C.memory.write(place, raw, w.report)
        else:
            C.shared.write(rows, n, raw, C.order.actor(w.index), w.report, atomic=True)
    return old
