"""Loads, stores and atomics, and what is wrong with them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.kernels.triton.ptx.emulator import Fault
from tests.kernels.triton.ptx.opcodes.programs import Run, run

pytestmark = pytest.mark.representative

RANDOM = np.random.default_rng(6)
#: The address of a lane's 16 bytes of shared memory.
PLACE = "mov.u32 %base, smem; shl.b32 %at, %thread, 4; add.u32 %at, %at, %base; mov.u32 %zero, 0;"
DECLARE = ".reg .b32 %base, %at, %zero, %x, %y<4>; .reg .b64 %wide; .reg .b16 %h, %i; .reg .pred %p;"


def shared(body: str, outputs: Any = None, warps: int = 1, inputs: Any = None, **options: Any) -> Run:
    options = {"shared": 512 * warps, **options}
    return run(PLACE + body, inputs, outputs, registers=DECLARE, warps=warps, **options)


def kind_of(body: str, **options: Any) -> set[str]:
    """The kinds of faults of a program on shared memory."""
    try:
        return shared(body, **options).kinds
    except Fault as fault:
        return set(fault.__notes__)


def test_bytes_are_little_endian_in_every_width() -> None:
    a = RANDOM.integers(0, 1 << 64, 32, dtype=np.uint64)
    body = """
    st.shared.b64 [%at], %a; mov.b64 {%x, %y0}, %a; st.shared.v2.b32 [%at+8], {%y0, %x};
    ld.shared.u8 %d, [%at+1]; ld.shared.s8 %e, [%at+7]; ld.shared.u16 %f, [%at+2]; ld.shared.b32 %g, [%at+4];
    ld.shared.b64 %h64, [%at+8]; ld.shared.s16 %j, [%at+6]; ld.shared.v4.b32 {%y0, %y1, %y2, %y3}, [%at];
    cvt.u64.u32 %wide, %at; cvta.shared.u64 %wide, %wide; ld.b32 %k, [%wide+4]; add.u32 %y0, %y0, %y3;
    """
    outputs = {"d": np.uint32, "e": np.int32, "f": np.uint32, "g": np.uint32, "h64": np.uint64, "j": np.int32}
    body += "mov.b32 %z, %y0;"
    got = shared(body, outputs | {"k": np.uint32, "z": np.uint32}, inputs={"a": a})
    for n, v in enumerate(a.tolist()):
        raw = v.to_bytes(8, "little")
        low, high = v & 0xFFFFFFFF, v >> 32
        assert got["d"][n] == raw[1] and got["e"][n] == (raw[7] ^ 128) - 128
        assert got["f"][n] == raw[2] | raw[3] << 8 and got["g"][n] == high == got["k"][n]
        assert got["h64"][n] == low << 32 | high and got["j"][n] == ((raw[6] | raw[7] << 8) ^ 0x8000) - 0x8000
        assert got["z"][n] == (low + low) & 0xFFFFFFFF
    assert not got.faults


def test_global_memory_with_cache_words() -> None:
    table = RANDOM.integers(0, 1 << 32, 64, dtype=np.uint32)
    body = """
    mul.wide.u32 %wide, %thread, 8; add.u64 %wide, %wide, %t; createpolicy.fractional.L2::evict_first.b64 %pol, 1.0;
    ld.global.L1::evict_last.L2::cache_hint.v2.b32 {%d, %e}, [%wide], %pol; ld.global.nc.b32 %f, [%wide];
    ld.volatile.global.b32 %g, [%wide+4]; ld.acquire.gpu.global.b32 %h, [%wide];
    add.u32 %d, %d, 1; st.global.L1::evict_first.b32 [%wide], %d; st.release.gpu.global.b32 [%wide+4], %e;
    """
    outputs = dict.fromkeys("defgh", np.uint32)
    got = run(body, {}, outputs, arrays={"t": table}, registers=".reg .b64 %wide, %pol;")
    assert (got["d"] == table[::2] + 1).all() and (got["e"] == table[1::2]).all() and (got["f"] == table[::2]).all()
    assert (got["g"] == table[1::2]).all() and (got["h"] == table[::2]).all()
    assert (got.arrays["t"][::2] == table[::2] + 1).all() and not got.faults


ATOMICS = {
    "add.u32": lambda x, y: (x + y) & 0xFFFFFFFF,
    "max.u32": max,
    "min.u32": min,
    "and.b32": lambda x, y: x & y,
    "or.b32": lambda x, y: x | y,
    "xor.b32": lambda x, y: x ^ y,
    "exch.b32": lambda x, y: y,
    "inc.u32": lambda x, y: 0 if x >= y else x + 1,
    "dec.u32": lambda x, y: y if x == 0 or x > y else x - 1,
}


@pytest.mark.parametrize("space", ["global", "shared"])
@pytest.mark.parametrize("op", ATOMICS)
def test_atomics(op: str, space: str) -> None:
    a = RANDOM.integers(0, 100, 32).astype(np.uint32)
    cells = np.array([50, 60, 70, 80], np.uint32)
    start = "and.b32 %x, %thread, 3; shl.b32 %x, %x, 2; cvt.u64.u32 %wide, %x; add.u64 %wide, %wide, %t;"
    if space == "shared":
        start += (
            "add.u32 %at, %base, %x; ld.global.b32 %y0, [%wide]; setp.lt.u32 %p, %thread, 4; "
            "@%p st.shared.b32 [%at], %y0;"
            f"bar.sync 0; atom.shared.{op} %d, [%at], %a; bar.sync 0; ld.shared.b32 %y0, [%at];"
            "@%p st.global.b32 [%wide], %y0;"
        )
    else:
        start += f"atom.global.gpu.acq_rel.{op} %d, [%wide], %a;"
    got = run(PLACE + start, {"a": a}, {"d": np.uint32}, arrays={"t": cells}, registers=DECLARE, shared=64)
    now = cells.tolist()
    for i, x in enumerate(a.tolist()):
        assert got["d"][i] == now[i & 3]
        now[i & 3] = ATOMICS[op](now[i & 3], x)
    assert got.arrays["t"].tolist() == now and not got.faults


def test_compare_and_swap_and_reductions_without_a_result() -> None:
    a = np.arange(32, dtype=np.uint32)
    body = """
    mov.u32 %x, 5; atom.global.cas.b32 %d, [%t], %a, %x; red.global.add.f32 [%t+4], 0f3F800000;
    red.global.add.u32 [%t+8], %a;
    """
    got = run(
        body, {"a": a}, {"d": np.uint32}, arrays={"t": np.array([0, 0, 0, 0], np.uint32)}, registers=".reg .b32 %x;"
    )
    assert got["d"].tolist() == [0] + [5] * 31
    assert (
        got.arrays["t"][0] == 5
        and got.arrays["t"][1:2].view(np.float32)[0] == 32
        and got.arrays["t"][2] == sum(range(32))
    )


# -- faults --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "access", ["ld.global.b32 %x, {};", "st.global.b32 {}, %thread;", "atom.global.add.u32 %x, {}, 1;"]
)
@pytest.mark.parametrize(
    ("address", "kind"),
    [("[%t+{}]", None), ("[%t+4]", "bounds"), ("[%t+-4]", "bounds"), ("[%t+-2]", "alignment"), ("[%zero]", "bounds")],
)
def test_global_addresses(access: str, address: str, kind: str | None) -> None:
    array = np.zeros(32, np.uint32)
    body = f"mul.wide.u32 %wide, %thread, 4; add.u64 %t, %t, %wide; {access.format(address.replace('{}', '0'))}"
    if kind is None:
        assert not run(body, arrays={"t": array}, registers=".reg .b32 %x; .reg .b64 %wide;").faults
        return
    with pytest.raises(Fault) as found:
        run("mov.b64 %zero, 0;" + body, arrays={"t": array}, registers=".reg .b32 %x; .reg .b64 %wide, %zero;")
    assert found.value.kind == kind


def test_fresh_global_memory_must_be_written_first() -> None:
    body = "mul.wide.u32 %wide, %thread, 4; add.u64 %wide, %t, %wide; {} ld.global.b32 %x, [%wide];"
    for store, kinds in (
        ("", {"uninitialised"}),
        ("st.global.b32 [%wide], %thread;", set()),
        ("st.global.b16 [%wide], %h;", {"uninitialised"}),
    ):
        got = run(body.format(store), fresh={"t": 128}, registers=".reg .b32 %x; .reg .b64 %wide; .reg .b16 %h;")
        assert got.kinds == kinds


WRITE, READ = "st.shared.b32 [%at], %zero;", "ld.shared.b32 %x, [%at];"
REWRITE = "st.shared.b32 [%at], %thread;"


def test_shared_addresses() -> None:
    assert kind_of(WRITE + READ) == set()
    assert kind_of(READ) == {"uninitialised"}
    assert kind_of("st.shared.b16 [%at], %h;" + READ) == {"uninitialised"}
    assert kind_of("st.shared.b32 [%at+16], %zero;") == {"bounds"}
    assert kind_of("st.shared.b32 [%at+-16], %zero;") == {"bounds"}
    assert kind_of("ld.shared.b32 %x, [%zero];") == {"bounds"}
    assert kind_of("st.shared.b64 [%at+4], %wide;") == {"alignment"}
    assert kind_of("add.u32 %at, %base, 496; st.shared.v4.b32 [%at+4], {%zero, %zero, %zero, %zero};") == {"alignment"}


def test_races_between_warps() -> None:
    for schedule in ({}, {"schedule": "random", "seed": 1}, {"schedule": "random", "seed": 2}):
        both = {"warps": 2, **schedule}
        assert "race" in kind_of(WRITE + flip() + READ, **both)
        assert kind_of(WRITE + "bar.sync 0;" + flip() + READ, **both) == set()
        assert "race" in kind_of(WRITE + "bar.sync 0;" + flip() + READ + flip() + REWRITE, **both)
        assert kind_of(WRITE + "bar.sync 0;" + flip() + READ + "bar.sync 0;" + flip() + REWRITE, **both) == set()


def flip() -> str:
    """``%at`` becomes the place of the lane of the other warp."""
    return "sub.u32 %at, %at, %base; xor.b32 %at, %at, 512; add.u32 %at, %at, %base;"


def test_lanes_that_store_to_one_place() -> None:
    assert kind_of("st.shared.b32 [%base], %zero;") == set()
    assert kind_of("st.shared.b32 [%base], %thread;") == {"race"}
    assert kind_of("st.shared.b32 [%base], %zero;", warps=2) == set()  # the same value, as compilers do
    assert kind_of("shr.u32 %x, %thread, 5; st.shared.b32 [%base], %x;", warps=2) == {"race"}


def test_atomics_do_not_race_with_each_other() -> None:
    start = "@%first st.shared.b32 [%base], %zero; bar.sync 0;"
    assert (
        kind_of(start + "atom.shared.add.u32 %x, [%base], 1; bar.sync 0; ld.shared.b32 %x, [%base];", warps=2) == set()
    )
    assert kind_of(start + "atom.shared.add.u32 %x, [%base], 1; ld.shared.b32 %x, [%base];", warps=2) == {"race"}
    assert kind_of("atom.shared.add.u32 %x, [%base], 1;") == {"uninitialised"}
