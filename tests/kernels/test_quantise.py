"""Scales and roundings against scalar code written by hand."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from tests.kernels.helpers import make_layout
from vidaccel.kernels.quantise import quantise, quantise_channels, quantise_weights, row_groups


def e4m3_values() -> list[float]:
    """Every finite non-negative float8_e4m3fn: bias 7, no infinity, 1.111 x 2^8 is NaN."""
    normal = [2.0 ** (e - 7) * (1 + m / 8) for e, m in itertools.product(range(1, 16), range(8))][:-1]
    return [m / 8 * 2.0**-6 for m in range(8)] + normal


def to_e4m3(x: float) -> float:
    """Nearest e4m3 value, ties to the even mantissa; the list alternates even and odd ones."""
    values = e4m3_values()
    index = min(range(len(values)), key=lambda i: (abs(values[i] - abs(x)), i % 2))
    return math.copysign(values[index], x)


def to_int8(x: float) -> int:
    return int(math.copysign(math.floor(abs(x) + 0.5), x))


@pytest.mark.parametrize("granularity", ["tensor", "block", "rows32"])
def test_row_groups(granularity: str) -> None:
    """Groups of 32 rows restart at each block, whatever its length."""
    layout = make_layout((3, 7, 9), (2, 5, 6), text=70, text_first=True)
    want, group = [], 0
    for size in layout.block_sizes.tolist():
        for rank in range(size):
            if granularity == "rows32" and rank and rank % 32 == 0:
                group += 1
            want.append(0 if granularity == "tensor" else group)
        group += 1
    assert row_groups(layout, granularity).tolist() == want  # type: ignore[arg-type]


@pytest.mark.parametrize("number_format", ["int8", "fp8"])
@pytest.mark.parametrize("granularity", ["tensor", "block", "rows32"])
def test_quantise_formula(granularity: str, number_format: str) -> None:
    layout = make_layout((2, 5, 7), (2, 4, 5))
    x = torch.randn(2, layout.tokens, 3) * torch.logspace(-3, 2, layout.tokens)[:, None]
    groups = row_groups(layout, granularity)  # type: ignore[arg-type]
    found = quantise(x, groups, number_format)  # type: ignore[arg-type]
    for n, s, d in itertools.product(range(2), range(0, layout.tokens, 9), range(3)):
        largest = max(abs(float(value)) for value in x[n, groups == groups[s]].reshape(-1))
        if number_format == "int8":
            scale, rounding = largest / 127 + 1e-7, to_int8
        else:
            scale, rounding = largest / 448, to_e4m3
        assert math.isclose(found.scale[n, s, 0].item(), scale, rel_tol=1e-6)
        # the kernel divides by its float32 scale, so a tie must be judged by that one
        assert found.values[n, s, d].item() == rounding(float(x[n, s, d] / found.scale[n, s, 0]))
    assert found.values.dtype == (torch.int8 if number_format == "int8" else torch.float8_e4m3fn)


def test_int8_rounds_half_away_from_zero() -> None:
    """Ties: 2.5 goes to 3 and -2.5 to -3, where rounding to even would give 2 and -2."""
    scale = 1.0
    x = torch.tensor([[(127.0 - 127e-7) * scale], [2.5], [-2.5], [0.5], [-0.5], [1.5]])
    assert quantise(x, torch.zeros(6, dtype=torch.int64), "int8").values.reshape(-1).tolist() == [127, 3, -3, 1, -1, 2]


def test_zeros_stay_zeros() -> None:
    zeros = torch.zeros(1, 4, 2)
    groups = torch.zeros(4, dtype=torch.int64)
    for found in (quantise(zeros, groups, "int8"), quantise(zeros, groups, "fp8"), quantise_channels(zeros)):
        assert torch.equal(found.dequantise(torch.float64), zeros.double())


def test_channels_have_their_own_scale() -> None:
    v = torch.randn(2, 10, 3) * torch.tensor([1e-3, 1.0, 1e3])
    found = quantise_channels(v)
    for n, d in itertools.product(range(2), range(3)):
        scale = max(abs(x) for x in v[n, :, d].tolist()) / 448
        assert math.isclose(found.scale[n, 0, d].item(), scale, rel_tol=1e-6)
        want = [to_e4m3(float(x / found.scale[n, 0, d])) for x in v[n, :, d]]
        assert found.values[n, :, d].float().tolist() == want


def test_weights_have_the_fixed_scale() -> None:
    p = torch.tensor([0.0, 1.0, 0.5, 0.3, 1e-3, 1e-7])
    found = quantise_weights(p)
    assert math.isclose(found.scale.item(), 1 / 448, rel_tol=1e-6)
    assert found.values.float().tolist() == [to_e4m3(float(x / found.scale)) for x in p]
    # without the factor 448 a weight of 0.001 would be lost in e4m3's smallest steps (2^-9)
    assert math.isclose(found.dequantise(torch.float64)[4].item(), 1e-3, rel_tol=0.07)


@pytest.mark.parametrize("size", [1.0, 4.0])
@pytest.mark.parametrize("largest", [127.0, 7.0], ids=["int8", "int4"])
def test_scales_of_32_rows_against_those_of_a_thread(size: float, largest: float) -> None:
    """What the presets sage2 and sage2-int4 and docs/KERNELS.md say of the published scales, for 4 queries or 16 keys.

    A warp of 32 queries gives each of its 8 groups every eighth one; 64 keys are in 4 groups, of every eighth pair.
    """
    token = torch.arange(1024)
    rows = token // 32, token // 32
    threads = token // 32 * 8 + token % 8, token // 64 * 4 + token % 8 // 2
    assert all(int(count) == 4 for count in threads[0].bincount())
    assert all(int(count) == 16 for count in threads[1].bincount())

    def rounded(x: torch.Tensor, group: torch.Tensor) -> torch.Tensor:
        most = torch.stack([x[group == g].abs().max() for g in range(int(group.max()) + 1)])
        scale = (most / largest + 1e-7)[group][:, None]
        return (x / scale).round() * scale

    more = []
    for seed in range(6):
        generator = torch.Generator().manual_seed(seed)
        q, k, v = (torch.randn(1024, 64, generator=generator, dtype=torch.float64) for _ in range(3))
        for x in (q, k):
            x[torch.rand(1024, generator=generator) < 0.01] *= size
        exact = (q @ k.T / 8).softmax(-1) @ v
        errors = []
        for by_query, by_key in (rows, threads):
            scores = rounded(q, by_query) @ rounded(k - k.mean(0), by_key).T / 8
            errors.append(float((scores.softmax(-1) @ v - exact).norm()))
        more.append(errors[0] / errors[1] - 1)
    assert sum(more) / len(more) == pytest.approx({1.0: 0.11, 4.0: 0.5}[size], abs=0.02 if size == 1.0 else 0.12)
