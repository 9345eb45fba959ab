"""Step caches chosen together with plans: the choice on made-up figures, and the measuring on a tiny pipeline."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.tiny_wan import tiny_wan
from vidaccel.calibration import cache_measure
from vidaccel.calibration.cache_measure import caches_for, measure_caches, measured_figures, stored_figures
from vidaccel.calibration.cache_runs import NO_CACHE, CacheFigures, CacheRun, figures_of
from vidaccel.calibration.caching import Pair, Pairing, best_pairs, choose, told
from vidaccel.calibration.cells import Cell, Place
from vidaccel.calibration.cost import Costs
from vidaccel.calibration.observations import Observations
from vidaccel.calibration.plans import Choices, Prediction
from vidaccel.configs.fingerprint import Fingerprint
from vidaccel.configs.pattern_spec import PatternSpec
from vidaccel.configs.plan import HeadPolicy
from vidaccel.errors import ConfigError, PlanFileError
from vidaccel.pipelines.generate import Request, generate
from vidaccel.quality import latent_error, psnr

CACHES = (
    NO_CACHE,
    CacheFigures("first-block:0.1", error=0.1, seconds=0.8, calls=0.75, psnr=30.0, prompts=2),
    CacheFigures("taylorseer:3", error=0.4, seconds=0.5, calls=0.4, psnr=20.0, prompts=2),
)
KINDS = {"speedup": (1.0, 2.4), "seconds": (4.0, 10.0), "density": (0.1, 1.0), "max-error": (0.0, 1.0)}


def made_up(by: str = "seconds") -> Choices:
    """Two layers of two heads, 10 s of which attention takes 6; candidates of four densities."""
    kept = np.array([1.0, 0.6, 0.3, 0.1])
    heads = np.array([1.0, 3.0])
    error = ((1 - kept) ** 2)[:, None] * heads
    policies = (HeadPolicy(), *(HeadPolicy(PatternSpec.make("pooled_top_k", density=float(d))) for d in kept[1:]))
    seen = Observations(
        candidates=policies,
        tile=None,
        fingerprint=Fingerprint(),
        edges=(0.0, 0.5, 1.0),
        steps=(2, 2),
        settings={},
    )
    for bin in (0, 1):
        for layer in (0, 1):
            figures = {name: np.ones((4, 2), np.float32) for name in ("cosine", "mass")}
            figures["error"] = (error * (1 + layer)).astype(np.float32)
            figures["density"] = np.tile(kept[:, None], 2).astype(np.float32)
            figures["spread"] = np.zeros((4, 2), np.float32)
            cell = Cell(prompts=1, energy=np.ones(2, np.float32), **figures)
            seen.cells[Place(bin, "transformer", layer, "cond")] = cell
            seen.weight[(bin, "transformer", layer)] = 0.01 * (1 + bin)
    seen.times = {"total": 10.0, "attention": 6.0}
    seen.done = ["one"]
    seconds = dict(zip(policies[1:], kept[1:], strict=True))
    return Choices(seen, Costs("test", "measured", 1.0, {p: float(d) for p, d in seconds.items()}), by=by)  # type: ignore[arg-type]


def fraction(kind: str, share: float) -> float:
    low, high = KINDS[kind]
    return low + share * (high - low)


def choices_of(kind: str) -> Choices:
    return made_up("density" if kind == "density" else "seconds")


@pytest.mark.parametrize("kind", KINDS)
def test_without_a_cache_the_choice_is_that_of_the_plan_alone(kind: str) -> None:
    choices, value = choices_of(kind), fraction(kind, 0.6)
    alone = {
        "speedup": choices.for_speedup,
        "seconds": choices.for_seconds,
        "density": choices.at,
        "max-error": choices.for_error,
    }[kind](value)
    (pair,), reasons = best_pairs(choices, [NO_CACHE], kind, value)
    assert not reasons and pair.predicted == choices.predict(alone)
    assert pair.pairing.plan(pair.solution, "plan", {}) == choices.plan(alone, "plan", {})
    assert pair.pairing.dense_seconds == choices.dense_seconds


@settings(max_examples=30)
@given(kind=st.sampled_from(sorted(KINDS)), first=st.floats(0, 1), second=st.floats(0, 1))
def test_more_budget_is_never_worse_and_every_pair_is_within(kind: str, first: float, second: float) -> None:
    choices = _MADE[kind]
    ranks = []
    for share in sorted((first, second), reverse=kind == "speedup"):
        value = fraction(kind, share)
        try:
            pairs, _ = best_pairs(choices, CACHES, kind, value)
        except ConfigError:
            ranks.append(math.inf)
            continue
        for pair in pairs:
            found = pair.predicted
            assert found.total is not None
            spent = {
                "speedup": value * found.total / choices.dense_seconds,
                "seconds": found.total / value,
                "density": found.density / value,
                "max-error": found.error / max(value, 1e-12),
            }[kind]
            assert spent <= 1 + 1e-6
        best = pairs[0].predicted
        assert best.total is not None
        ranks.append(best.total if kind == "max-error" else best.error)
    assert ranks[1] <= ranks[0] + 1e-9


_MADE = {kind: choices_of(kind) for kind in KINDS}


def test_cache_and_plan_add_up() -> None:
    choices = made_up()
    pairing = Pairing(choices, CACHES[1])
    solution = choices.for_seconds(7.0)
    alone, both = choices.predict(solution), pairing.predict(solution)
    assert alone.attention is not None
    assert both.error == pytest.approx(math.sqrt(alone.error**2 + 0.1**2))
    assert both.density == pytest.approx(0.75 * alone.density)
    assert both.total == pytest.approx(8.0 - 0.75 * 6.0 + 0.75 * alone.attention)
    assert pairing.dense_seconds == pytest.approx(8.0)
    plan = pairing.plan(solution, "plan", {"budget": "--seconds 7"})
    assert plan.cache == "first-block:0.1" and "error 0.1" in dict(plan.provenance)["cache_alone"]
    assert replace(plan, cache=None).rules == choices.plan(solution, "plan", {}).rules


def test_a_cache_is_taken_where_it_pays() -> None:
    choices = made_up()
    pairs, _ = best_pairs(choices, CACHES, "speedup", 1.2)
    assert pairs[0].pairing.figures.name in ("none", "first-block:0.1")
    errors = [pair.predicted.error for pair in pairs]
    assert errors == sorted(errors) and len(pairs) == 3
    # attention is 6 of 10 seconds, so no plan alone is three times as fast
    pairs, reasons = best_pairs(choices, CACHES, "speedup", 3.0)
    assert [pair.pairing.figures.name for pair in pairs] == ["taylorseer:3"]
    assert "the fastest takes" in reasons["none"]
    # and no cache has less error than it has by itself
    pairs, reasons = best_pairs(choices, CACHES, "max-error", 0.05)
    assert [pair.pairing.figures.name for pair in pairs] == ["none"]
    assert reasons["taylorseer:3"] == "its error alone is 0.4, more than 0.05"
    with pytest.raises(ConfigError, match="no plan keeps the budget: none: no plan takes"):
        best_pairs(choices, CACHES, "speedup", 50.0)


def pair(name: int, **measured: float) -> Pair:
    choices = made_up()
    return Pair(Pairing(choices, CACHES[name]), choices.at(3.0), Prediction(0.2, 0.5, 1.0, 5.0), measured or None)


def test_measurements_choose() -> None:
    a, b, c = pair(0, error=0.3, speedup=2.0), pair(1, error=0.1, speedup=1.5), pair(2, error=0.2, speedup=2.1)
    assert choose([a, b, c], "speedup", 1.9) == (c, None), "the least error of those that are fast enough"
    assert choose([a, b, c], "speedup", 1.4) == (b, None)
    found, note = choose([a, b], "speedup", 4.0)
    assert found is a and note is not None and "100% over" in note
    assert choose([pair(0)], "speedup", 2.0)[1] is not None, "nothing was run"
    cheap, dear = pair(1, error=0.2, seconds=3.0, density=0.3), pair(0, error=0.1, seconds=4.0, density=0.4)
    assert choose([dear, cheap], "max-error", 0.2) == (cheap, None)
    assert choose([dear, cheap], "max-error", 0.15) == (dear, None)
    assert choose([dear, cheap], "density", 0.5) == (dear, None)
    # the seconds of a device that is not here were not measured
    assert choose([pair(0, error=0.3), pair(1, error=0.2)], "seconds", 1.0)[0].pairing.figures.name == "first-block:0.1"

    about = told(CACHES, [a, b], b, {"pab:2": "why"})
    assert [one["cache"] for one in about["alone"]] == ["first-block:0.1", "taylorseer:3"]
    assert [(one["cache"], one["chosen"]) for one in about["pairs"]] == [("none", False), ("first-block:0.1", True)]
    assert about["measured_over_predicted"] == pytest.approx(0.1 / 0.2)


def test_means_over_prompts() -> None:
    runs = [
        CacheRun("pab:2", "a", error=0.3, seconds=0.8, calls=0.5, psnr=30.0),
        CacheRun("pab:2", "b", error=0.4, seconds=0.6, calls=0.7, psnr=None),
        CacheRun("pab:3", "a", error=9.0, seconds=9.0, calls=0.1, psnr=9.0),
    ]
    found = figures_of(runs, "pab:2")
    assert found.error == pytest.approx(math.sqrt((0.09 + 0.16) / 2)) and found.psnr == 30.0
    assert (found.seconds, found.calls, found.prompts) == (pytest.approx(0.7), pytest.approx(0.6), 2)
    assert figures_of(runs, "none") == NO_CACHE
    for run in runs:
        assert CacheRun.from_dict(run.to_dict()) == run


@pytest.mark.parametrize(
    "change",
    [
        {"error": -1.0},
        {"error": math.nan},
        {"seconds": None},
        {"calls": "many"},
        {"cache": "none"},
        {"cache": "mag:/etc/passwd"},
        {"prompt": 3},
        {"more": 1},
    ],
)
def test_hostile_files(change: dict[str, Any]) -> None:
    data = {**CacheRun("pab:2", "a", 0.1, 0.9, 0.5, 30.0).to_dict(), **change}
    with pytest.raises((PlanFileError, ConfigError)):
        CacheRun.from_dict(data)


SMALL = {"height": 48, "width": 64, "num_frames": 17, "num_inference_steps": 6, "max_sequence_length": 16}


def test_caches_are_measured_once_and_kept(tmp_path: Path) -> None:
    pipe, seen = tiny_wan(), made_up().seen
    requests = [Request(text, seed, SMALL) for seed, text in enumerate(("a red ball", "a blue cat"))]
    names, reasons = caches_for(pipe, " none, taylorseer:3,first-block:0.5,none")
    assert names == ("none", "taylorseer:3", "first-block:0.5") and not reasons
    left = [4]

    def time_for(generations: int) -> bool:
        left[0] -= 1
        return left[0] > 0

    path, saved = tmp_path / "o.safetensors", []

    def save() -> None:
        seen.save(path)
        saved.append(len(seen.caches))

    notes = measure_caches(pipe, seen, requests, names, save=save, time_for=time_for)
    assert notes == ["the time was up after 3 of 4 runs of step caches"] and saved == [1, 2, 3]
    again = Observations.load(path)
    assert again.caches == seen.caches
    told_of: list[int] = []
    assert not measure_caches(pipe, again, requests, names, tell=lambda stage, done, total: told_of.append(done))
    assert [(run.cache, run.prompt) for run in again.caches] == [
        (cache, request.fingerprint) for request in requests for cache in names[1:]
    ]
    assert told_of == [2, 3, 4], "what was there is not run again"
    assert all(0 < run.calls < 1 and run.error > 0 and run.seconds > 0 for run in again.caches)
    assert not pipe.transformer.is_cache_enabled

    # the figures are those of the quality module
    dense = generate(pipe, requests[0])
    pipe.transformer.enable_cache(_taylor())
    cached = generate(pipe, requests[0])
    assert dense.latents is not None and cached.latents is not None
    assert again.caches[0].error == pytest.approx(latent_error(cached.latents, dense.latents))
    assert again.caches[0].psnr == pytest.approx(psnr(cached.frames, dense.frames))

    assert [one.name for one in stored_figures(again, "auto")] == list(names)
    assert [one.name for one in stored_figures(again, "first-block:0.5")] == ["first-block:0.5"]
    with pytest.raises(ConfigError, match="the step cache pab:2 was not measured; measured are taylorseer:3"):
        stored_figures(again, "none,pab")
    with pytest.raises(ConfigError, match="no step cache was measured"):
        stored_figures(made_up().seen, "auto")
    figures, notes = measured_figures(again, ("none", "taylorseer:3", "pab:2"))
    assert [one.name for one in figures] == ["none", "taylorseer:3"] and "not chosen: step caches pab:2" in notes[0]
    with pytest.raises(ConfigError, match="no time to run any"):
        measured_figures(again, ("pab:2",))


def test_a_cache_that_fails_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """FirstBlockCache can be enabled on MotifVideo, and then fails in the first pass."""
    pipe, seen = tiny_wan(), made_up().seen
    monkeypatch.setattr(cache_measure, "generate", _failing(cache_measure.generate))
    notes = measure_caches(pipe, seen, [Request("a red ball", 0, SMALL)], ("none", "first-block:0.5", "taylorseer:3"))
    assert notes == ["the step cache first-block:0.5 failed on this model: RuntimeError: sizes differ"]
    assert [run.cache for run in seen.caches] == ["taylorseer:3"] and not pipe.transformer.is_cache_enabled
    figures, more = measured_figures(seen, ("none", "first-block:0.5", "taylorseer:3"))
    assert [one.name for one in figures] == ["none", "taylorseer:3"] and "first-block:0.5" in more[0]


def _failing(run: Any) -> Any:
    def fails(pipe: Any, request: Request) -> Any:
        if type(pipe.transformer._cache_config).__name__ == "FirstBlockCacheConfig":
            raise RuntimeError("sizes differ\nat length")
        return run(pipe, request)

    return fails


def _taylor() -> Any:
    from vidaccel.pipelines.caches import Cache, _config

    return _config(object, Cache.parse("taylorseer:3"), None)


def test_what_a_model_takes() -> None:
    pipe = tiny_wan()
    names, reasons = caches_for(pipe, "auto")
    assert names[0] == "none" and {name.split(":")[0] for name in names[1:]} >= {"first-block", "taylorseer", "pab"}
    assert not set(names) & set(reasons)
    with pytest.raises(ConfigError, match="not known"):
        caches_for(pipe, "none,fbcache")
    with pytest.raises(ConfigError, match="cannot hold the cache mag"):
        caches_for(pipe, "mag:ratios.json")
    with pytest.raises(ConfigError, match="give caches with commas between"):
        caches_for(pipe, "none,,pab")
