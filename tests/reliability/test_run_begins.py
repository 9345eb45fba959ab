"""A run begins when the pipeline's call begins, whatever the noise levels, the step counters and earlier runs say."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import diffusers
import pytest
import torch

import vidaccel
from tests.reliability.plans import REMEMBERS, SPARSE, alone, patched
from tests.tiny_wan import tiny_wan
from tests.zoo import hunyuan_video, wan
from vidaccel import HeadPolicy, LayerPolicy, PatternSpec, Plan, Rule, TileShape
from vidaccel.engine.runs import DenoisingRun, Moment

T2V = wan.CASES[0]
#: Its pipeline opens no ``cache_context``: only the order of passes tells the two of guidance apart.
V2V = next(case for case in wan.CASES if case.pipeline == "WanVideoToVideoPipeline")
I2V = next(case for case in hunyuan_video.CASES if case.pipeline == "HunyuanVideoImageToVideoPipeline-token_replace")

#: The conditional pass sparse, the other dense.
ONE_BRANCH = Plan("one branch", (Rule(SPARSE.rules[0].policy, branch="cond"),), tile=SPARSE.tile)


@contextmanager
def moments() -> Iterator[list[Moment]]:
    """Where each forward pass was placed."""
    found: list[Moment] = []
    observe = DenoisingRun.observe
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DenoisingRun, "observe", lambda *a, **k: found.append(observe(*a, **k)) or found[-1])
        yield found


@pytest.mark.parametrize("passes", [1, 2, 3], ids=lambda n: f"after pass {n}")
@pytest.mark.parametrize("plan", [ONE_BRANCH, REMEMBERS], ids=lambda plan: plan.name)
def test_an_interrupted_run_leaves_nothing_to_the_next(plan: Plan, passes: int) -> None:
    pipe, _ = patched(V2V, plan, strict=True)
    left = [passes]

    def stop(*_: Any) -> None:
        left[0] -= 1
        if left[0] == 0:
            raise KeyboardInterrupt

    hook = pipe.transformer.register_forward_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        V2V.run(pipe)
    hook.remove()
    expected = alone(V2V, plan)
    with moments() as found:
        assert torch.equal(V2V.run(pipe), expected)
    assert [moment.branch for moment in found] == ["cond", "uncond"] * 3
    assert [moment.step for moment in found] == [0, 0, 1, 1, 2, 2]


@pytest.mark.parametrize("guidance", [1.0, 3.0], ids=["one pass", "two passes"])
def test_calls_of_one_step_are_runs_of_their_own(guidance: float) -> None:
    """All passes of all calls are at one noise level."""
    pipe, session = patched(I2V, ONE_BRANCH, strict=True)
    counts = []
    for _ in range(3):
        session.reset_stats()
        I2V.run(pipe, num_inference_steps=1, true_cfg_scale=guidance)
        counts.append(session.report().sparse_calls)
    layers = len(session.report().layers)
    assert counts == [layers] * 3


def test_heuns_second_evaluation_is_no_other_branch() -> None:
    """It evaluates each noise level but the first twice; without guidance all of them are conditional."""
    pipe, session = patched(V2V, ONE_BRANCH, strict=True)
    pipe.scheduler = diffusers.FlowMatchHeunDiscreteScheduler(shift=7.0)
    with moments() as found:
        V2V.run(pipe, guidance_scale=1.0)
    assert len(found) > len({moment.noise_level for moment in found}), "some levels come twice"
    assert {moment.branch for moment in found} == {"cond"}
    assert session.report().sparse_calls == session.report().calls == 2 * len(found)


@pytest.mark.parametrize("case", [V2V, next(c for c in wan.CASES if c.pipeline == "WanImageToVideoPipeline")], ids=str)
def test_the_step_is_that_of_the_pipeline_that_runs(case: Any) -> None:
    """It shares the transformer with the one that was patched, and has a scheduler of its own."""
    plain = case.make()
    other = tiny_wan()
    other.transformer, other.scheduler = plain.transformer, copy.deepcopy(plain.scheduler)
    other.scheduler.set_timesteps(50)
    other.scheduler._step_index = 17
    vidaccel.patch(other, REMEMBERS)
    expected = alone(case, REMEMBERS)
    with moments() as found:
        assert torch.equal(case.run(plain), expected)
    assert sorted({moment.step for moment in found}) == [0, 1, 2]


# -- loops of one's own --------------------------------------------------------------------------------------------


STEPS = (0.9, 0.6, 0.3)


def inputs(number: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Latents and text of one video."""
    draw = torch.Generator().manual_seed(number)
    return torch.randn(1, 16, 3, 6, 10, generator=draw), torch.randn(1, 16, 32, generator=draw)


def step(model: Any, latents: torch.Tensor, text: torch.Tensor, level: float) -> torch.Tensor:
    with torch.no_grad():
        return latents - 0.3 * model(latents, torch.tensor([1000 * level]), text, return_dict=False)[0]


