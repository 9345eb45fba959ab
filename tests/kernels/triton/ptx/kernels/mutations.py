"""Faults to put into compiled programs: what a mistake in a kernel, or in Triton, would look like in its PTX.

A row names the fault, the programs it applies to, and what it changes: a regular expression of the PTX and what stands
there instead. ``which`` says which of the places found are changed, one at a time; without it each is. Left out are
those where nothing would be wrong: a barrier that nobody uses, threads that wait twice. A row that finds nothing to
change is an error.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

__all__ = ["MUTATIONS", "PROGRAMS", "Mutation", "mutants"]

# the kernels, by what they are made of
GLUON16, GLUON8 = "hopper-bf16", "hopper-fp8"  # the Gluon kernel: TMA, wgmma, specialised warps, by hand
WARPS16, WARPS8 = "warps-bf16", "warps-int8-fp8"  # the plain kernel with warps that Triton specialised
WGMMA = "wgmma-bf16"  # the plain kernel on sm_90 with 64 rows: TMA, wgmma
MMA16, MMA8 = "mma-bf16", "mma-fp8"  # the plain kernel on sm_80 and sm_89: cp.async, ldmatrix, mma
PROGRAMS = (GLUON16, GLUON8, WARPS16, WARPS8, WGMMA, MMA16, MMA8)
_GLUON, _WARPS, _MMA = (GLUON16, GLUON8), (WARPS16, WARPS8), (MMA16, MMA8)
_SPECIALISED = _GLUON + _WARPS
_HOPPER = (*_SPECIALISED, WGMMA)
_STAGED = (*_WARPS, WGMMA)  # tile maps made by the program, outputs stored by the copy engine

_WAIT = r"\{\s*\.reg \.pred\s+complete;\s*waitLoop:\s*mbarrier\.try_wait[^;]*;\s*@!complete bra\.uni waitLoop;\s*\}"
_ARRIVE = r"@%p\d+ mbarrier\.arrive\.shared::cta\.b64[^;]*;"
_EXPECT = r"(@%p\d+ mbarrier\.arrive\.expect_tx\.shared\.b64 _, \[%r\d+\], )(\d+);"
_PARITY = r"(mbarrier\.try_wait\.parity[^,]*, \[%r\d+\], )%r\d+;"
_PRODUCT = r"(mma\.sync[^{]*\{[^}]*\}, \{ )(%r\d+), (%r\d+)"
_EXPONENTIAL = r"(ex2\.approx\.ftz\.f32[ \t]+)(%r\d+), (%r\d+);"
_LOAD = r"(cp\.async\.bulk\.tensor\.\dd\.shared::cluster[^{;]*\{[^};]*?)(%r\d+)"
_AFTER_STORE = r"(st(?:matrix|\.shared\.v4)[^;]*;\s*(?:\.loc[^\n]*\s*|//[^\n]*\s*|\$L\w+:\s*|fence[^;]*;\s*)*)"
#: wgmma descriptors are numbers of 64 bits, whose two upper ones are the swizzle of 128 bytes.
_DESCRIPTOR = r"4611686293305294848;"


@dataclass(frozen=True)
class Mutation:
    """One row; see the module's text."""

    name: str
    programs: tuple[str, ...]
    pattern: str
    new: str
    which: Sequence[int] | None = None


