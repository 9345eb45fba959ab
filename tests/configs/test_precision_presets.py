"""The presets of systems that compute in few bits: what they ask for, when, and that they run."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import UniPCMultistepScheduler

import vidaccel
from tests.configs.test_presets import GRIDS, QUANTISED
from tests.zoo.wan import CASES
from vidaccel import HeadPolicy, LayerPolicy, Plan, Rule
from vidaccel.configs.presets import load_preset
from vidaccel.layout import TokenLayout
from vidaccel.patterns import StaticPattern, build_pattern
from vidaccel.types import KERNEL_PRECISIONS


def policies(name: str, steps: int = 50) -> list[HeadPolicy]:
    """What the preset does in each step at flow shift 5."""
    made = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0)
    made.set_timesteps(steps)
    levels = np.asarray(torch.as_tensor(made.sigmas), dtype=np.float64)[:steps]
    return [load_preset(name).lookup(level, "transformer", 3, "cond").for_head(0, 12) for level in levels]


@pytest.mark.parametrize(
    ("name", "precision"), [("sage", "int8"), ("sage2", "int8-fp8"), ("sage2-int4", "int4-fp8"), ("binary", "binary")]
)
def test_one_precision_everywhere(name: str, precision: str) -> None:
    assert set(policies(name)) == {HeadPolicy(precision=precision)}
    told = dict(load_preset(name).provenance)["summary"]
    assert ("emulated on the CPU only" in told) == (precision not in KERNEL_PRECISIONS)


@pytest.mark.parametrize(("steps", "last"), [(20, 1), (30, 1), (50, 2)])
def test_sage3_keeps_8_bits_at_both_ends(steps: int, last: int) -> None:
    found = [policy.precision for policy in policies("sage3", steps)]
    assert found == ["int8-fp8"] + ["nvfp4"] * (steps - 1 - last) + ["int8-fp8"] * last


def test_fps_has_three_phases_of_a_third_each() -> None:
    """Early coarse and sparse, middle fine and dense, late in between."""
    found = policies("fps")
    phases = list(dict.fromkeys(found))
    assert [policy.precision for policy in phases] == ["fp8-tensor", "fp8-rows32", "fp8-tile"]
    assert found == sorted(found, key=phases.index), "each phase is one stretch"
    assert [found.count(policy) for policy in phases] == [17, 17, 16]
    for grid in GRIDS.values():
        layout = TokenLayout.of(grid)
        densities = []
        for policy in phases:
            pattern = build_pattern(policy.pattern)
            assert isinstance(pattern, StaticPattern)
            densities.append(pattern.density(layout))
        early, middle, late = densities
        assert 1.5 * early < late < 0.8 * middle == 0.8


@pytest.mark.parametrize("name", QUANTISED)
def test_presets_run_strictly_on_a_small_model(name: str) -> None:
    """With their phases as they are; the kernel's name tells that the CPU emulates."""
    pipe = CASES[0].make()
    dense = CASES[0].run(pipe)
    session = vidaccel.patch(pipe, name, strict=True)
    found = CASES[0].run(pipe)
    report = session.report()
    assert not report.fallbacks and report.kernels == {"emulated": 12}
    assert not torch.equal(found, dense) and bool(found.isfinite().all())


def test_guidance_branches_and_calls_share_nothing() -> None:
    """A precision keeps no state: the same input gives the same output, whatever ran before."""
    pipe = CASES[0].make()
    vidaccel.patch(pipe, "sage3", strict=True)
    first = CASES[0].run(pipe)
    assert torch.equal(CASES[0].run(pipe), first)
    vidaccel.unpatch(pipe)
    rules = tuple(Rule(LayerPolicy((HeadPolicy(precision="nvfp4"),)), branch=branch) for branch in ("cond", "uncond"))
    outs = []
    for plan in (Plan("both", rules), Plan.uniform("all", HeadPolicy(precision="nvfp4"))):
        vidaccel.patch(pipe, plan, strict=True)
        outs.append(CASES[0].run(pipe))
        vidaccel.unpatch(pipe)
    assert torch.equal(*outs)
