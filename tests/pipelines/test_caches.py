"""diffusers' own caches together with a plan: skipped blocks and steps confuse neither clock nor statistics."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch

import vidaccel
from tests.zoo.wan import CASES
from vidaccel import HeadPolicy, LayerPolicy, PatternSpec, Plan, Rule, TileShape
from vidaccel.engine.runs import DenoisingRun
from vidaccel.errors import ConfigError
from vidaccel.pipelines.caches import AUTO, Cache, _timestep, enabled, read_cache, without

pytestmark = pytest.mark.full

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
    observe = DenoisingRun.observe
    monkeypatch.setattr(DenoisingRun, "observe", lambda *a, **k: moments.append(observe(*a, **k)) or moments[-1])
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


@pytest.mark.parametrize("text", ["first-block:0.5", "taylorseer:3", "pab", "faster", "sea:2", "mag"])
def test_a_cache_by_one_word(text: str, tmp_path: Path) -> None:
    if text == "mag":
        (tmp_path / "ratios.json").write_text(json.dumps([1.0] * STEPS))
        text = f"mag:{tmp_path / 'ratios.json'}"
    if text.startswith("sea") and not hasattr(diffusers, "SeaCacheConfig"):
        pytest.skip("this diffusers has no SeaCache")
    cache = read_cache(text)
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


def outputs(pipe: Any, cache: Cache | None) -> tuple[list[float], dict[str, list[list[torch.Tensor]]]]:
    """Timesteps of the steps, and outputs of every attention by layer, guidance pass and step."""
    found: dict[str, list[list[torch.Tensor]]] = {"cond": [], "uncond": []}

    def note(module: Any, inputs: Any, output: torch.Tensor) -> None:
        calls.append(output.clone())

    calls: list[torch.Tensor] = []
    layers = [block.attn1 for block in pipe.transformer.blocks]
    hooks = [layer.register_forward_hook(note) for layer in layers]
    with enabled(pipe, cache, STEPS):
        run(pipe)
    for hook in hooks:
        hook.remove()
    for number in range(0, len(calls), len(layers)):
        found["uncond" if number // len(layers) % 2 else "cond"].append(calls[number : number + len(layers)])
    return [float(t) for t in pipe.scheduler.timesteps], found


@pytest.mark.parametrize("text", ["pab:2", "pab:3", "faster:2", "faster:3"])
def test_each_pass_of_guidance_finds_its_own_outputs(text: str) -> None:
    """With one state a layer, diffusers' PAB gave the unconditional pass what the conditional one had computed."""
    pipe = CASE.make()
    cache = Cache.parse(text)
    steps, found = outputs(pipe, cache)
    every = int(cache.value)
    low, high = (100, 800) if cache.name == "pab" else (-1, 681)
    reused = 0
    for branch in ("cond", "uncond"):
        for step, timestep in enumerate(steps):
            inside = low < int(timestep) < high
            computed = not inside or step % every == 0 or (cache.name == "faster" and step < 2)
            for layer, output in enumerate(found[branch][step]):
                if computed:
                    assert not torch.equal(output, found[branch][step - 1][layer])
                    continue
                last = found[branch][step - 1][layer]
                expected = last
                if cache.name == "faster":
                    expected = last + 0.5 * (last - found[branch][step - 2][layer])
                assert torch.equal(output, expected)
                reused += 1
    assert reused > 0
    # the passes have different prompts
    assert not torch.equal(found["cond"][-1][1], found["uncond"][-1][1])


@pytest.mark.parametrize("text", ["first-block:0.5", "pab:2"])
def test_the_cache_of_a_plan(text: str) -> None:
    """Patching enables it and unpatching disables it; nothing else of the pipeline is touched."""
    pipe = CASE.make()
    plain = run(pipe)
    with enabled(pipe, Cache.parse(text), STEPS):
        session = vidaccel.patch(pipe, SPARSE)
        expected = run(pipe)
        session.close()
    session = vidaccel.patch(pipe, replace(SPARSE, cache=text))
    assert pipe.transformer.is_cache_enabled and torch.equal(run(pipe), expected)
    assert any(f"step cache {text} is on" in event for event in session.report().events)
    vidaccel.unpatch(pipe)
    assert not pipe.transformer.is_cache_enabled and torch.equal(run(pipe), plain)
    hooks = [m._diffusers_hook for m in pipe.transformer.modules() if hasattr(m, "_diffusers_hook")]
    assert not any(registry.hooks for registry in hooks)


def test_a_plan_whose_cache_cannot_be_enabled_leaves_nothing_behind() -> None:
    pipe = CASE.make()
    pipe.transformer.enable_cache(CACHES["first-block"](pipe))
    with pytest.raises(ConfigError, match=r"transformer has a cache already; call transformer.disable_cache\(\) first"):
        vidaccel.patch(pipe, replace(SPARSE, cache="pab:2"))
    pipe.transformer.disable_cache()
    vidaccel.patch(pipe, SPARSE).close()
    with pytest.raises(ConfigError, match="patch the pipeline, not WanTransformer3DModel"):
        vidaccel.patch(pipe.transformer, replace(SPARSE, cache="pab:2"))
    with pytest.raises(ConfigError, match="skips blocks of a whole model"):
        vidaccel.Attention(replace(SPARSE, cache="pab:2"))
    session = vidaccel.patch(pipe.transformer, replace(SPARSE, cache="first-block:0.5"))
    assert pipe.transformer.is_cache_enabled
    session.close()


def test_pipelines_that_do_not_name_their_passes() -> None:
    """Their caches would mix the outputs of both passes of guidance, or end in the middle of a run."""
    silent = next(case for case in CASES if case.pipeline.startswith("WanVideoToVideo")).make()
    with (
        pytest.raises(ConfigError, match="does not tell caches which pass of guidance is running"),
        enabled(silent, Cache.parse("first-block"), STEPS),
    ):
        pass
    assert set(without(silent, AUTO, STEPS)) == set(AUTO) and set(without(CASE.make(), AUTO, STEPS)) <= {"sea:0.25"}


def test_a_timestep_for_each_frame_counts_as_the_noisiest() -> None:
    pipe = next(case for case in CASES if case.pipeline.startswith("SkyReelsV2DiffusionForcingPipeline")).make()
    for kept, expected in ((torch.tensor([300, 900, 500]), 900), (torch.tensor(7), 7), (12.5, 12), (None, 0)):
        pipe._current_timestep = kept
        assert _timestep(pipe) == expected


def test_no_cache_is_no_cache() -> None:
    pipe = CASE.make()
    with enabled(pipe, None, STEPS):
        assert not pipe.transformer.is_cache_enabled


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("fbcache", "the cache 'fbcache' is not known; valid are first-block, taylorseer, pab, faster, sea, mag"),
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
        read_cache(text)
    assert read_cache("none") is None
    assert str(Cache.parse("first-block")) == "first-block:0.08"
