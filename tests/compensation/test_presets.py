"""The presets whose point is their compensation: what they build, when they are dense, and that they run."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

import vidaccel
from tests.configs.test_presets import GRIDS, REPAIRED, sparse_head
from tests.zoo.wan import CASES
from vidaccel import HeadPolicy, LayerPolicy, Plan, Rule, TileShape
from vidaccel.compensation import CompensationToken, Delta, Rectification, Rettention, build_compensation
from vidaccel.configs.presets import load_preset
from vidaccel.layout import TokenLayout
from vidaccel.patterns import StaticPattern, build_pattern

RULES = {
    "delta": Delta(queries=6),
    "razor": CompensationToken(),
    "rettention": Rettention(period=5, growth=0.04),
    "rectified": Rectification(gain_aware=True),
}
PAIRED = [*REPAIRED, "rectified"]


@pytest.mark.parametrize("name", PAIRED)
def test_they_build_the_published_rule(name: str) -> None:
    assert build_compensation(sparse_head(name).compensation) == RULES[name]


@pytest.mark.parametrize("name", REPAIRED)
def test_warm_up(name: str) -> None:
    made = FlowMatchEulerDiscreteScheduler(shift=5.0)
    made.set_timesteps(50)
    levels = np.asarray(torch.as_tensor(made.sigmas), dtype=np.float64)[:50]
    dense = [load_preset(name).lookup(level, "transformer", 3, "cond").is_dense for level in levels]
    assert sum(dense) == {"delta": 12, "razor": 12, "rettention": 20}[name]  # 15 on its own schedule
    assert dense == sorted(dense, reverse=True)


def test_the_band_of_rettention_keeps_what_its_preset_says() -> None:
    """Published: 3.1% of the tokens."""
    pattern = build_pattern(sparse_head("rettention").pattern)
    assert isinstance(pattern, StaticPattern)
    found = {}
    for name, grid in GRIDS.items():
        layout = TokenLayout.of(grid, load_preset("rettention").tile)
        found[name] = round(pattern.density(layout), 3)
        assert name == "small model" or pattern.exact_density(layout) == pytest.approx(0.031, abs=0.001)
    assert found == {"small model": 0.083, "Wan 480p": 0.035, "Wan 720p": 0.031}


@pytest.mark.parametrize("name", PAIRED)
def test_they_run_strictly_on_a_small_model(name: str) -> None:
    """Closer to dense than the same blocks without the compensation."""
    pipe = CASES[0].make()
    dense = CASES[0].run(pipe)
    found = {}
    for rule in (sparse_head(name).compensation, "none"):
        head = HeadPolicy(sparse_head(name).pattern, compensation=rule)
        plan = Plan("test", (Rule(LayerPolicy((head,))),), tile=TileShape(1, 2, 2))
        session = vidaccel.patch(pipe, plan, strict=True)
        found[str(rule)] = CASES[0].run(pipe)
        report = session.report()
        assert report.sparse_calls == report.calls == 12 and not report.fallbacks
        assert torch.equal(CASES[0].run(pipe), found[str(rule)]), "a new run begins with nothing remembered"
        vidaccel.unpatch(pipe)
    with_rule, without = ((out - dense).norm() for out in found.values())
    assert with_rule > 0
    if name != "rectified":  # which is no better on random weights
        assert with_rule < without
