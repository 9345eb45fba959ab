"""A modular pipeline's denoising loop, patched: the same sparse attention as in the classic pipeline."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import ClassifierFreeGuidance
from diffusers.modular_pipelines.wan.denoise import WanDenoiseStep

import vidaccel
from tests.patchers.test_zoo import per_head
from tests.rounding import assert_rounded, bound_of, distance
from tests.zoo.oracle import masked
from tests.zoo.wan import CASES
from vidaccel.patchers.registry import family_of


@pytest.fixture
def pipe() -> Any:
    """The blocks of Wan 2.1's loop with a tiny transformer, a guider and a scheduler."""
    classic = CASES[0].make()
    modular = WanDenoiseStep().init_pipeline()
    modular.update_components(
        transformer=classic.transformer, scheduler=classic.scheduler, guider=ClassifierFreeGuidance(guidance_scale=3.0)
    )
    modular.set_progress_bar_config(disable=True)
    return modular


def run(pipe: Any) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    pipe.scheduler.set_timesteps(2)
    latents, prompt, negative = (
        torch.randn(1, *shape, generator=generator) for shape in ((16, 3, 6, 10), (16, 32), (16, 32))
    )
    out: torch.Tensor = pipe(
        latents=latents,
        prompt_embeds=prompt,
        negative_prompt_embeds=negative,
        timesteps=pipe.scheduler.timesteps,
        num_inference_steps=2,
        dtype=torch.float32,
        output="latents",
    )
    return out


def test_the_loop_runs_sparse_and_equals_the_oracle(pipe: Any) -> None:
    before = run(pipe)
    family = family_of(pipe.transformer)
    assert family is not None and torch.isfinite(before).all()
    plan = per_head(pipe)
    with masked(family, pipe.transformer, plan):
        expected = run(pipe)
        bound = bound_of(lambda: run(pipe), expected)
    session = vidaccel.patch(pipe, plan, strict=True)
    found = run(pipe)
    assert_rounded(found, expected, bound)
    assert distance(found, before) > 100 * bound
    report = session.report()
    assert report.calls == report.sparse_calls == 8, "two layers, two steps, with and without the prompt"
    vidaccel.unpatch(pipe)
    assert torch.equal(run(pipe), before)
