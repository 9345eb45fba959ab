"""What lanes tell each other, and lanes that go different ways."""

from __future__ import annotations

import numpy as np
import pytest

from tests.kernels.triton.ptx.emulator import Fault
from tests.kernels.triton.ptx.opcodes.programs import run

pytestmark = pytest.mark.representative

RANDOM = np.random.default_rng(2)
ALL = "0xffffffff"


def source(mode: str, lane: int, by: int, control: int) -> tuple[int, bool]:
    """The lane that a lane reads, in the words of segments: PTX ISA 9.7.9.6."""
    clamp, mask = control & 31, control >> 8 & 31
    begin = lane & mask
    limit = begin | clamp & ~mask & 31
    if mode == "up":
        there = lane - by
        inside = there >= limit
    elif mode == "down":
        there = lane + by
        inside = there <= limit
    elif mode == "bfly":
        there = lane ^ by
        inside = there <= limit
    else:
        there = begin | by & ~mask & 31
        inside = there <= limit
    return (there if inside else lane), inside


@pytest.mark.parametrize("control", [31, 0, 7, 0x1807, 0x181F, 0x1C03, 0x1000, 0x100F, 0x1E01])
@pytest.mark.parametrize("mode", ["up", "down", "bfly", "idx"])
def test_shuffles(mode: str, control: int) -> None:
    a = RANDOM.integers(0, 1 << 32, 32, dtype=np.uint32)
    distances = [0, 1, 2, 5, 8, 16, 31]
    body = "\n".join(f"shfl.sync.{mode}.b32 %d{i}|%p{i}, %a, {by}, {control}, {ALL};" for i, by in enumerate(distances))
    got = run(body, {"a": a}, {"d": (7, np.uint32), "p": (7, bool)})
    for i, by in enumerate(distances):
        for lane in range(32):
            there, inside = source(mode, lane, by, control)
            assert got["d"][i, lane] == a[there] and got["p"][i, lane] == inside, (by, lane)


def test_each_lane_asks_another_lane() -> None:
    a, b = RANDOM.integers(0, 1 << 32, 32, dtype=np.uint32), RANDOM.permutation(32).astype(np.uint32)
    got = run(f"shfl.sync.idx.b32 %d, %a, %b, 31, {ALL};", {"a": a, "b": b}, {"d": np.uint32})["d"]
    assert got.tolist() == a[b].tolist()


@pytest.mark.parametrize("op", ["add", "min", "max"])
@pytest.mark.parametrize("kind", ["u32", "s32"])
def test_reductions_of_numbers(op: str, kind: str) -> None:
    t = np.int32 if kind == "s32" else np.uint32
    a = RANDOM.integers(0, 1 << 32, 32, dtype=np.uint32).view(t)
    got = run(f"redux.sync.{op}.{kind} %d, %a, {ALL};", {"a": a}, {"d": t}, target="sm_80")["d"]
    values = a.tolist()
    wanted = {"add": sum(values), "min": min(values), "max": max(values)}[op]
    assert (got.view(np.uint32) == wanted % (1 << 32)).all()


def test_reductions_of_bits() -> None:
    a = RANDOM.integers(0, 1 << 32, 32, dtype=np.uint32) & RANDOM.integers(0, 1 << 32, 32, dtype=np.uint32)
    body = "\n".join(f"redux.sync.{op}.b32 %{d}, %a, {ALL};" for op, d in (("and", "d"), ("or", "e"), ("xor", "f")))
    got = run(body, {"a": a}, dict.fromkeys("def", np.uint32))
    both, some, odd = 0xFFFFFFFF, 0, 0
    for x in a.tolist():
        both, some, odd = both & x, some | x, odd ^ x
    assert (got["d"] == both).all() and (got["e"] == some).all() and (got["f"] == odd).all()


def test_votes() -> None:
    a = np.arange(32, dtype=np.uint32)
    body = f"""
    setp.lt.u32 %c, %a, 5; setp.lt.u32 %o, %a, 99;
    vote.sync.all.pred %p, %c, {ALL}; vote.sync.any.pred %q, %c, {ALL}; vote.sync.all.pred %r, %o, {ALL};
    vote.sync.uni.pred %s, %c, {ALL}; vote.sync.uni.pred %t, %o, {ALL};
    vote.sync.ballot.b32 %d, %c, {ALL}; activemask.b32 %e; match.any.sync.b32 %f, %m, {ALL};
    """
    m = np.array([1, 2, 1, 3] * 8, np.uint32)
    got = run(
        body,
        {"a": a, "m": m},
        dict.fromkeys("pqrst", bool) | dict.fromkeys("def", np.uint32),
        registers=".reg .pred %c, %o;",
    )
    assert [bool(got[p][0]) for p in "pqrst"] == [False, True, True, False, True]
    assert (got["d"] == 31).all() and (got["e"] == 0xFFFFFFFF).all()
    assert got["f"].tolist() == [sum(1 << j for j in range(32) if m[j] == m[i]) for i in range(32)]


