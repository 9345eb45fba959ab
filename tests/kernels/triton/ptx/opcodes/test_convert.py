"""Conversions against torch and against a search among all numbers of a format."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from tests.kernels.triton.ptx.opcodes.programs import run

pytestmark = pytest.mark.representative

RANDOM = np.random.default_rng(5)
F4 = np.float32
Array = np.ndarray[Any, Any]

#: All non-negative finite numbers of an 8-bit format, from their definition.
E4M3 = [(m / 8 * 2.0**-6 if e == 0 else (1 + m / 8) * 2.0 ** (e - 7)) for e in range(16) for m in range(8)][:127]
E5M2 = [(m / 4 * 2.0**-14 if e == 0 else (1 + m / 4) * 2.0 ** (e - 15)) for e in range(31) for m in range(4)]
EIGHT = {"e4m3": E4M3, "e5m2": E5M2}


def nearest(x: float, table: list[float]) -> int:
    """The place of the number nearest to ``|x|``, even on a tie, the last one beyond the end."""
    distance = [(abs(v - abs(x)), i & 1, i) for i, v in enumerate(table)]
    return min(distance)[2] if np.isfinite(x) else len(table) - 1


def middles(table: list[float]) -> Array:
    """Numbers, the middles between them, and what is just beside those."""
    t = np.array(table, F4)
    m = ((t[1:].astype(np.float64) + t[:-1]) / 2).astype(F4)
    out = np.concatenate([t, m, np.nextafter(m, F4(np.inf)), np.nextafter(m, F4(0)), -m, -t])
    return np.pad(out, (0, -len(out) % 32))


@pytest.mark.parametrize("kind", EIGHT)
def test_eight_bits_from_float32(kind: str) -> None:
    table = EIGHT[kind]
    values = middles(table)
    extra = np.array([table[-1] * 1.01, 1e9, -1e9, np.inf, -np.inf, np.nan, 1e-9, -1e-9] * 4, F4)
    values = np.concatenate([values, extra])
    rows = values.reshape(-1, 32)
    body = "\n".join(f"cvt.rn.satfinite.{kind}x2.f32 %d{i}, %a{i}, %a{(i + 1) % len(rows)};" for i in range(len(rows)))
    got = run(body, {"a": rows}, {"d": (len(rows), np.uint16)})["d"]
    for i, row in enumerate(rows):
        for lane, x in enumerate(row.tolist()):
            high, low = int(got[i, lane]) >> 8, int(got[i - 1, lane]) & 255
            assert high == low or np.isnan(x)
            if np.isnan(x):
                assert high & 127 >= 0x7D if kind == "e5m2" else high & 127 == 0x7F
            else:
                assert high == nearest(x, table) | (128 if np.signbit(x) else 0), x


@pytest.mark.parametrize("kind", EIGHT)
def test_eight_bits_from_and_to_float16(kind: str) -> None:
    halves = np.concatenate([middles(EIGHT[kind])[: 32 * 8], RANDOM.normal(size=256) * 30]).astype(np.float16)
    words = halves.reshape(-1, 32, 2).copy().view(np.uint32)[:, :, 0]
    n = len(words)
    body = "\n".join(
        f"cvt.rn.satfinite.{kind}x2.f16x2 %d{i}, %a{i}; cvt.rn.f16x2.{kind}x2 %e{i}, %d{i};" for i in range(n)
    )
    got = run(body, {"a": words}, {"d": (n, np.uint16), "e": (n, np.uint32)}, target="sm_89")
    bits = got["d"].reshape(n, 32, 1).view(np.uint8)
    back = got["e"].reshape(n, 32, 1).view(np.float16)
    for x, b, y in zip(halves.tolist(), bits.ravel().tolist(), back.ravel().tolist(), strict=True):
        place = nearest(x, EIGHT[kind])
        assert b == place | (128 if np.signbit(x) else 0)
        assert abs(y) == EIGHT[kind][place] and np.signbit(y) == np.signbit(x)


def test_float32_to_e4m3_by_way_of_float16() -> None:
    """What Triton does for sm_89: first towards zero to float16, which moves some numbers onto a tie."""
    values = np.array([1.0625 + 2.0**-12, 1.0625, 1.0625 - 2.0**-12, 1.1875 + 2.0**-13] * 8, F4)
    body = "cvt.rz.f16.f32 %h, %a; mov.b32 %w, {%h, %h}; cvt.rn.satfinite.e4m3x2.f16x2 %d, %w;"
    got = run(body, {"a": values}, {"d": np.uint16}, registers=".reg .b16 %h; .reg .b32 %w;", target="sm_89")["d"]
    # 1.0625 lies between 1 and 1.125, 1.1875 between 1.125 and 1.25
    assert got[:4].tolist() == [b * 257 for b in (0x38, 0x38, 0x38, 0x3A)]


@pytest.mark.parametrize("mode", ["rn", "rz"])
@pytest.mark.parametrize("kind", ["f16", "bf16"])
def test_half_precision(kind: str, mode: str) -> None:
    dtype = {"f16": torch.float16, "bf16": torch.bfloat16}[kind]
    bits = RANDOM.integers(0, 1 << 32, (64, 32), dtype=np.uint64).astype(np.uint32)
    bits[0] = [
        0,
        1,
        0x80000000,
        0x7F800000,
        0xFF800000,
        0x7FC00001,
        0x00008000,
        0x477FEFFF,
        0x477FF000,
        0x7F7FFFFF,
        *range(22),
    ]
    bits[1:20] &= 0xFFFF8000 if kind == "bf16" else 0xFFFFF000  # ties
    bits[20:50] = (bits[20:50] & 0x8FFFFFFF) | 0x38000000  # of usual size
    body = "\n".join(f"cvt.{mode}.{kind}.f32 %d{i}, %a{i}; cvt.f32.{kind} %e{i}, %d{i};" for i in range(64))
    pair = f"cvt.{mode}.{kind}x2.f32 %p, %a1, %a2;"
    got = run(body + pair, {"a": bits}, {"d": (64, np.uint16), "e": (64, np.uint32), "p": np.uint32})
    x = torch.from_numpy(bits.view(np.int32)).view(torch.float32)
    found = torch.from_numpy(got["d"].view(np.int16)).view(dtype)
    wanted = x.to(dtype)
    if mode == "rz":
        large = wanted.float().abs() > x.abs()
        wanted = torch.where(large, (wanted.view(torch.int16) - 1).view(dtype), wanted)
    equal = (found == wanted) & (found.signbit() == wanted.signbit())
    assert (equal | (found.isnan() & wanted.isnan())).all()
    back = torch.from_numpy(got["e"].view(np.int32)).view(torch.float32)
    assert ((back == found.float()) | back.isnan()).all()
    assert (got["p"] == (got["d"][1].astype(np.uint32) << 16 | got["d"][2])).all()


def test_tf32() -> None:
    bits = RANDOM.integers(0, 1 << 32, (8, 32), dtype=np.uint64).astype(np.uint32) & 0xBFFFFFFF
    bits[0] = (bits[0] & 0xFFFFE000) | 0x1000  # ties
    body = "\n".join(f"cvt.rna.tf32.f32 %d{i}, %a{i}; cvt.rn.tf32.f32 %e{i}, %a{i};" for i in range(8))
    got = run(body, {"a": bits}, {"d": (8, np.uint32), "e": (8, np.uint32)})
    for x, d, e in zip(bits.ravel().tolist(), got["d"].ravel().tolist(), got["e"].ravel().tolist(), strict=True):
        away = (x & 0x7FFFFFFF) + 0x1000 >> 13 << 13
        low = x & 0x1FFF
        even = (x & 0x7FFFFFFF) >> 13
        even += low > 0x1000 or (low == 0x1000 and even & 1)
        assert d == away | x & 0x80000000
        assert e == even << 13 | x & 0x80000000


WHOLE = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}


@pytest.mark.parametrize("mode", WHOLE)
@pytest.mark.parametrize("kind", ["s8", "u8", "s16", "u16", "s32", "u32", "s64", "u64"])
def test_float_to_integer(kind: str, mode: str) -> None:
    special = [
        0.5,
        1.5,
        -0.5,
        -1.5,
        2.5,
        np.nan,
        np.inf,
        -np.inf,
        3e9,
        -3e9,
        1e20,
        -1e20,
        127.5,
        -128.5,
        65535.5,
        1e-40,
    ]
    x = np.concatenate([special, RANDOM.normal(size=16) * 1000]).astype(F4)
    bits = int(kind[1:])
    t = np.dtype(f"{'i' if kind[0] == 's' else 'u'}{max(bits, 16) // 8}")
    got = run(f"cvt.{mode}.{kind}.f32 %d, %a;", {"a": x}, {"d": t})["d"]
    low, high = (-(1 << bits - 1), (1 << bits - 1) - 1) if kind[0] == "s" else (0, (1 << bits) - 1)
    for v, d in zip(x.tolist(), got.tolist(), strict=True):
        if np.isnan(v):
            wanted = 0
        elif np.isinf(v):
            wanted = high if v > 0 else low
        else:
            wanted = min(max(int(WHOLE[mode](v)), low), high)
        assert d == wanted, v


@pytest.mark.parametrize("of", ["s32", "u32", "s64", "u64", "s16", "u16"])
def test_integer_to_float(of: str) -> None:
    t = np.dtype(f"{'i' if of[0] == 's' else 'u'}{int(of[1:]) // 8}")
    info = np.iinfo(t)
    ends = np.array([info.min, info.max, 0, 1, info.max // 2], t)
    x = np.concatenate([ends, RANDOM.integers(info.min, info.max, 27, dtype=t)])
    got = run(f"cvt.rn.f32.{of} %d, %a; cvt.rn.f64.{of} %e, %a;", {"a": x}, {"d": F4, "e": np.float64})
    from tests.kernels.triton.ptx.opcodes.test_floating import nearest as nearest_float

    for v, d, e in zip(x.tolist(), got["d"], got["e"].tolist(), strict=True):
        assert d == nearest_float(v)  # type: ignore[arg-type]
        assert e == float(v)


def test_between_integers() -> None:
    x = RANDOM.integers(-(1 << 31), 1 << 31, 32).astype(np.int32)
    x[:6] = [127, 128, -128, -129, 255, -1]
    body = (
        "cvt.s64.s32 %d, %a; cvt.u64.u32 %e, %a; cvt.u16.u32 %f, %a; cvt.sat.s8.s32 %g, %a; "
        "cvt.sat.u8.s32 %h, %a; cvt.s32.s8 %i, %a;"
    )
    outputs = {"d": np.int64, "e": np.uint64, "f": np.uint16, "g": np.int32, "h": np.uint32, "i": np.int32}
    got = run(body, {"a": x}, outputs)
    for n, v in enumerate(x.tolist()):
        assert got["d"][n] == v and got["e"][n] == v % (1 << 32) and got["f"][n] == v % (1 << 16)
        assert got["g"][n] == min(max(v, -128), 127) and got["h"][n] == min(max(v, 0), 255)
        assert got["i"][n] == (v + 128) % 256 - 128


def test_rounding_to_whole_numbers_keeps_the_format() -> None:
    x = np.array([0.5, 1.5, -0.5, 2.7, -2.7, 1e20, np.inf, -0.0] * 4, F4)
    body = (
        "cvt.rni.f32.f32 %d, %a; cvt.rmi.f32.f32 %e, %a; cvt.rpi.f32.f32 %f, %a; "
        "cvt.rzi.f32.f32 %g, %a; cvt.sat.f32.f32 %h, %a;"
    )
    got = run(body, {"a": x}, dict.fromkeys("defgh", F4))
    t = torch.from_numpy(x)
    for name, wanted in {"d": t.round(), "e": t.floor(), "f": t.ceil(), "g": t.trunc(), "h": t.clamp(0, 1)}.items():
        assert got[name].tolist() == wanted.tolist()
