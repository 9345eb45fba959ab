"""diffusers' own caches together with a plan: skipped blocks and steps confuse neither clock nor statistics."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch

import vidaccel
from tests.zoo.wan import CASES
from vidaccel import HeadPolicy, LayerPolicy, PatternSpec, Plan, Rule, TileShape
from vidaccel.errors import ConfigError
from vidaccel.pipelines.caches import Cache, enabled

CASE = CASES[0]
STEPS = 8
SPARSE = Plan(
    "window",
    (Rule(LayerPolicy((HeadPolicy(PatternSpec.make("sliding_tile", window=[1, 1, 1])),))),),
    tile=TileShape(2, 2, 2),
)


def _level(pipe: Any) -> Callable[[], int]:
    return lambda: pipe._current_timestep


CACHES: dict[str, Callable[[Any], Any]] = {
    "first-block": lambda pipe: diffusers.FirstBlockCacheConfig(threshold=0.5),
    "pyramid-attention": lambda pipe: diffusers.PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2,
        spatial_attention_timestep_skip_range=(0, 900),
        spatial_attention_block_identifiers=("blocks",),
        current_timestep_callback=_level(pipe),
    ),
    "faster": lambda pipe: diffusers.FasterCacheConfig(
        spatial_attention_block_skip_range=2,
        spatial_attention_timestep_skip_range=(-1, 900),
        spatial_attention_block_identifiers=("blocks",),
        attention_weight_callback=lambda _: 0.3,
        unconditional_batch_skip_range=10_000,
        unconditional_batch_timestep_skip_range=(-1, 0),
        is_guidance_distilled=True,
        tensor_format="BCFHW",
        current_timestep_callback=_level(pipe),
    ),
    "taylorseer": lambda pipe: diffusers.TaylorSeerCacheConfig(
        cache_interval=2, disable_cache_before_step=2, max_order=1, cache_identifiers=[r"blocks\.\d+\.attn1"]
    ),
    "mag": lambda pipe: diffusers.MagCacheConfig(
        num_inference_steps=2 * STEPS, mag_ratios=torch.ones(2 * STEPS), threshold=1.0, max_skip_steps=2
    ),
}


def run(pipe: Any) -> torch.Tensor:
    return CASE.run(pipe, num_inference_steps=STEPS)


@pytest.mark.parametrize("first", ["cache", "patch"])
@pytest.mark.parametrize("name", CACHES)
def test_cache_and_plan_together(name: str, first: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cached = CASE.make()
    cached.transformer.enable_cache(CACHES[name](cached))
    expected = run(cached)

    def made(plan: Any) -> tuple[Any, Any]:
        pipe = CASE.make()
        session = vidaccel.patch(pipe, plan) if first == "patch" else None
        pipe.transformer.enable_cache(CACHES[name](pipe))
        return pipe, session or vidaccel.patch(pipe, plan)

    pipe, session = made("dense")
    assert torch.equal(run(pipe), expected), "a dense plan changes nothing under a cache either"

    pipe, session = made(SPARSE)
    moments = []
    tick = session.clock.tick
    monkeypatch.setattr(session.clock, "tick", lambda *a, **k: moments.append(tick(*a, **k)) or moments[-1])
    found = run(pipe)
    report = session.report()
    everything = 2 * STEPS * len(report.layers)  # cond and uncond
    assert 0 < report.calls < everything, "the cache skipped some"
    assert report.sparse_calls == report.calls and not report.fallbacks
    assert torch.isfinite(found).all() and not torch.equal(found, expected)
    # skipped blocks are no skipped steps
    assert [(moment.step, moment.branch) for moment in moments] == [
        (step, branch) for step in range(STEPS) for branch in ("cond", "uncond")
    ]


@pytest.mark.parametrize("text", ["first-block:0.5", "taylorseer:3", "pab", "mag"])
def test_a_cache_by_one_word(text: str, tmp_path: Path) -> None:
    if text == "mag":
        (tmp_path / "ratios.json").write_text(json.dumps([1.0] * STEPS))
        text = f"mag:{tmp_path / 'ratios.json'}"
    cache = Cache.parse(text)
    pipe = CASE.make()
    plain = run(pipe)
    session = vidaccel.patch(pipe, SPARSE)
    with enabled(pipe, cache, STEPS):
        assert pipe.transformer.is_cache_enabled
        with_cache = run(pipe)
        calls = session.report().calls
        with pytest.raises(ConfigError, match="transformer has a cache already"), enabled(pipe, cache, STEPS):
            pass
    session.close()
    assert 0 < calls < 2 * STEPS * 2, "the cache skipped some of two layers, cond and uncond"
    assert torch.isfinite(with_cache).all()
    assert not pipe.transformer.is_cache_enabled and torch.equal(run(pipe), plain), "nothing of it is left"


def test_no_cache_is_no_cache() -> None:
    pipe = CASE.make()
    with enabled(pipe, None, STEPS):
        assert not pipe.transformer.is_cache_enabled


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("fbcache", "the cache 'fbcache' is not known; valid are first-block, taylorseer, pab, mag"),
        ("first-block:0", "give a number above 0"),
        ("first-block:nan", "give a number above 0"),
        ("taylorseer:1", "give a whole number of at least 2"),
        ("pab:2.5", "give a whole number of at least 2"),
        ("mag", "the cache mag needs a value, mag:VALUE; it is the JSON file"),
        ("mag:missing.json", "the ratios for the cache mag in missing.json cannot be read"),
    ],
)
def test_caches_that_there_are_not(text: str, says: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(says)):
        Cache.parse(text)
    assert str(Cache.parse("first-block")) == "first-block:0.08"