MUTATIONS = (
    # mbarriers
    Mutation("a wait for a barrier is removed", _GLUON, _WAIT, ""),
    Mutation("a wait for a barrier is removed", _WARPS, _WAIT, "", range(2, 12)),  # the first two are of free tiles
    Mutation("the wait for a tile is removed", (WGMMA,), _WAIT, ""),
    Mutation("an arrival is removed", _GLUON, _ARRIVE, ""),
    Mutation("an arrival is removed", _WARPS, _ARRIVE, "", range(1, 5)),  # nobody waits until Q is free
    Mutation("an arrival comes twice", _GLUON, rf"({_ARRIVE})", r"\1\n\1"),
    Mutation("an arrival comes twice", _WARPS, rf"({_ARRIVE})", r"\1\n\1", range(1, 5)),
    Mutation("half of the bytes are expected", _HOPPER, _EXPECT, "HALF"),
    Mutation("twice the bytes are expected", _HOPPER, _EXPECT, "TWICE", (0,)),
    Mutation("no bytes are expected", _HOPPER, _EXPECT, ""),
    Mutation("a parity is always 1", _GLUON, r"(mbarrier\.try_wait\.parity[^,]*, \[%r\d+\], )%r\d+;", r"\g<1>1;", (3,)),
    Mutation(
        "a parity is always 0", _SPECIALISED, r"(mbarrier\.try_wait\.parity[^,]*, \[%r\d+\], )%r\d+;", r"\g<1>0;", (-1,)
    ),
    Mutation("a barrier counts one arrival of two", _GLUON, r"(mbarrier\.init[^,]*, )2;", r"\g<1>1;"),
    Mutation("a barrier counts an arrival too many", _GLUON, r"(mbarrier\.init[^,]*, )2;", r"\g<1>3;"),
    Mutation("a barrier counts a thread too few", _WARPS, r"(mbarrier\.init[^,]*, )128;", r"\g<1>127;"),
    Mutation("a barrier is not initialised", (*_GLUON, WGMMA), r"@%p\d+ mbarrier\.init[^;]*;", ""),
    Mutation("a barrier is not initialised", _WARPS, r"@%p\d+ mbarrier\.init[^;]*;", "", range(5)),
    # the copy engine
    Mutation("a tile is loaded a row or column further", _HOPPER, _LOAD, r"\g<1>1"),
    Mutation("a tile is not loaded", _HOPPER, r"@%p\d+ cp\.async\.bulk\.tensor\.\dd\.shared::cluster[^;]*;", ""),
    Mutation("the output is not stored", _STAGED, r"@%p\d+ cp\.async\.bulk\.tensor\.2d\.global[^;]*;", ""),
    Mutation("a store is not committed", _STAGED, r"(?<!@%p\d )cp\.async\.bulk\.commit_group;", ""),
    Mutation("a store is not waited for", _STAGED, r"cp\.async\.bulk\.wait_group\.read[ \t]+0;", ""),
    Mutation("a tile map has half the rows", _STAGED, r"(global_dim[^;]*0x1, )%r\d+;", r"\g<1>8;", (0,)),
    Mutation("a tile map has no swizzle", _STAGED, r"(swizzle_mode[^;]*), 0x3;", r"\1, 0x0;"),
    Mutation("a tile map has another box", _STAGED, r"(box_dim[^;]*0x1, )%r\d+;", r"\g<1>32;", (0,)),
    Mutation("a tile map is not acquired", _STAGED, r"@%p\d+ fence\.proxy\.tensormap[^;]*;", ""),
    Mutation("a proxy fence is removed", _HOPPER, r"fence\.proxy\.async\.shared::cta;", ""),
    # products
    Mutation("wgmma is not fenced", _HOPPER, r"wgmma\.fence\.sync\.aligned;", ""),
    Mutation("wgmma is not committed", _HOPPER, r"wgmma\.commit_group\.sync\.aligned;", ""),
    Mutation("wgmma is not waited for", _HOPPER, r"wgmma\.wait_group\.sync\.aligned [01];", ""),
    Mutation("wgmma is waited for later", _HOPPER, r"(wgmma\.wait_group\.sync\.aligned) 0;", r"\1 1;"),
    Mutation("an operand begins 32 bytes further", _HOPPER, _DESCRIPTOR, "4611686293305294850;", (0, -1)),
    Mutation("an operand has half the stride", _HOPPER, _DESCRIPTOR, f"{4611686293305294848 - (32 << 32)};", (0, -1)),
    Mutation("an operand has no swizzle", _HOPPER, _DESCRIPTOR, f"{4611686293305294848 - (1 << 62)};", (0, -1)),
    Mutation("ldmatrix reads 16 bytes further", _MMA, r"(ldmatrix[^\[]*\[%r\d+)\]", r"\1+16]", (0, -1)),
    Mutation("ldmatrix does not transpose", (MMA16,), r"(ldmatrix\.sync\.aligned\.m8n8\.x4)\.trans", r"\1", (0, -1)),
    Mutation(
        "a product has the operands of another",
        _MMA,
        r"(mma\.sync[^{]*\{[^}]*\}, \{ )(%r\d+), (%r\d+)",
        r"\1\3, \2",
        (3,),
    ),
    # cp.async
    Mutation("a copy is not waited for", _MMA, r"cp\.async\.wait_group[ \t]+\d+;", ""),
    Mutation("a copy is not committed", _MMA, r"cp\.async\.commit_group;", "", (0, -1)),
    Mutation("a copy is removed", _MMA, r"cp\.async\.cg\.shared\.global[^;]*;", "", (0, -1)),
    Mutation(
        "a copy reads 16 bytes further",
        _MMA,
        r"(cp\.async\.cg\.shared\.global[^;]*\[ %rd\d+ \+ )0",
        r"\g<1>16",
        (0, -1),
    ),
    Mutation(
        "a copy writes 16 bytes further", _MMA, r"(cp\.async\.cg\.shared\.global \[ %r\d+ \+ )0", r"\g<1>16", (0, -1)
    ),
    # warps and threads
    Mutation("threads do not wait for each other", _MMA, r"bar\.sync[ \t]+0;", "", (0, 1, 2, 3, -1)),
    Mutation("a group does not wait for its stores", _SPECIALISED, _AFTER_STORE + r"bar\.sync[ \t]+\d+, 128;", r"\1"),
    Mutation("a shuffle goes elsewhere", PROGRAMS, r"(shfl\.sync\.bfly\.b32[^;]*?, %r\d+, )2,", r"\g<1>4,", (0, -1)),
    Mutation("a warp group gives no registers", _SPECIALISED, r"setmaxnreg\.dec\.sync\.aligned\.u32[ \t]+(24|40);", ""),
    Mutation("a warp group takes too many registers", _SPECIALISED, r"(setmaxnreg\.inc[^;]*?)(232|240);", r"\g<1>256;"),
    # results
    Mutation("a row is stored where none is", _MMA + _GLUON, r"@(%p\d+) (st\.global\.v4\.b32)", r"@!\1 \2", (0,)),
    Mutation(
        "a value is stored 16 bytes further",
        _MMA + _GLUON,
        r"(st\.global\.v4\.b32 \[ %rd\d+ \+ )0",
        r"\g<1>16",
        (0, -1),
    ),
    Mutation(
        "exponents are halved",
        PROGRAMS,
        r"(ex2\.approx\.ftz\.f32[ \t]+)(%r\d+), (%r\d+);",
        r"mul.f32 \3, \3, 0f3F000000;\n\1\2, \3;",
        (4,),
    ),
)


def mutants(mutation: Mutation, ptx: str) -> Iterator[str]:
    """The programs that a row makes of one.

    Raises:
        IndexError: if there are fewer places than it names.
    """
    places = list(re.finditer(mutation.pattern, ptx))
    for place in places if mutation.which is None else [places[at] for at in mutation.which]:
        if mutation.new in ("HALF", "TWICE"):
            number = int(place[2]) // 2 if mutation.new == "HALF" else 2 * int(place[2])
            new = f"{place[1]}{number};"
        else:
            new = place.expand(mutation.new)
        yield ptx[: place.start()] + new + ptx[place.end() :]