def loop(model: Any, number: int) -> torch.Tensor:
    latents, text = inputs(number)
    for level in STEPS:
        latents = step(model, latents, text, level)
    return latents


@pytest.fixture
def model() -> Any:
    return T2V.make().transformer


@pytest.fixture
def expected(model: Any) -> list[torch.Tensor]:
    """Three videos, each by a session of its own."""
    found = []
    for number in range(3):
        session = vidaccel.patch(model, REMEMBERS, strict=True)
        found.append(loop(model, number))
        session.close()
    return found


def test_windows_that_take_turns_say_whose_turn_it_is(model: Any, expected: list[torch.Tensor]) -> None:
    session = vidaccel.patch(model, REMEMBERS, strict=True)
    windows = [(session.new_run(), *inputs(number)) for number in range(3)]
    for level in STEPS:
        for number, (run, latents, text) in enumerate(windows):
            with run:
                windows[number] = run, step(model, latents, text, level), text
    for (_, found, _), alone_ in zip(windows, expected, strict=True):
        assert torch.equal(found, alone_)
    assert not session.report().events[1:], session.report().events


def test_windows_that_do_not_say_so_do_not_mix(model: Any, expected: list[torch.Tensor]) -> None:
    """Each pass is what it is at the start of a run, and the report says how it can remember."""
    session = vidaccel.patch(model, REMEMBERS, strict=True)
    windows = [inputs(number) for number in range(3)]
    apart = [inputs(number) for number in range(3)]
    for level in STEPS:
        windows = [(step(model, latents, text, level), text) for latents, text in windows]
    assert any("begin a run for each: run = session.new_run()" in event for event in session.report().events)
    for level in STEPS:
        for number, (latents, text) in enumerate(apart):
            session.new_run()
            apart[number] = step(model, latents, text, level), text
    for (found, _), (fresh, _) in zip(windows, apart, strict=True):
        assert torch.equal(found, fresh)


def test_a_new_run_at_the_same_level_remembers_nothing(model: Any, expected: list[torch.Tensor]) -> None:
    """Two loops one after the other, the second of which begins where the first one ended."""
    session = vidaccel.patch(model, REMEMBERS, strict=True)
    latents, text = inputs(0)
    step(model, latents, text, STEPS[0])
    session.new_run()
    assert torch.equal(loop(model, 1), expected[1])


def test_a_schedule_that_is_set_begins_a_run() -> None:
    """A loop over the pipeline's own scheduler needs to say nothing, though it begins where the last one stopped."""
    pipe, session = patched(T2V, REMEMBERS, strict=True)
    latents, text = inputs(0)
    densities = []
    for _ in range(2):
        pipe.scheduler.set_timesteps(4)
        session.reset_stats()
        step(pipe.transformer, latents, text, float(pipe.scheduler.timesteps[0]) / 1000)
        densities.append(session.report().density)
    assert densities[0] == densities[1]


def test_branches_of_a_loop_are_named_by_cache_context(model: Any) -> None:
    session = vidaccel.patch(model, ONE_BRANCH)
    latents, text = inputs(0)
    for name, sparse in (("cond", 2), ("uncond", 0), ("cond", 2)):
        session.reset_stats()
        with model.cache_context(name):
            step(model, latents, text, STEPS[0])
        assert session.report().sparse_calls == sparse


@pytest.mark.parametrize("strict", [False, True])
def test_rules_for_a_branch_that_nobody_names_do_not_go_unsaid(model: Any, strict: bool) -> None:
    session = vidaccel.patch(model, ONE_BRANCH, strict=strict)
    latents, text = inputs(0)
    if strict:
        with pytest.raises(vidaccel.StrictError, match=r"which pass of guidance .*cache_context\(\"cond\"\)"):
            step(model, latents, text, STEPS[0])
        return
    step(model, latents, text, STEPS[0])
    [(reason, count)] = session.report().fallbacks.items()
    assert count == 2 and 'open `with transformer.cache_context("cond")` around it' in reason


def test_two_experts_of_one_run_share_its_steps() -> None:
    case = next(case for case in wan.CASES if case.pipeline == "WanPipeline-2.2-dual")
    pipe, _ = patched(case, SPARSE, strict=True)
    with moments() as found:
        case.run(pipe)
    assert [moment.step for moment in found] == [0, 0, 1, 1, 2, 2]


def test_the_plan_of_a_loop_may_be_of_two_noise_bins(model: Any) -> None:
    wide = HeadPolicy(PatternSpec.make("sliding_tile", window=[3, 1, 1]))
    rules = (Rule(LayerPolicy((wide,)), noise=(0.5, 1.0)), *SPARSE.rules)
    session = vidaccel.patch(model, Plan("two", rules, tile=TileShape(1, 2, 2)), strict=True)
    loop(model, 0)
    assert session.report().sparse_calls == 6
