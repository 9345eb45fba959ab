"""Floating-point opcodes against exact fractions, decimals and torch."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch

from tests.kernels.triton.ptx.opcodes.programs import run

pytestmark = pytest.mark.representative

RANDOM = np.random.default_rng(11)
F4 = np.float32
#: What rules are about: zeros, subnormals, the ends, infinities, NaN.
SPECIAL = [0.0, -0.0, 1e-40, -1e-40, 2.0**-126, 3.4e38, -3.4e38, np.inf, -np.inf, np.nan, 1.0, -1.0, 0.5, 2.0**-149]


def floats(n: int = 32) -> np.ndarray[Any, Any]:
    rest = RANDOM.normal(size=n - len(SPECIAL)) * np.exp(4 * RANDOM.normal(size=n - len(SPECIAL)))
    return RANDOM.permutation(np.concatenate([SPECIAL, rest])).astype(F4)


def same(x: np.ndarray[Any, Any], y: np.ndarray[Any, Any]) -> bool:
    """Equal bit for bit, NaNs of any kind alike."""
    nan = np.isnan(x) & np.isnan(y)
    unsigned = f"u{x.dtype.itemsize}"
    return bool((nan | (x.view(unsigned) == y.astype(x.dtype).view(unsigned))).all())


def nearest(value: Fraction) -> np.float32:
    """float32 nearest to a fraction, even on a tie; by search between neighbours, not by way of float64."""
    guess = F4(float(value))
    best = min(
        (np.nextafter(guess, F4(-np.inf)), guess, np.nextafter(guess, F4(np.inf))),
        key=lambda f: (abs(Fraction(float(f)) - value), int(f.view(np.uint32)) & 1),
    )
    return F4(best)


def test_arithmetic() -> None:
    a, b = floats(), floats()
    body = (
        "add.f32 %d, %a, %b; sub.rn.f32 %e, %a, %b; mul.f32 %f, %a, %b; div.rn.f32 %g, %a, %b; add.sat.f32 %h, %a, %b;"
    )
    got = run(body, {"a": a, "b": b}, dict.fromkeys("defgh", F4))
    x, y = torch.from_numpy(a), torch.from_numpy(b)
    for name, wanted in {"d": x + y, "e": x - y, "f": x * y, "g": x / y}.items():
        assert same(got[name], wanted.numpy()), name
    assert same(got["h"], torch.nan_to_num(x + y, nan=0.0, posinf=1.0, neginf=0.0).clamp(0, 1).numpy() + F4(0))


def test_subnormal_numbers_are_flushed() -> None:
    a = np.array([1e-40, -1e-40, 2.0**-126, 1.0] * 8, F4)
    b = np.array([1.0, 1.0, 0.5, 2.0] * 8, F4)
    body = """
    mul.ftz.f32 %d, %a, %b; mul.f32 %e, %a, %b; add.ftz.f32 %f, %a, %a; ex2.approx.ftz.f32 %g, %a;
    rcp.approx.ftz.f32 %h, %a; setp.eq.ftz.f32 %p, %a, 0f00000000; setp.eq.f32 %q, %a, 0f00000000;
    lg2.approx.ftz.f32 %i, %a;
    """
    got = run(body, {"a": a, "b": b}, dict.fromkeys("defghi", F4) | {"p": bool, "q": bool})
    assert same(got["d"][:4], np.array([0.0, -0.0, 0.0, 2.0], F4))
    assert same(got["e"][:4], a[:4] * b[:4])
    assert same(got["f"][:4], np.array([0.0, -0.0, 2.0**-125, 2.0], F4))
    assert same(got["g"][:4], np.array([1.0, 1.0, 1.0, 2.0], F4))
    assert same(got["h"][:4], np.array([np.inf, -np.inf, 2.0**126, 1.0], F4))
    assert same(got["i"][:4], np.array([-np.inf, -np.inf, -126.0, 0.0], F4))
    assert got["p"][:4].tolist() == [True, True, False, False] and not got["q"].any()


def test_multiply_add_is_rounded_once() -> None:
    a = np.full(32, 1 + 2.0**-12, F4)
    # a * a = 1 + 2^-11 + 2^-24: with the third number the sum lies beside the middle of two float32
    c = np.array([2.0**-80, -(2.0**-80), 0.0, 2.0**-40] * 8, F4)
    x, y, z = (RANDOM.normal(size=32).astype(F4) for _ in range(3))
    z = np.where(RANDOM.random(32) < 0.5, -(x * y), z).astype(F4)
    body = "fma.rn.f32 %d, %a, %a, %c; fma.rn.f32 %e, %x, %y, %z; fma.rn.f32 %f, %x, %t, %s;"
    small, tiny = np.full(32, 2.0**-100, F4), np.full(32, 2.0**-149, F4)
    got = run(body, {"a": a, "c": c, "x": x, "y": y, "z": z, "t": small, "s": tiny}, dict.fromkeys("def", F4))
    for i in range(32):
        assert got["d"][i] == nearest(Fraction(float(a[i])) ** 2 + Fraction(float(c[i])))
        assert got["e"][i] == nearest(Fraction(float(x[i])) * Fraction(float(y[i])) + Fraction(float(z[i])))
        assert got["f"][i] == nearest(Fraction(float(x[i])) * Fraction(2) ** -100 + Fraction(2) ** -149)


def test_pairs() -> None:
    a, b, c = (np.stack([floats(), floats()], 1) for _ in range(3))
    body = "add.f32x2 %d, %a, %b; mul.f32x2 %e, %a, %b; fma.rn.f32x2 %f, %a, %b, %c; sub.f32x2 %g, %a, %b;"
    words = {n: v.view(np.uint64).ravel() for n, v in zip("abc", (a, b, c), strict=True)}
    got = run(body, words, dict.fromkeys("defg", np.uint64), target="sm_100a")
    with np.errstate(all="ignore"):
        exact = (a.astype(np.float64) * b + c).astype(F4)  # differs from one rounding with probability 2^-29
        for name, wanted in {"d": a + b, "e": a * b, "f": exact, "g": a - b}.items():
            assert same(got[name].view(F4).reshape(32, 2), wanted), name


@pytest.mark.parametrize("nan", ["", ".NaN"])
def test_minimum_and_maximum(nan: str) -> None:
    a, b = (
        v.ravel().astype(F4) for v in np.meshgrid([np.nan, 0.0, -0.0, 1.0, -np.inf], [np.nan, 0.0, -0.0, 2.0, np.inf])
    )
    a, b = np.pad(a, (0, 7)), np.pad(b, (0, 7))
    got = run(f"min{nan}.f32 %d, %a, %b; max{nan}.f32 %e, %a, %b;", {"a": a, "b": b}, {"d": F4, "e": F4})
    for x, y, low, high in zip(a, b, got["d"], got["e"], strict=True):
        if np.isnan(x) or np.isnan(y):
            wanted = np.nan if nan or (np.isnan(x) and np.isnan(y)) else (y if np.isnan(x) else x)
            assert same(np.array([low, high]), np.array([wanted, wanted], F4))
        else:  # -0 is below +0
            order = sorted((x, y), key=lambda v: (float(v), not np.signbit(v)))
            assert same(np.array([low, high]), np.array(order, F4))


def test_three_operands_of_a_maximum() -> None:
    a, b, c = (RANDOM.normal(size=32).astype(F4) for _ in range(3))
    got = run("max.f32 %d, %a, %b, %c;", {"a": a, "b": b, "c": c}, {"d": F4}, target="sm_100a")["d"]
    assert got.tolist() == [max(v) for v in zip(a.tolist(), b.tolist(), c.tolist(), strict=True)]


def test_functions() -> None:
    a = np.abs(RANDOM.normal(size=32)).astype(F4) + F4(0.1)
    body = """
    ex2.approx.f32 %d, %a; lg2.approx.f32 %e, %a; rcp.rn.f32 %f, %a; sqrt.rn.f32 %g, %a; rsqrt.approx.f32 %h, %a;
    sin.approx.f32 %i, %a; cos.approx.f32 %j, %a; tanh.approx.f32 %k, %a;
    div.full.f32 %l, %a, %b; div.approx.f32 %m, %a, %b;
    """
    b = RANDOM.normal(size=32).astype(F4)
    got = run(body, {"a": a, "b": b}, dict.fromkeys("defghijklm", F4))
    x, y = torch.from_numpy(a).double(), torch.from_numpy(b).double()
    wanted = {"d": x.exp2(), "e": x.log2(), "f": 1 / x, "g": x.sqrt(), "h": x.rsqrt(), "i": x.sin(), "j": x.cos()}
    for name, value in (wanted | {"k": x.tanh(), "l": x / y, "m": x / y}).items():
        assert np.allclose(got[name], value.numpy(), rtol=2.0**-22, atol=2.0**-24), name


def test_sign_in_both_widths() -> None:
    a, b = floats(), floats()
    body = (
        "abs.f32 %d, %a; neg.f32 %e, %a; copysign.f32 %f, %a, %b; cvt.f64.f32 %w, %a; neg.f64 %g, %w; "
        "mul.f64 %h, %w, %w;"
    )
    got = run(
        body, {"a": a, "b": b}, dict.fromkeys("def", F4) | dict.fromkeys("gh", np.float64), registers=".reg .b64 %w;"
    )
    assert same(got["d"], np.abs(a)) and same(got["e"], -a)
    assert same(got["f"], torch.copysign(torch.from_numpy(b), torch.from_numpy(a)).numpy())
    assert same(got["g"], -a.astype(np.float64)) and same(got["h"], a.astype(np.float64) ** 2)


@pytest.mark.parametrize("kind", ["f16", "bf16"])
def test_half_precision(kind: str) -> None:
    dtype = {"f16": torch.float16, "bf16": torch.bfloat16}[kind]
    a, b, c = (torch.from_numpy(np.clip(floats(64), -6e4, 6e4)).to(dtype) for _ in range(3))
    body = f"""
    add.rn.{kind}x2 %d, %a, %b; sub.rn.{kind}x2 %e, %a, %b; mul.rn.{kind}x2 %f, %a, %b; neg.{kind}x2 %g, %a;
    abs.{kind}x2 %h, %a; fma.rn.{kind}x2 %i, %a, %b, %c; fma.rn.relu.{kind}x2 %j, %a, %b, %c;
    max.NaN.{kind}x2 %k, %a, %b; min.{kind}x2 %l, %a, %b;
    """
    words = {n: v.view(torch.int32).numpy().view(np.uint32) for n, v in zip("abc", (a, b, c), strict=True)}
    got = run(body, words, dict.fromkeys("defghijkl", np.uint32))
    x, y, z = a.double(), b.double(), c.double()
    # the exact multiply-add from fractions, rounded once by way of a float64 with sticky bits
    exact = [_odd(p, q, r) for p, q, r in zip(x.tolist(), y.tolist(), z.tolist(), strict=True)]
    fma = torch.tensor(exact, dtype=torch.float64)
    wanted = {
        "d": x + y,
        "e": x - y,
        "f": x * y,
        "g": -x,
        "h": x.abs(),
        "i": fma,
        "j": torch.where(fma > 0, fma, torch.where(fma.isnan(), fma, 0)),
        "k": torch.maximum(x, y),
        "l": torch.fmin(x, y),
    }
    for name, value in wanted.items():
        found = torch.from_numpy(got[name].view(np.int32)).view(dtype).double()
        expected = _rounded(value, kind)
        assert ((found == expected) | (found.isnan() & expected.isnan())).all(), name


def _odd(x: float, y: float, z: float) -> float:
    """``x * y + z`` in float64; if it is not exact, away from even."""
    if not all(map(np.isfinite, (x, y, z))):
        return x * y + z
    exact = Fraction(x) * Fraction(y) + Fraction(z)
    near = float(exact)
    if Fraction(near) == exact or int(np.float64(near).view(np.uint64)) & 1:
        return near
    return float(np.nextafter(near, np.inf if exact > Fraction(near) else -np.inf))


def _rounded(values: torch.Tensor, kind: str) -> torch.Tensor:
    """Nearest numbers of a format, by search in the list of all of them."""
    dtype = {"f16": torch.float16, "bf16": torch.bfloat16}[kind]
    every = torch.arange(1 << 15, dtype=torch.int32).to(torch.int16).view(dtype).double()
    finite = every[every.isfinite()]
    top = float(finite[-1] + (finite[-1] - finite[-2]) / 2)
    out = []
    for v in values.tolist():
        if not np.isfinite(v):
            out.append(v)
        elif abs(v) >= top:
            out.append(np.copysign(np.inf, v))
        else:
            i = int(torch.searchsorted(finite, abs(v)))
            near = [
                (abs(float(finite[j]) - abs(v)), j & 1, float(finite[j])) for j in (i - 1, i) if 0 <= j < len(finite)
            ]
            out.append(np.copysign(min(near)[2], v))
    return torch.tensor(out, dtype=torch.float64)
