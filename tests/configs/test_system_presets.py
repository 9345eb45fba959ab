"""The presets of systems that choose blocks in each call: what they build, when they are dense, and that they run."""

from __future__ import annotations

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

import vidaccel
from tests.configs.test_presets import DYNAMIC, GRIDS, TRAINED, sparse_head
from tests.zoo.wan import CASES
from vidaccel import LayerPolicy, Plan, Rule, TileShape
from vidaccel.configs.presets import load_preset, preset_names
from vidaccel.engine.noise_level import noise_level
from vidaccel.layout import TokenLayout
from vidaccel.patterns import DynamicPattern, build_pattern

#: Every preset that leaves blocks out and needs no trained weights.
RUN = [n for n in preset_names() if n not in TRAINED and sparse_head(n).pattern.name != "dense"]

#: Of 50 steps at flow shift 5: dense ones, and the layers that stay dense after them.
DENSE = {
    "draft": (12, [0, 1]),
    "haste": (12, []),
    "hip": (12, []),
    "minference": (12, []),
    "nabla": (12, []),
    "pasa": (12, []),
    "rectified": (5, [0, 1]),
    "s2": (12, []),
    "sale": (12, []),
    "sparge": (0, []),
    "svg": (10, [0]),
    "svg-ear": (5, [0]),
    "svg-ear-clusters": (5, [0]),
    "svg2": (10, [0]),
    "vsa-free": (12, []),
    "xattention": (4, []),  # 5 at the flow shift 7 of HunyuanVideo
}


@pytest.mark.parametrize("name", DYNAMIC)
def test_warm_up(name: str) -> None:
    made = FlowMatchEulerDiscreteScheduler(shift=5.0)
    made.set_timesteps(50)
    levels = [noise_level(timestep, made) for timestep in made.timesteps]
    plan = load_preset(name)
    steps, layers = DENSE[name]
    assert [plan.lookup(level, "transformer", 3, "cond").is_dense for level in levels] == [i < steps for i in range(50)]
    assert [layer for layer in range(4) if plan.lookup(0.3, "transformer_2", layer, None).is_dense] == layers


@pytest.mark.parametrize("name", DYNAMIC)
def test_presets_aim_at_their_published_or_stated_density(name: str) -> None:
    pattern = build_pattern(sparse_head(name).pattern)
    assert isinstance(pattern, DynamicPattern)
    if name == "s2":  # an eighth, and neighbours, which are few only among many tiles
        small, *wan = (pattern.density(TokenLayout.of(grid)) for grid in GRIDS.values())
        assert all(found is not None and 0.125 < found < 0.25 for found in wan) and small is not None and small < 0.7
        return
    aims = {"draft": 0.1, "hip": 0.25, "minference": 0.25, "pasa": 0.25, "sparge": 0.5, "svg-ear": 0.25}
    aims |= {"svg-ear-clusters": 0.25, "vsa-free": 0.25}
    for grid in GRIDS.values():
        found = pattern.density(TokenLayout.of(grid, load_preset(name).tile))
        assert found == (pytest.approx(aims[name], abs=0.02) if name in aims else None)


def _everywhere(name: str) -> Plan:
    """The preset's sparse policy in every layer and step."""
    return Plan("test", (Rule(LayerPolicy((sparse_head(name),))),), tile=TileShape(1, 2, 2))


@pytest.mark.parametrize("name", RUN)
def test_presets_run_strictly_on_a_small_model(name: str) -> None:
    pipe = CASES[0].make()
    dense = CASES[0].run(pipe)
    session = vidaccel.patch(pipe, _everywhere(name), strict=True)
    found = CASES[0].run(pipe)
    report = session.report()
    assert report.sparse_calls == report.calls == 12 and not report.fallbacks
    assert not torch.equal(found, dense) and bool(found.isfinite().all())
    again = CASES[0].run(pipe)
    assert torch.equal(again, found), "a new run begins with nothing remembered, and draws the same queries"


def test_guidance_branches_remember_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every call of the pattern finds what the same layer and branch left behind, and nothing else."""
    from vidaccel.patterns import Heads, Reuse

    memories: dict[int, list[int]] = {}
    choose = Reuse.choose

    def watched(self: Reuse, heads: Heads) -> torch.Tensor:
        memories.setdefault(id(heads.memory), []).append(heads.step)
        return choose(self, heads)

    monkeypatch.setattr(Reuse, "choose", watched)
    pipe = CASES[0].make()
    session = vidaccel.patch(pipe, _everywhere("haste"), strict=True)
    CASES[0].run(pipe)
    assert session.report().calls == 12
    assert sorted(memories.values()) == [[0, 1, 2]] * 4  # two layers, two branches
