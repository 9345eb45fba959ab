"""The table of opcodes, and what cannot be loaded: everything unknown is an error before anything runs."""

from __future__ import annotations

import re
import subprocess
import sys

import numpy as np
import pytest

from tests.kernels.triton.ptx.emulator import PtxError
from tests.kernels.triton.ptx.emulator.instructions import MODULES
from tests.kernels.triton.ptx.emulator.program import load
from tests.kernels.triton.ptx.emulator.table import TABLE
from tests.kernels.triton.ptx.opcodes.programs import module, run

pytestmark = pytest.mark.representative

ROWS = [row for rows in TABLE.values() for row in rows]


def test_every_row_names_its_section() -> None:
    assert len(MODULES) == 15 and len(ROWS) > 150
    for row in ROWS:
        assert re.fullmatch(r"9\.7(\.\d+)+ [a-z].*", row.section), row


def test_the_pattern_of_a_row_takes_what_the_row_lists() -> None:
    for row in ROWS:
        if len(names := row.names) < 5000:
            assert all(row.pattern.fullmatch(name) for name in names), row.form


def test_no_opcode_is_declared_twice() -> None:
    owners: dict[str, str] = {}
    for row in ROWS:
        for name in row.names:
            own = f"{row.form} {row.operands}"
            assert owners.setdefault(name, own) == own, name


UNKNOWN = [
    "foo.b32 %x, %x;",
    "add.s33 %x, %x, %x;",
    "add.rz.f32 %x, %x, %x;",
    "mul.hi.wide.s32 %x, %x, %x;",
    "ld.local.b32 %x, [%q];",
    "ld.const.b32 %x, [%q];",
    "ld.global.L1::evict_sometimes.b32 %x, [%q];",
    "ld.acquire.warp.global.b32 %x, [%q];",
    "ld.global.L2::cache_hint.b32 %x, [%q];",
    "st.async.b32 [%q], %x;",
    "fence.proxy.alias;",
    "fence.sc;",
    "mma.sync.aligned.m16n8k64.row.col.s32.s4.s4.s32 {%x,%x,%x,%x}, {%x,%x,%x,%x}, {%x,%x}, {%x,%x,%x,%x};",
    "shfl.sync.left.b32 %x, %x, 1, 31, -1;",
    "cvt.rn.satfinite.e2m1x2.f32 %x, %x, %x;",
    "add.s32 %x, %x;",
    "add.s32 %x, %x, %x, %x;",
    "add.s32 %x, %x, %nowhere;",
    "mov.b32 %x, %clock;",
    "bra NOWHERE;",
    "mov.b32 {%x, %x}, %x;",
    "add.s64 %x, %q, %q;",
    "setp.lt.s32 %x, %x, %x;",
    "and.pred %p, %p, %x;",
    "cp.async.cg.shared.global [%x], [%q], 8;",
    "cp.async.bulk.tensor.3d.global.shared::cta.bulk_group [%q, {%x, %x}], [%x];",
    "tensormap.replace.tile.box_dim.shared::cta.b1024.b32 [%q], 5, %x;",
    "setmaxnreg.inc.sync.aligned.u32 240;",
    "ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%x, %x}, [%x];",
    "lop3.b32 %x, %x, %x, %x, 256;",
    '.pragma "something else";',
    ".local .b32 %y;",
    ".reg .b128 %y;",
    "call foo;",
]


@pytest.mark.parametrize("text", UNKNOWN)
def test_what_is_not_known_cannot_be_loaded(text: str) -> None:
    """Even behind the end, where it would never run; the message has the line and the text."""
    body = f"bra END;\n{text}\nEND:"
    whole = module(body, registers=".reg .b32 %x; .reg .b64 %q; .reg .pred %p;")
    line = whole.splitlines().index(text) + 1
    with pytest.raises(PtxError) as found:
        load(whole)
    assert f"line {line}" in str(found.value) or "b128" in text or ".reg" in text


def test_tcgen05_is_refused_with_a_reason() -> None:
    with pytest.raises(PtxError, match="sm_100.*not emulated"):
        load(module("tcgen05.wait::ld.sync.aligned;"))


@pytest.mark.parametrize(
    "head", [".global .align 4 .b32 counter;", ".func helper() { ret; }", ".const .b32 x = 1;", ".alias a, b;"]
)
def test_what_is_not_known_outside_of_a_kernel(head: str) -> None:
    with pytest.raises(PtxError, match="line 4"):
        load(module("").replace(".extern", f"{head}\n.extern", 1))


def test_scopes_have_registers_and_labels_of_their_own() -> None:
    body = """
    mov.u32 %d, 0; { .reg .pred done; L: add.u32 %d, %d, 1; setp.ge.u32 done, %d, 3; @!done bra L; }
    { .reg .pred done; L: add.u32 %d, %d, 10; setp.ge.u32 done, %d, 40; @done bra M; bra L; M: add.u32 %d, %d, 100; }
    """
    assert set(run(body, {}, {"d": np.uint32})["d"].tolist()) == {143}


def test_the_emulator_needs_neither_torch_nor_triton() -> None:
    code = (
        "import sys, tests.kernels.triton.ptx.emulator.execute, tests.kernels.triton.ptx.emulator as e; "
        "print(sorted({'torch', 'triton'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
