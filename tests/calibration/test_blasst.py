"""BLASST's calibration: counts against the oracle's own, and both fits against their formulas on a grid of answers."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.kernels.helpers import make_layout, random_mask, random_qkv
from vidaccel.blockmask import BlockMask
from vidaccel.calibration.blasst import TRIALS, Sweep, fit_exponential, fit_inverse_length, measure
from vidaccel.errors import ConfigError, KernelError
from vidaccel.kernels import reference
from vidaccel.kernels.contract import Skips
from vidaccel.patterns import Neighborhood


@pytest.mark.parametrize("masked", [False, True])
def test_counts_are_those_of_the_oracle(masked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    layout = make_layout((5, 7, 9), (2, 4, 4), text=13, text_first=True)
    q, k, v = random_qkv(layout, batch=2, heads=2, dtype=torch.float64)
    q = 4 * q
    mask = random_mask(layout, 2, [0.4, 0.8]) if masked else BlockMask.full(layout)
    thresholds = (1e-6, 1e-3, 0.05, 0.3, 1.0)
    monkeypatch.setattr("vidaccel.calibration.blasst._MAX_SCORES", 50 * layout.tokens)
    sweep = measure(q, k, layout, thresholds, mask if masked else None)
    kept = float(mask.head_density(layout).expand(2, 2).sum()) * layout.tokens**2
    for threshold, sparsity in zip(thresholds, sweep.sparsity, strict=True):
        skips = Skips.of(math.log(threshold), q)
        reference.block_sparse_attention(q, k, v, layout, mask, skips=skips)
        assert sparsity * kept == pytest.approx(float(skips.skipped.sum()), abs=1e-6)
    assert sweep.length == layout.tokens and sweep.sparsity[0] < sweep.sparsity[-1] < 1


def test_nearest_lambda_and_least_squares_on_inverse_length() -> None:
    sweeps = [
        Sweep(1000, (1e-4, 1e-3, 1e-2), (0.1, 0.45, 0.9)),
        Sweep(4000, (1e-4, 1e-3, 1e-2), (0.3, 0.6, 0.95)),
        Sweep(2000, (1e-4, 1e-3, 1e-2), (0.4, 0.6, 0.95)),
    ]
    fit = fit_inverse_length(sweeps, 0.5)
    assert fit.thresholds == (1e-3, 1e-3, 1e-4)  # the last has two as near, and takes the smaller
    assert fit.sparsity == (0.45, 0.6, 0.4)

    def squares(factor: float) -> float:
        return sum((t - factor / s.length) ** 2 for t, s in zip(fit.thresholds, sweeps, strict=True))

    candidates = np.linspace(0.1, 5, 4901)
    assert fit.factor == pytest.approx(min(candidates, key=squares), abs=1e-3)


@given(st.floats(0.01, 100), st.floats(0.5, 12), st.lists(st.integers(100, 100_000), min_size=1, max_size=4))
def test_the_exponential_is_found_again(a: float, b: float, lengths: list[int]) -> None:
    targets = (0.02, 0.2, 0.5, 0.8, 0.97)
    sweeps = []
    for length in lengths:
        pairs = [(a * math.exp(b * s) / length, s) for s in targets]
        pairs = [(threshold, s) for threshold, s in pairs if threshold <= 1]
        if pairs:
            sweeps.append(Sweep(length, *zip(*pairs, strict=True)))  # type: ignore[arg-type]
    inside = {s for sweep in sweeps for s in sweep.sparsity if 0.1 <= s <= 0.9}
    if len(inside) < 2:
        with pytest.raises(ConfigError, match="a fit needs two different sparsities"):
            fit_exponential(sweeps)
        return
    fit = fit_exponential(sweeps)
    assert fit.factor(0.35) == pytest.approx(a * math.exp(0.35 * b), rel=1e-6)
    assert fit.residual == pytest.approx(0, abs=1e-6) and fit.used <= 3 * len(sweeps)


def test_both_fits_reach_their_target_on_what_they_were_made_from() -> None:
    """Queries that agree on which blocks matter, as in a model; of unrelated rows some row always wants a block."""
    layout = make_layout((4, 8, 8), (1, 4, 4))
    sweeps = []
    for seed in range(3):
        torch.manual_seed(seed)
        q, k, _ = random_qkv(layout, heads=2)
        strength = -3 * torch.rand(layout.num_blocks)[layout.block_of_token]
        q, k = 1 + 0.05 * q, 0.05 * k + strength[:, None, None]
        sweeps.append(measure(q, k, layout))
    for factor in (fit_inverse_length(sweeps, 0.5).factor, fit_exponential(sweeps).factor(0.5)):
        (sparsity,) = measure(q, k, layout, (factor / layout.tokens,)).sparsity
        assert sparsity == pytest.approx(0.5, abs=0.15)


def test_mistakes_are_named() -> None:
    layout = make_layout()
    q, k, _ = random_qkv(layout)
    assert TRIALS[0] == pytest.approx(1e-6) and TRIALS[-1] == pytest.approx(0.7)
    with pytest.raises(ConfigError, match="no sweep"):
        fit_inverse_length([], 0.5)
    with pytest.raises(ConfigError, match="target sparsity is 1.0"):
        fit_inverse_length([Sweep(10, (0.1,), (0.5,))], 1.0)
    with pytest.raises(ConfigError, match=r"thresholds are \(0.0,\)"):
        measure(q, k, layout, (0.0,))
    with pytest.raises(KernelError, match="rule over tokens"):
        measure(q, k, layout, mask=Neighborhood(window=(3, 3, 3), exact=True).mask(layout))
    for wrong, says in [
        ((10, (0.1, 0.2), (0.5,)), "2 thresholds and 1 sparsities"),
        ((0, (0.1,), (0.5,)), "length is at least 1"),
        ((10, (2.0,), (0.5,)), "at most 1"),
        ((10, (0.1,), (1.5,)), "a share from 0 to 1"),
    ]:
        with pytest.raises(ConfigError, match=says):
            Sweep(*wrong)  # type: ignore[arg-type]
