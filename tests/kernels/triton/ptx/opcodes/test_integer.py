"""Integer opcodes against Python's integers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from tests.kernels.triton.ptx.opcodes.programs import run

pytestmark = pytest.mark.representative

TYPES = {"u16": np.uint16, "s16": np.int16, "u32": np.uint32, "s32": np.int32, "u64": np.uint64, "s64": np.int64}
RANDOM = np.random.default_rng(7)


def numbers(kind: type, *, zero: bool = True) -> np.ndarray[Any, Any]:
    """The ends of the range, small numbers and random ones."""
    info = np.iinfo(kind)
    edge = [info.min, info.max, info.max - 1, info.max // 2 + 1, 1, 2, 3, 7, *([0] if zero else [5])]
    edge += [-1, -2, -7] if info.min else []
    rest = RANDOM.integers(info.min, info.max, 32 - len(edge), dtype=kind)
    out = np.concatenate([np.array(edge, kind), rest])
    return RANDOM.permutation(out if zero else np.where(out == 0, kind(9), out))


def wrapped(value: int, kind: type) -> int:
    bits = 8 * np.dtype(kind).itemsize
    value &= (1 << bits) - 1
    return value - (1 << bits) if np.iinfo(kind).min and value >> (bits - 1) else value


def towards_zero(x: int, y: int) -> int:
    return abs(x) // abs(y) * (1 if (x < 0) == (y < 0) else -1)


BINARY: dict[str, Callable[[int, int], int]] = {
    "add": lambda x, y: x + y,
    "sub": lambda x, y: x - y,
    "mul.lo": lambda x, y: x * y,
    "min": min,
    "max": max,
    "div": towards_zero,
    "rem": lambda x, y: x - y * towards_zero(x, y),
}


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("op", BINARY)
def test_two_numbers(op: str, kind: str) -> None:
    t = TYPES[kind]
    a, b = numbers(t), numbers(t, zero=op not in ("div", "rem"))
    if op in ("div", "rem") and np.iinfo(t).min:
        b = np.where(b == -1, t(3), b)  # the smallest number by -1 has no quotient
    got = run(f"{op}.{kind} %d, %a, %b;", {"a": a, "b": b}, {"d": t})["d"]
    assert got.tolist() == [wrapped(BINARY[op](x, y), t) for x, y in zip(a.tolist(), b.tolist(), strict=True)]


@pytest.mark.parametrize("kind", TYPES)
def test_upper_half_of_a_product(kind: str) -> None:
    t, bits = TYPES[kind], 8 * np.dtype(TYPES[kind]).itemsize
    a, b, c = numbers(t), numbers(t), numbers(t)
    got = run(f"mul.hi.{kind} %d, %a, %b; mad.hi.{kind} %e, %a, %b, %c;", {"a": a, "b": b, "c": c}, {"d": t, "e": t})
    for x, y, z, d, e in zip(*(v.tolist() for v in (a, b, c, got["d"], got["e"])), strict=True):
        assert d == x * y >> bits
        assert e == wrapped((x * y >> bits) + z, t)


@pytest.mark.parametrize("kind", ["u16", "s16", "u32", "s32"])
def test_wide_product(kind: str) -> None:
    t, wide = TYPES[kind], TYPES[{"u16": "u32", "s16": "s32", "u32": "u64", "s32": "s64"}[kind]]
    a, b, c = numbers(t), numbers(t), numbers(wide)
    body = f"mul.wide.{kind} %d, %a, %b; mad.wide.{kind} %e, %a, %b, %c;"
    got = run(body, {"a": a, "b": b, "c": c}, {"d": wide, "e": wide})
    assert got["d"].tolist() == [x * y for x, y in zip(a.tolist(), b.tolist(), strict=True)]
    sums = zip(a.tolist(), b.tolist(), c.tolist(), strict=True)
    assert got["e"].tolist() == [wrapped(x * y + z, wide) for x, y, z in sums]


def test_lower_multiply_add_and_saturation() -> None:
    a, b, c = numbers(np.int32), numbers(np.int32), numbers(np.int32)
    body = "mad.lo.s32 %d, %a, %b, %c; add.sat.s32 %e, %a, %b; sub.sat.s32 %f, %a, %b;"
    got = run(body, {"a": a, "b": b, "c": c}, {"d": np.int32, "e": np.int32, "f": np.int32})
    top, bottom = (1 << 31) - 1, -(1 << 31)
    for x, y, z, d, e, f in zip(*(v.tolist() for v in (a, b, c, got["d"], got["e"], got["f"])), strict=True):
        assert (d, e, f) == (wrapped(x * y + z, np.int32), min(max(x + y, bottom), top), min(max(x - y, bottom), top))


@pytest.mark.parametrize("bits", [32, 64])
def test_counting_bits(bits: int) -> None:
    t = TYPES[f"u{bits}"]
    a = numbers(t)
    body = (
        f"popc.b{bits} %d, %a; clz.b{bits} %e, %a; brev.b{bits} %f, %a; bfind.u{bits} %g, %a; "
        f"bfind.s{bits} %h, %a; bfind.shiftamt.u{bits} %i, %a;"
    )
    got = run(body, {"a": a}, {"d": np.uint32, "e": np.uint32, "f": t, "g": np.int32, "h": np.int32, "i": np.int32})
    for n, x in enumerate(a.tolist()):
        text = f"{x:0{bits}b}"
        signed = text if text[0] == "0" else "".join("10"[int(c)] for c in text)
        assert got["d"][n] == text.count("1")
        assert got["e"][n] == (text + "1").index("1")
        assert got["f"][n] == int(text[::-1], 2)
        assert got["g"][n] == (bits - 1 - text.index("1") if x else -1)
        assert got["h"][n] == (bits - 1 - signed.index("1") if "1" in signed else -1)
        assert got["i"][n] == (text.index("1") if x else -1)


def bits_of(x: int, width: int) -> list[int]:
    return [x >> i & 1 for i in range(width)]


@pytest.mark.parametrize("kind", ["u32", "s32", "u64", "s64"])
def test_extracting_bits(kind: str) -> None:
    t, width = TYPES[kind], int(kind[1:])
    a = numbers(t)
    first = RANDOM.integers(0, width + 9, 32).astype(np.uint32) + np.uint32(256)  # only 8 bits of the numbers count
    length = RANDOM.integers(0, width + 9, 32).astype(np.uint32)
    got = run(f"bfe.{kind} %d, %a, %b, %c;", {"a": a, "b": first, "c": length}, {"d": t})["d"]
    for x, p, n, d in zip(a.tolist(), first.tolist(), length.tolist(), got.tolist(), strict=True):
        source, p = bits_of(x, width), p & 255
        fill = 0 if kind[0] == "u" or n == 0 else source[min(p + n - 1, width - 1)]
        wanted = [source[p + i] if i < n and p + i < width else fill for i in range(width)]
        assert bits_of(d, width) == wanted, (x, p, n)


def test_extracting_with_constants() -> None:
    a = numbers(np.int32)
    got = run("bfe.s32 %d, %a, 3, 7; bfe.u32 %e, %a, 28, 4;", {"a": a}, {"d": np.int32, "e": np.uint32})
    assert got["d"].tolist() == [((x >> 3 & 127) ^ 64) - 64 for x in a.tolist()]
    assert got["e"].tolist() == [x >> 28 & 15 for x in a.tolist()]


@pytest.mark.parametrize("width", [32, 64])
def test_inserting_bits(width: int) -> None:
    t = TYPES[f"u{width}"]
    a, b = numbers(t), numbers(t)
    first, length = (RANDOM.integers(0, width + 9, 32).astype(np.uint32) for _ in range(2))
    got = run(f"bfi.b{width} %d, %a, %b, %c, %e;", {"a": a, "b": b, "c": first, "e": length}, {"d": t})["d"]
    for x, y, p, n, d in zip(a.tolist(), b.tolist(), first.tolist(), length.tolist(), got.tolist(), strict=True):
        wanted = bits_of(y, width)
        for i in range(n):
            if p + i < width:
                wanted[p + i] = x >> i & 1
        assert bits_of(d, width) == wanted


def test_every_table_of_lop3() -> None:
    a, b, c = (RANDOM.integers(0, 1 << 32, 32, dtype=np.uint32) for _ in range(3))
    body = "\n".join(f"lop3.b32 %d{i}, %a, %b, %c, {i};" for i in range(256))
    got = run(body, {"a": a, "b": b, "c": c}, {"d": (256, np.uint32)})["d"]
    # the table is what the function gives for these three words
    named = {0xF0 & 0xCC & 0xAA: a & b & c, 0xF0 | 0xCC: a | b, 0xF0 ^ 0xCC ^ 0xAA: a ^ b ^ c, 0xAA: c, 0x0F: ~a}
    for table, wanted in named.items():
        assert (got[table] == wanted).all()
    for table in range(256):
        for lane in (0, 13, 31):
            triples = zip(bits_of(int(a[lane]), 32), bits_of(int(b[lane]), 32), bits_of(int(c[lane]), 32), strict=True)
            assert bits_of(int(got[table, lane]), 32) == [table >> (4 * x + 2 * y + z) & 1 for x, y, z in triples]


def test_logic_on_words_and_predicates() -> None:
    a, b = numbers(np.uint32), numbers(np.uint32)
    body = """
    and.b32 %d, %a, %b; or.b32 %e, %a, %b; xor.b32 %f, %a, %b; not.b32 %g, %a;
    setp.lt.u32 %p, %a, %b; setp.gt.u32 %q, %a, 7; and.pred %r, %p, %q; xor.pred %s, %p, %q; not.pred %t, %p;
    or.pred %u, %p, !%q; mov.pred %v, %r;
    """.replace("or.pred %u, %p, !%q;", "or.pred %u, %p, %q;")
    words = dict.fromkeys("defg", np.uint32)
    got = run(body, {"a": a, "b": b}, words | dict.fromkeys("rstuv", bool), registers=".reg .pred %p, %q;")
    p, q = a < b, a > 7
    for name, wanted in {"d": a & b, "e": a | b, "f": a ^ b, "g": ~a}.items():
        assert (got[name] == wanted).all()
    for name, wanted in {"r": p & q, "s": p != q, "t": ~p, "u": p | q, "v": p & q}.items():
        assert (got[name] == wanted).all()


@pytest.mark.parametrize("kind", ["b16", "b32", "b64", "s16", "s32", "s64", "u16", "u32", "u64"])
def test_shifts(kind: str) -> None:
    width = int(kind[1:])
    t = TYPES[kind.replace("b", "u")]
    a = numbers(t)
    by = np.array([0, 1, width - 1, width, width + 1, 255, 1 << 31, *range(2, 27)], np.uint32)
    got = run(f"shr.{kind} %d, %a, %b; shr.{kind} %f, %a, 5;", {"a": a, "b": by}, {"d": t, "f": t})
    assert got["d"].tolist() == [x >> n for x, n in zip(a.tolist(), by.tolist(), strict=True)]
    assert got["f"].tolist() == [x >> 5 for x in a.tolist()]
    if kind[0] == "b":
        left = run(f"shl.{kind} %d, %a, %b;", {"a": a, "b": by}, {"d": t})["d"]
        wanted = [x << min(n, 99) & (1 << width) - 1 for x, n in zip(a.tolist(), by.tolist(), strict=True)]
        assert left.tolist() == wanted


@pytest.mark.parametrize("mode", ["clamp", "wrap"])
def test_funnel_shifts(mode: str) -> None:
    a, b = numbers(np.uint32), numbers(np.uint32)
    by = np.array([0, 1, 31, 32, 33, 63, 64, 255, *range(2, 26)], np.uint32)
    body = f"shf.l.{mode}.b32 %d, %a, %b, %c; shf.r.{mode}.b32 %e, %a, %b, %c;"
    got = run(body, {"a": a, "b": b, "c": by}, {"d": np.uint32, "e": np.uint32})
    for x, y, n, d, e in zip(*(v.tolist() for v in (a, b, by, got["d"], got["e"])), strict=True):
        n = min(n, 32) if mode == "clamp" else n % 32
        assert d == (y << n | x >> (32 - n)) & 0xFFFFFFFF
        assert e == (x >> n | y << (32 - n)) & 0xFFFFFFFF


def test_sign() -> None:
    a = numbers(np.int32)
    got = run("abs.s32 %d, %a; neg.s32 %e, %a;", {"a": a}, {"d": np.int32, "e": np.int32})
    assert got["d"].tolist() == [wrapped(abs(x), np.int32) for x in a.tolist()]
    assert got["e"].tolist() == [wrapped(-x, np.int32) for x in a.tolist()]
