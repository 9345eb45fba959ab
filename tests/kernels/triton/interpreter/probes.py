"""Small kernels, most of which the stock interpreter gets wrong, beside what they have to give.

``python -m tests.kernels.triton.interpreter.probes`` runs them on the interpreter as Triton ships it and prints, as
JSON, which of them are right. ``test_repair.py`` runs them on the repaired one.
"""

from __future__ import annotations

import json
from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

SIZE = 256


@triton.jit
def _cast(x, y, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(y + i, tl.load(x + i).to(y.dtype.element_ty))


@triton.jit
def _arithmetic(x, y, sums, products, largest, N: tl.constexpr):
    i = tl.arange(0, N)
    a, b = tl.load(x + i), tl.load(y + i)
    tl.store(sums + i, a + b)
    tl.store(products + i, -a * b)
    tl.store(largest + i, tl.where(a > b, a, b))


@triton.jit
def _product(x, y, z, N: tl.constexpr, K: tl.constexpr, KIND: tl.constexpr):
    rows, inner = tl.arange(0, N), tl.arange(0, K)
    a = tl.load(x + rows[:, None] * K + inner)
    b = tl.load(y + inner[:, None] * N + rows)
    tl.store(z + rows[:, None] * N + rows, tl.dot(a, b, out_dtype=KIND))


@triton.jit
def _reduction(x, y, N: tl.constexpr):
    a = tl.load(x + tl.arange(0, N))
    tl.store(y, tl.sum(a, 0))
    tl.store(y + 1, tl.max(a, 0))


@triton.jit
def _constant(y, N: tl.constexpr):
    tl.store(y + tl.arange(0, N), tl.full([N], 1.5, y.dtype.element_ty))


@triton.jit
def _loop(count, y):
    total = 0
    for i in range(tl.load(count)):
        total += i
    tl.store(y, total)


def _numbers(*shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape))) * scale).to(dtype)


def _casting(source: Tensor, target: torch.dtype) -> bool:
    got = torch.empty(len(source), dtype=target)
    _cast[(1,)](source, got, len(source))
    expected = source.float().clamp(-448, 448).to(target) if target == torch.float8_e4m3fn else source.to(target)
    return torch.equal(got.float().nan_to_num(1e9), expected.float().nan_to_num(1e9))


def cast_to_bf16() -> bool:
    """Rounds to nearest even, ties included; NaN stays NaN."""
    ties = (torch.arange(SIZE // 2, dtype=torch.int32) + 0x3F80_0000 + 0x8000).view(torch.float32)
    source = torch.cat([_numbers(SIZE // 2 - 1), torch.tensor([float("nan")]), ties])
    return _casting(source, torch.bfloat16)


def cast_to_e4m3() -> bool:
    """Rounds to nearest even, subnormals too; what is too large becomes 448; NaN stays NaN."""
    special = torch.tensor([float("nan"), 1e9, -1e9, 449.0, 2**-9, 1.5 * 2**-9, 2.5 * 2**-9, 0.0])
    return _casting(torch.cat([_numbers(SIZE - 8, scale=40.0), special]), torch.float8_e4m3fn)


def cast_from_e4m3() -> bool:
    """All 256 bit patterns have their values."""
    return _casting(torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn), torch.float32)


def arithmetic_in_bf16() -> bool:
    """Sums, negation, products, comparison: each rounded once."""
    a, b = _numbers(SIZE, dtype=torch.bfloat16), _numbers(2, SIZE, dtype=torch.bfloat16)[1].contiguous()
    got = [torch.empty_like(a) for _ in range(3)]
    _arithmetic[(1,)](a, b, *got, SIZE)
    return all(torch.equal(x, y) for x, y in zip(got, [a + b, -a * b, torch.maximum(a, b)], strict=True))


def _dot(dtype: torch.dtype, *, kind: tl.dtype = tl.float32) -> bool:
    n, k = 32, 64
    a, b = _numbers(n, k, scale=3.0).to(dtype), _numbers(k, n, scale=3.0).to(dtype)
    got = torch.full((n, n), -(2**30), dtype=torch.int32 if kind == tl.int32 else torch.float32)
    _product[(1,)](a, b, got, n, k, kind)
    exact = a.double() @ b.double()
    # float32 accumulation: k additions of terms whose absolute values sum to at most |a| |b|
    bound = k * 2**-24 * (a.double().abs() @ b.double().abs())
    return bool(((got.double() - exact).abs() <= bound).all())


def dot_of_bf16() -> bool:
    """Products of bf16 matrices."""
    return _dot(torch.bfloat16)


def dot_of_e4m3() -> bool:
    """Products of fp8 matrices; right in the stock interpreter too."""
    return _dot(torch.float8_e4m3fn)


def dot_of_int8() -> bool:
    """Products of int8 matrices; right in the stock interpreter too, only slow."""
    return _dot(torch.int8, kind=tl.int32)


def reduce_bf16() -> bool:
    """Sum (in float32, rounded once) and maximum."""
    a = _numbers(SIZE, dtype=torch.bfloat16)
    got = torch.empty(2, dtype=torch.bfloat16)
    _reduction[(1,)](a, got, SIZE)
    # summed in float32 and rounded once: half a unit in the last place, and float32's error of the sum
    bound = 2**-8 * a.double().sum().abs() + SIZE * 2**-24 * a.double().abs().sum()
    return bool((got[0].double() - a.double().sum()).abs() <= bound) and bool(got[1] == a.max())


def constant_in_bf16() -> bool:
    """A tensor full of one bf16 value."""
    got = torch.empty(SIZE, dtype=torch.bfloat16)
    _constant[(1,)](got, SIZE)
    return bool((got == 1.5).all())


def loop_to_loaded_bound() -> bool:
    """A loop whose length was loaded."""
    got = torch.empty(1, dtype=torch.int32)
    _loop[(1,)](torch.tensor([10], dtype=torch.int32), got)
    return int(got) == 45


PROBES: tuple[Callable[[], bool], ...] = (
    cast_to_bf16,
    cast_to_e4m3,
    cast_from_e4m3,
    arithmetic_in_bf16,
    dot_of_bf16,
    dot_of_e4m3,
    dot_of_int8,
    reduce_bf16,
    constant_in_bf16,
    loop_to_loaded_bound,
)


def stock_results() -> dict[str, str]:
    """What each probe gives without any repair: ``right``, ``wrong`` or the error's name."""
    results = {}
    for probe in PROBES:
        try:
            results[probe.__name__] = "right" if probe() else "wrong"
        except Exception as error:  # noqa: BLE001  # whatever the stock interpreter raises is the finding
            results[probe.__name__] = type(error).__name__
    return results


if __name__ == "__main__":
    print(json.dumps(stock_results()))