def test_one_lane_is_elected() -> None:
    got = run(f"elect.sync %d|%p, {ALL};", {}, {"d": np.uint32, "p": bool})
    assert got["p"].sum() == 1 and (got["d"] == np.argmax(got["p"])).all()


DIVERGED = """
setp.lt.u32 %c, %a, 12;
@%c bra LOW;
add.u32 %d, %a, 100;
vote.sync.ballot.b32 %e, %c, 0xfffff000;
bra.uni JOIN;
LOW:
mov.u32 %d, 0;
mov.u32 %e, 0;
LOOP:
add.u32 %d, %d, %a;
add.u32 %e, %e, 1;
setp.le.u32 %c, %e, %a;
@%c bra LOOP;
JOIN:
shfl.sync.idx.b32 %f, %d, 3, 31, 0xffffffff;
"""


def test_lanes_go_different_ways_and_meet_again() -> None:
    a = np.arange(32, dtype=np.uint32)
    got = run(DIVERGED, {"a": a}, dict.fromkeys("def", np.uint32), registers=".reg .pred %c;")
    assert got["d"].tolist() == [x * (x + 1) if x < 12 else x + 100 for x in range(32)]
    assert got["e"].tolist() == [x + 1 if x < 12 else 0 for x in range(32)]
    assert (got["f"] == 12).all() and not got.faults


def test_a_table_of_targets() -> None:
    body = """
    and.b32 %i, %a, 3; ts: .branchtargets A, B, C, D; brx.idx %i, ts;
    A: mov.u32 %d, 7; bra E; B: mov.u32 %d, 8; bra E; C: mov.u32 %d, 9; bra E; D: mov.u32 %d, %a; E:
    """
    a = np.arange(32, dtype=np.uint32)
    got = run(body, {"a": a}, {"d": np.uint32}, registers=".reg .b32 %i;")["d"]
    assert got.tolist() == [(7, 8, 9, x)[x & 3] for x in range(32)]


def test_a_barrier_of_the_warp_waits_for_lanes_that_went_elsewhere() -> None:
    body = """
    setp.lt.u32 %c, %a, 5; mov.u32 %d, 1; @%c bra AWAY;
    MEET: bar.warp.sync 0xffffffff; shfl.sync.idx.b32 %d, %d, 2, 31, 0xffffffff; bra END;
    AWAY: mov.u32 %d, 7; bra MEET;
    END:
    """
    got = run(body, {"a": np.arange(32, dtype=np.uint32)}, {"d": np.uint32}, registers=".reg .pred %c;")
    assert (got["d"] == 7).all() and not got.faults
    never = body.replace("bra MEET;", "bar.warp.sync 0xffffffff; bra END;")
    with pytest.raises(Fault) as found:
        run(never, {"a": np.arange(32, dtype=np.uint32)}, {"d": np.uint32}, registers=".reg .pred %c;")
    assert found.value.kind == "lanes"


@pytest.mark.parametrize(
    "body",
    [
        "@%c shfl.sync.bfly.b32 %d, %a, 1, 31, 0xffffffff;",
        "@%c vote.sync.ballot.b32 %d, %c, 0xffffffff;",
        "@%c redux.sync.add.u32 %d, %a, 0x0000ffff;",
        "shfl.sync.bfly.b32 %d, %a, 1, 31, %a;",
        "@%c bar.warp.sync 0xffffffff;",
        "@%c bar.sync 0;",
    ],
)
def test_lanes_that_are_missing(body: str) -> None:
    with pytest.raises(Fault) as found:
        run(
            "setp.lt.u32 %c, %a, 12; mov.u32 %d, 0;" + body,
            {"a": np.arange(32, dtype=np.uint32)},
            {"d": np.uint32},
            registers=".reg .pred %c;",
        )
    assert found.value.kind == "lanes"


def test_lanes_of_the_member_mask_are_enough() -> None:
    body = "setp.lt.u32 %c, %a, 16; mov.u32 %d, 0; @%c shfl.sync.bfly.b32 %d, %a, 1, 31, 0x0000ffff;"
    a = np.arange(32, dtype=np.uint32)
    got = run(body, {"a": a}, {"d": np.uint32}, registers=".reg .pred %c;")
    assert got["d"].tolist() == [x ^ 1 if x < 16 else 0 for x in range(32)] and not got.faults
