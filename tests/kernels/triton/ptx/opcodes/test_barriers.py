"""Named barriers, mbarriers, schedules and deadlocks."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.kernels.triton.ptx.emulator import Deadlock, Fault
from tests.kernels.triton.ptx.opcodes.programs import Run, run

pytestmark = pytest.mark.representative

DECLARE = ".reg .b32 %base, %at, %zero, %x, %y, %warp, %n; .reg .b64 %wide; .reg .pred %p, %q, %zeroth;"
START = """
mov.u32 %base, smem; add.u32 %base, %base, 128; shl.b32 %at, %thread, 2; add.u32 %at, %at, %base; mov.u32 %zero, 0;
shr.u32 %warp, %thread, 5; setp.eq.u32 %zeroth, %warp, 0; mov.u32 %x, 0; mov.u32 %n, 0;
"""
SCHEDULES: list[dict[str, Any]] = [{}, *({"schedule": "random", "asynchronous": "random", "seed": s} for s in range(3))]
#: The mbarriers lie below ``%base``.
INIT = (
    "@%first mbarrier.init.shared::cta.b64 [smem], {count}; "
    "@%first mbarrier.init.shared::cta.b64 [smem+8], 1; bar.sync 0;"
)


def program(body: str, *, warps: int = 2, count: int = 1, init: bool = True, **options: Any) -> Run:
    options = {"shared": 2048, "registers": DECLARE, **options}
    return run(START + (INIT.format(count=count) if init else "") + body, warps=warps, **options)


def kinds(body: str, **options: Any) -> set[str]:
    try:
        return program(body, **options).kinds
    except Fault as fault:
        return set(fault.__notes__)


def wait(parity: int | str, at: str = "smem", name: str = "W") -> str:
    return f"{name}: mbarrier.try_wait.parity.shared::cta.b64 %p, [{at}], {parity}; @!%p bra {name};"


ARRIVE = "mbarrier.arrive.shared::cta.b64 _, [smem];"


# -- named barriers ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", SCHEDULES)
def test_named_barriers_order_the_warps_that_come(options: dict[str, Any]) -> None:
    store, load = "@%zeroth st.shared.b32 [%at], %thread;", "@!%zeroth ld.shared.b32 %x, [%at+-128];"
    assert kinds(store + "bar.sync 3, 64;" + load, init=False, **options) == set()
    assert kinds(store + "@%zeroth bar.arrive 3, 64; @!%zeroth bar.sync 3, 64;" + load, init=False, **options) == set()
    # a third warp's barrier does not order them
    other = "setp.eq.u32 %q, %warp, 2; @%zeroth bar.sync 3, 64; @%q bar.sync 3, 64;"
    third = "setp.eq.u32 %q, %warp, 1; @%q ld.shared.b32 %x, [%at+-128];"
    assert "race" in kinds(store + other + third, init=False, warps=3, **options) or "uninitialised" in kinds(
        store + other + third, init=False, warps=3, **options
    )


def test_named_barriers_in_two_halves_make_a_pipeline() -> None:
    body = """
    @!%zeroth bra CONSUMER;
    PRODUCE: st.shared.b32 [%at], %n; bar.arrive 1, 64; bar.sync 2, 64; add.u32 %n, %n, 1; setp.lt.u32 %p, %n, 5;
    @%p bra PRODUCE;
    bra END;
    CONSUMER: bar.sync 1, 64; ld.shared.b32 %y, [%at+-128]; add.u32 %x, %x, %y; bar.arrive 2, 64; add.u32 %n, %n, 1;
    setp.lt.u32 %p, %n, 5; @%p bra CONSUMER;
    END: mov.u32 %d, %x;
    """
    for options in SCHEDULES:
        got = program(body, init=False, outputs={"d": np.uint32}, **options)
        assert got["d"].tolist() == [0] * 32 + [10] * 32 and not got.faults


def test_named_barriers_that_are_wrong() -> None:
    assert kinds("@%zeroth bar.sync 1, 64; @!%zeroth bar.sync 2, 64;", init=False) == {"deadlock"}
    assert "barrier" in kinds("@%zeroth bar.sync 1, 64; @!%zeroth bar.sync 1, 96;", init=False, warps=3)
    assert "barrier" in kinds("bar.sync 1, 96;", init=False)
    assert "barrier" in kinds("add.u32 %x, %x, 16; bar.sync %x, 64;", init=False)
    assert kinds("bar.sync %thread, 64;", init=False) == {"lanes"}


# -- mbarriers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", SCHEDULES)
def test_phases_alternate_their_parity(options: dict[str, Any]) -> None:
    """A ring of one slot: a barrier says it is full, one that it is empty; phase k has parity k mod 2."""
    body = """
    @!%zeroth bra CONSUMER;
    PRODUCE: xor.b32 %y, %n, 1; and.b32 %y, %y, 1;
    A: mbarrier.try_wait.parity.shared::cta.b64 %p, [smem+8], %y; @!%p bra A;
    st.shared.b32 [%at], %n; mbarrier.arrive.shared::cta.b64 _, [smem];
    add.u32 %n, %n, 1; setp.lt.u32 %p, %n, 6; @%p bra PRODUCE;
    bra END;
    CONSUMER: and.b32 %y, %n, 1;
    B: mbarrier.try_wait.parity.shared::cta.b64 %p, [smem], %y; @!%p bra B;
    ld.shared.b32 %y, [%at+-128]; shl.b32 %x, %x, 4; add.u32 %x, %x, %y; bar.warp.sync 0xffffffff;
    elect.sync %y|%q, 0xffffffff; @%q mbarrier.arrive.shared::cta.b64 _, [smem+8];
    add.u32 %n, %n, 1; setp.lt.u32 %p, %n, 6; @%p bra CONSUMER;
    END: mov.u32 %d, %x;
    """
    got = program(body, count=32, outputs={"d": np.uint32}, **options)
    assert got["d"][32:].tolist() == [0x012345] * 32 and not got.faults


def test_the_parity_of_the_phase_before_the_first_is_complete() -> None:
    assert kinds(wait(1)) == set()
    assert kinds(wait("%x"), warps=1) == {"deadlock"}
    assert kinds("@%first " + ARRIVE + wait(0)) == set()
    assert kinds("@%first " + ARRIVE + wait(1)) == {"deadlock"}
    # only bit 0 counts: Triton passes -1
    assert kinds("mov.u32 %y, -1;" + wait("%y")) == set()


def test_arrivals_are_counted() -> None:
    assert kinds(ARRIVE + wait(0), count=64) == set()
    assert kinds(ARRIVE + wait(0), count=65) == {"deadlock"}
    assert kinds("@%first mbarrier.arrive.shared::cta.b64 _, [smem], 3;" + wait(0), count=3) == set()
    assert "barrier" in kinds("@%first mbarrier.arrive.shared::cta.b64 _, [smem], 4;", count=3)
    assert "barrier" in kinds("@%first " + ARRIVE, count=2)  # ends in the middle of a phase


def test_testing_does_not_wait() -> None:
    body = """
    @!%zeroth bra OTHER;
    T: mbarrier.test_wait.parity.shared::cta.b64 %p, [smem], 0; @%p bra DONE; add.u32 %n, %n, 1;
    setp.lt.u32 %q, %n, 50; @%q bra T;
    DONE: ld.shared.b32 %x, [%at+128]; bra END;
    OTHER: st.shared.b32 [%at], %thread; mbarrier.arrive.shared::cta.b64 _, [smem];
    END: mov.u32 %d, %x;
    """
    got = program(body, count=32, outputs={"d": np.uint32})
    assert got["d"][:32].tolist() == list(range(32, 64)) and not got.faults


def test_reads_before_the_barrier_completes_are_races() -> None:
    store = "@%zeroth st.shared.b32 [%at], %thread; @%zeroth mbarrier.arrive.shared::cta.b64 _, [smem];"
    load = "@!%zeroth ld.shared.b32 %x, [%at+-128];"
    for options in SCHEDULES:
        assert kinds(store + wait(0) + load, count=32, **options) == set()
        found = kinds(store + load + wait(0), count=32, **options)
        assert found & {"race", "uninitialised"}
        assert kinds(store + wait(1) + load, count=32, **options) & {
            "race",
            "uninitialised",
            "deadlock",
        }  # wrong parity


def test_the_lifetime_of_barriers() -> None:
    inval = "bar.sync 0; @%first mbarrier.inval.shared::cta.b64 [smem];"
    again = "@%first mbarrier.init.shared::cta.b64 [smem], 1; bar.sync 0;"
    use = "@%first " + ARRIVE + wait(0)
    assert kinds(use + inval + again + use.replace("W", "V")) == set()
    assert kinds(use.replace(ARRIVE, ARRIVE), init=False) == {"barrier"}
    assert "barrier" in kinds(use + inval + use.replace("W", "V"))
    assert "barrier" in kinds("@%first " + ARRIVE + inval, count=2)  # in the middle of a phase
    assert "barrier" in kinds("@%first " + ARRIVE + "bar.sync 0; @%first st.shared.b64 [smem], %wide;", count=2)
    assert "barrier" in kinds("@%first " + ARRIVE + "bar.sync 0;" + again, count=2)
    assert "barrier" in kinds("@%first mbarrier.init.shared::cta.b64 [smem], 0;", init=False)
    assert kinds("@%first mbarrier.init.shared::cta.b64 [smem+4], 1;", init=False) == {"alignment"}


def test_an_initialisation_must_come_before() -> None:
    body = INIT.format(count=64).replace("bar.sync 0;", "")
    found = kinds(body + ARRIVE + wait(0), init=False)
    assert "race" in found or "barrier" in found


def test_a_deadlock_names_the_warps_and_their_source() -> None:
    head = ""
    body = "@%zeroth bra A;\n.loc 1 17 3\nbar.sync 2, 64;\nA:\n.loc 1 23 3\n" + wait(0)
    text = START + INIT.format(count=9) + body
    with pytest.raises(Deadlock) as found:
        run(text, registers=DECLARE, warps=2, shared=2048, head=head, assemble=False)
    assert (
        "warp 0 waits" in str(found.value) and ":23)" in str(found.value) and "mbarrier at byte 0" in str(found.value)
    )
    assert "warp 1 waits" in str(found.value) and ":17)" in str(found.value) and "barrier 2" in str(found.value)


def test_seeds_draw_the_order_of_the_warps() -> None:
    body = "atom.global.add.u32 %d, [%t], 1;"
    orders = set()
    for seed in range(4):
        got = [
            run(
                "bar.sync 0;" * 3 + body,
                {},
                {"d": np.uint32},
                arrays={"t": np.zeros(1, np.uint32)},
                warps=4,
                schedule="random",
                seed=s,
            )
            for s in (seed, seed)
        ]
        assert got[0]["d"].tolist() == got[1]["d"].tolist()
        orders.add(tuple(got[0]["d"][::32].tolist()))
    assert len(orders) > 1


def test_a_loop_without_end_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.kernels.triton.ptx.emulator.cta._LIMIT", 1000)
    assert kinds("L: add.u32 %x, %x, 1; bar.sync 0; bra L;", init=False) == {"trap"}
    assert kinds("@%first trap;", init=False) == {"trap"}


# -- the number of registers ---------------------------------------------------------------------------------------


def registers(body: str, maxnreg: int, **options: Any) -> set[str]:
    return kinds(body, head=f".maxnreg {maxnreg}", init=False, **{"warps": 12, **options})


CONSUMERS = "setp.ge.u32 %q, %thread, 128; @%q bra MORE;"


def test_registers_move_between_warps() -> None:
    body = (
        CONSUMERS
        + "setmaxnreg.dec.sync.aligned.u32 {less}; bra END; MORE: setmaxnreg.inc.sync.aligned.u32 {more}; END:"
    )
    # 384 threads of 168 registers leave 1024 of 65536; giving back 144 of 128 threads is 72 for 256 others
    assert registers(body.format(less=24, more=240), 168) == set()
    assert registers(body.format(less=32, more=240), 168) == {"registers"}  # takes those that are left over
    assert registers(body.format(less=40, more=240), 168) == {"deadlock"}
    assert registers(body.format(less=176, more=168), 168, assemble=False) == {"registers"}
    assert registers(body.format(less=24, more=160), 168, assemble=False) == {"registers"}
