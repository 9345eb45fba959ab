"""The clock places forward passes by noise level, whatever the pipeline reveals."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from vidaccel.engine.clock import Clock


def clock(scheduler: object = None) -> Clock:
    return Clock(lambda: scheduler)


def test_noise_level_is_the_largest_timestep_over_the_schedule() -> None:
    assert clock().tick(torch.tensor([250.0])).noise_level == 0.25
    # Wan2.2-5B: the tokens of the first frame are clean and sit at 0
    assert clock().tick(torch.tensor([[0.0, 0.0, 900.0, 900.0]])).noise_level == pytest.approx(0.9)
    short = SimpleNamespace(config=SimpleNamespace(num_train_timesteps=500))
    assert clock(short).tick(torch.tensor([250])).noise_level == 0.5


def test_steps_follow_the_noise_level_and_not_the_calls() -> None:
    it = clock()
    moments = [it.tick(torch.tensor([t])) for t in (900, 900, 700, 700, 300)]
    assert [m.step for m in moments] == [0, 0, 1, 1, 2]
    assert {m.run for m in moments} == {0}


def test_a_rise_starts_a_new_run() -> None:
    it = clock()
    for t in (900, 500, 100):
        it.tick(torch.tensor([t]))
    again = it.tick(torch.tensor([900]))
    assert (again.run, again.step) == (1, 0)


def test_step_sources_in_order() -> None:
    scheduler = SimpleNamespace(_step_index=None)
    it = clock(scheduler)
    assert it.tick(torch.tensor([900])).step == 0  # diffusers leaves it None until the first step() call
    scheduler._step_index = 7
    assert it.tick(torch.tensor([800])).step == 7
    assert it.tick(torch.tensor([800]), context="cond", context_step=3).step == 3


@pytest.mark.parametrize(
    ("name", "branch"),
    [
        *(("cond", "cond"), ("uncond", "uncond"), ("pred_cond", "cond"), ("pred_uncond", "uncond"), ("x", None)),
        *(("cond_uncond", None), ("uncond_stg", None), ("uncond_modality", None)),  # a batch of both, and other passes
    ],
)
def test_branch_from_the_cache_context(name: str, branch: str | None) -> None:
    assert clock().tick(torch.tensor([900]), context=name, separate_guidance=True).branch == branch


def test_branch_from_the_order_of_passes() -> None:
    it = clock()
    found = [it.tick(torch.tensor([t]), separate_guidance=True).branch for t in (900, 900, 800, 800)]
    assert found == ["cond", "uncond", "cond", "uncond"]
    assert clock().tick(torch.tensor([900])).branch is None  # one batch holds both
