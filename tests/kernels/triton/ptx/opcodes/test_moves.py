"""Comparisons, selections, moves and byte permutations."""

from __future__ import annotations

import math

import numpy as np
import pytest

from tests.kernels.triton.ptx.opcodes.programs import run

pytestmark = pytest.mark.representative

RANDOM = np.random.default_rng(3)
PLAIN = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}


@pytest.mark.parametrize("kind", ["f32", "f64"])
def test_comparisons_of_numbers(kind: str) -> None:
    t = {"f32": np.float32, "f64": np.float64}[kind]
    values = [np.nan, 0.0, -0.0, 1.0, np.inf]
    a, b = (np.pad(v.ravel().astype(t), (0, 7)) for v in np.meshgrid(values, values))
    relations = [*PLAIN, *(f"{r}u" for r in PLAIN), "num", "nan"]
    body = "\n".join(f"setp.{r}.{kind} %p{i}, %a, %b;" for i, r in enumerate(relations))
    got = run(body, {"a": a, "b": b}, {"p": (len(relations), bool)})["p"]
    for i, r in enumerate(relations):
        for x, y, p in zip(a.tolist(), b.tolist(), got[i].tolist(), strict=True):
            unordered = math.isnan(x) or math.isnan(y)
            if r in ("num", "nan"):
                wanted = unordered == (r == "nan")
            elif unordered:
                wanted = r.endswith("u") and len(r) == 3
            else:
                wanted = eval(f"x {PLAIN[r[:2]]} y")
            assert p == wanted, (r, x, y)


@pytest.mark.parametrize("kind", ["s32", "u32", "s64", "u64", "s16", "u16"])
def test_comparisons_of_integers(kind: str) -> None:
    t = np.dtype(f"{'i' if kind[0] == 's' else 'u'}{int(kind[1:]) // 8}")
    info = np.iinfo(t)
    a, b = (RANDOM.choice(np.array([info.min, info.max, 0, 1, 5], t), 32) for _ in range(2))
    body = "\n".join(f"setp.{r}.{kind} %p{i}, %a, %b;" for i, r in enumerate(PLAIN))
    got = run(body, {"a": a, "b": b}, {"p": (6, bool)})["p"]
    for i, sign in enumerate(PLAIN.values()):
        assert got[i].tolist() == [eval(f"x {sign} y") for x, y in zip(a.tolist(), b.tolist(), strict=True)]


def test_comparisons_with_a_third_predicate_and_an_opposite() -> None:
    a = np.arange(32, dtype=np.int32)
    body = (
        "setp.gt.s32 %c, %a, 9; setp.lt.and.s32 %p|%q, %a, 20, %c; setp.lt.xor.s32 %r|%s, %a, 20, !%c; "
        "setp.lt.or.s32 %t, %a, 5, %c;"
    )
    got = run(body, {"a": a}, dict.fromkeys("pqrst", bool), registers=".reg .pred %c;")
    for x in range(32):
        less, c = x < 20, x > 9
        assert got["p"][x] == (less and c) and got["q"][x] == (not less and c)
        assert got["r"][x] == (less != (not c)) and got["s"][x] == ((not less) != (not c))
        assert got["t"][x] == (x < 5 or c)


def test_selections() -> None:
    a, b = np.arange(32, dtype=np.uint32), np.arange(100, 132, dtype=np.uint32)
    body = (
        "setp.lt.u32 %p, %a, 7; selp.b32 %d, %a, %b, %p; selp.f32 %e, 0f3F800000, 0f00000000, %p; "
        "slct.b32.s32 %f, %a, %b, %s;"
    )
    s = np.array([-1, 0, 1, -5] * 8, np.int32)
    got = run(
        body, {"a": a, "b": b, "s": s}, {"d": np.uint32, "e": np.float32, "f": np.uint32}, registers=".reg .pred %p;"
    )
    assert got["d"].tolist() == [x if x < 7 else x + 100 for x in range(32)]
    assert got["e"].tolist() == [float(x < 7) for x in range(32)]
    assert got["f"].tolist() == [x if s[x] >= 0 else x + 100 for x in range(32)]


def test_words_and_their_parts_are_little_endian() -> None:
    a = RANDOM.integers(0, 1 << 64, 32, dtype=np.uint64)
    body = """
    mov.b64 {%l, %h}, %a; mov.b32 {%x, %y}, %l; mov.b32 %d, {%y, %x}; mov.b64 %e, {%h, %l};
    cvt.u32.u16 %f, %x;
    """
    got = run(
        body,
        {"a": a},
        {"d": np.uint32, "e": np.uint64, "f": np.uint32},
        registers=".reg .b32 %l, %h; .reg .b16 %x, %y;",
    )
    for n, v in enumerate(a.tolist()):
        low, high = v & 0xFFFFFFFF, v >> 32
        assert got["d"][n] == (low & 0xFFFF) << 16 | low >> 16
        assert got["e"][n] == low << 32 | high and got["f"][n] == low & 0xFFFF


def pick(a: int, b: int, which: int) -> int:
    return (a >> 8 * which if which < 4 else b >> 8 * (which - 4)) & 255


def test_permuting_bytes() -> None:
    a, b = (RANDOM.integers(0, 1 << 32, 32, dtype=np.uint32) for _ in range(2))
    control = RANDOM.integers(0, 1 << 16, 32, dtype=np.uint32)
    got = run("prmt.b32 %d, %a, %b, %c;", {"a": a, "b": b, "c": control}, {"d": np.uint32})["d"]
    for x, y, c, d in zip(*(v.tolist() for v in (a, b, control, got)), strict=True):
        for i in range(4):
            nibble = c >> 4 * i & 15
            byte = pick(x, y, nibble & 7)
            if nibble & 8:
                byte = 255 if byte & 128 else 0
            assert d >> 8 * i & 255 == byte


@pytest.mark.parametrize(
    ("mode", "table"),
    [
        ("f4e", ["3210", "4321", "5432", "6543"]),
        ("b4e", ["5670", "6701", "7012", "0123"]),
        ("rc8", ["0000", "1111", "2222", "3333"]),
        ("ecl", ["3210", "3211", "3222", "3333"]),
        ("ecr", ["0000", "1110", "2210", "3210"]),
        ("rc16", ["1010", "3232", "1010", "3232"]),
    ],
)
def test_modes_of_permuting_bytes(mode: str, table: list[str]) -> None:
    """The tables of PTX ISA 9.7.9.7: the byte of each place, highest first, for each value of the control."""
    a, b = (RANDOM.integers(0, 1 << 32, 32, dtype=np.uint32) for _ in range(2))
    control = np.arange(32, dtype=np.uint32)
    got = run(f"prmt.b32.{mode} %d, %a, %b, %c;", {"a": a, "b": b, "c": control}, {"d": np.uint32})["d"]
    for n in range(32):
        bytes_ = [pick(int(a[n]), int(b[n]), int(which)) for which in reversed(table[n & 3])]
        assert got[n] == sum(byte << 8 * i for i, byte in enumerate(bytes_))
