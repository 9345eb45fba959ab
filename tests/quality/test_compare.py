"""Pairs: same seed, honest order, controls that mean something, and a pipeline left unpatched."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from tests.tiny_wan import tiny_wan
from vidaccel import quality
from vidaccel.configs.pattern_spec import PatternSpec
from vidaccel.configs.plan import HeadPolicy, LayerPolicy, Plan, Rule
from vidaccel.errors import ConfigError, PlanMismatchError
from vidaccel.files import write_json
from vidaccel.pipelines.generate import Request, generate
from vidaccel.pipelines.patch import session_of
from vidaccel.types import TileShape

SMALL = {"height": 32, "width": 32, "num_frames": 9, "num_inference_steps": 2, "max_sequence_length": 16}
NARROW = HeadPolicy(PatternSpec.make("neighborhood", window=(1, 1, 1)))
PLAN = Plan("narrow", (Rule(LayerPolicy((NARROW,))),), tile=TileShape(1, 1, 2))


@pytest.fixture(scope="module")
def pipe() -> Any:
    return tiny_wan()


@pytest.fixture(scope="module")
def pair(pipe: Any) -> quality.Pair:
    return quality.measure_pair(pipe, PLAN, Request("a red cat", 1, SMALL))


def test_both_runs_start_from_the_same_noise(pipe: Any, pair: quality.Pair) -> None:
    assert np.array_equal(pair.dense.frames, generate(pipe, Request("a red cat", 1, SMALL)).frames)
    assert pair.planned.settings["seed"] == pair.dense.settings["seed"] == 1


def test_figures_are_those_of_the_videos(pair: quality.Pair) -> None:
    assert not np.array_equal(pair.dense.frames, pair.planned.frames), "a plan this narrow must change the video"
    assert pair.psnr == quality.psnr(pair.planned.frames, pair.dense.frames) < math.inf
    assert pair.ssim == quality.ssim(pair.planned.frames, pair.dense.frames) < 1
    assert pair.quality["flicker"] == quality.flicker(pair.planned.frames, pair.dense.frames) > 0
    assert pair.quality["latent_error"] == quality.latent_error(pair.planned.latents, pair.dense.latents) > 0
    assert pair.speedup == pair.dense.seconds["total"] / pair.planned.seconds["total"]
    assert 0 < pair.report.density < 1 and pair.report.sparse_calls == pair.report.calls == 8


def test_controls_give_the_scale(pair: quality.Pair) -> None:
    """On the CPU the same run twice is the same run, through the patched code too; one step fewer is not."""
    assert pair.controls[quality.DENSE_AGAIN]["psnr"] == math.inf
    assert 0 < pair.controls[quality.ONE_STEP_FEWER]["psnr"] < math.inf
    for control in quality.CONTROLS:
        assert set(pair.controls[control]) == set(quality.FIGURES)
    assert 0 < pair.dense_attention < pair.dense.seconds["total"]


def test_the_pipeline_is_left_unpatched_even_by_failures(pipe: Any) -> None:
    from vidaccel.configs.fingerprint import Fingerprint

    assert session_of(pipe) is None
    other = Plan("other", PLAN.rules, fingerprint=Fingerprint(heads=40))
    with pytest.raises(PlanMismatchError):
        quality.measure_pair(pipe, other, Request("a cat", 0, SMALL))
    with pytest.raises(ConfigError):
        quality.measure_pair(pipe, PLAN, Request("a cat", 0, {**SMALL, "height": 33}))
    assert session_of(pipe) is None


def test_the_two_runs_change_places(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    order = []

    def watched(pipe: Any, request: Request) -> Any:
        order.append("plan" if session_of(pipe) is not None else "dense")
        return generate(pipe, request)

    monkeypatch.setattr("vidaccel.quality.compare.generate", watched)
    requests = [Request(prompt, 0, SMALL) for prompt in ("a cat", "a ball")]
    pairs = list(quality.measure_pairs(pipe, PLAN, requests, controls=0, repeats=2))
    assert order == ["dense", "plan", "plan", "dense", "plan", "dense", "dense", "plan"]
    assert [pair.request.prompt for pair in pairs] == ["a cat", "a ball"]
    assert pairs[0].controls == {}, "the first prompt has none before it"
    another = pairs[1].controls[quality.ANOTHER_PROMPT]
    assert another["psnr"] == quality.psnr(pairs[0].dense.frames, pairs[1].dense.frames)


def test_the_fastest_repeat_counts(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = iter([5.0, 4.0, 3.0, 2.0])

    def timed(pipe: Any, request: Request) -> Any:
        made = generate(pipe, request)
        return replace(made, seconds={**made.seconds, "total": next(seconds)})

    monkeypatch.setattr("vidaccel.quality.compare.generate", timed)
    pair = quality.measure_pair(pipe, PLAN, Request("a cat", 0, SMALL), repeats=2, controls=())
    assert (pair.dense.seconds["total"], pair.planned.seconds["total"]) == (2.0, 3.0)  # dense, plan, plan, dense
    assert pair.dense_runs == [5.0, 2.0]


def test_the_warm_up_is_short(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = []

    def watched(pipe: Any, request: Request) -> Any:
        steps.append(request.arguments["num_inference_steps"])
        return generate(pipe, request)

    monkeypatch.setattr("vidaccel.quality.compare.generate", watched)
    quality.warm_up(pipe, PLAN, Request("a cat", 0, {**SMALL, "num_inference_steps": 30}))
    assert steps == [2, 2]


def test_the_summary_is_plain_and_means_what_it_says(pair: quality.Pair, tmp_path: Any) -> None:
    rows = [pair.to_dict(), {**pair.to_dict(), "psnr": pair.psnr + 2}]
    result = quality.summarise("narrow", pair.dense.settings, rows)
    write_json(tmp_path / "figures.json", result)
    read = json.loads((tmp_path / "figures.json").read_text())
    assert read["plan"] == "narrow" and len(read["prompts"]) == 2
    assert "prompt" not in read["settings"] and read["settings"]["arguments"] == SMALL
    assert read["summary"]["psnr"]["mean"] == pytest.approx(pair.psnr + 1)
    assert read["summary"]["psnr"]["count"] == 2
    assert read["summary"]["controls"][quality.DENSE_AGAIN]["psnr"]["infinite"] == 2
    assert read["summary"]["seconds"]["dense"]["attention"]["mean"] == pytest.approx(pair.dense_attention)
    assert read["summary"]["latent_error"]["count"] == 2 and read["summary"]["lpips"]["count"] == 0
    assert read["coverage"]["sparse_calls"] == 16 and len(read["coverage"]["layers"]) == 2
    layer = read["coverage"]["layers"][0]
    assert layer["calls"] == 2 * pair.report.layers[0]["calls"]
    assert layer["density"] == pytest.approx(pair.report.layers[0]["density"])
    assert read["verdict"]["overall"] in quality.BANDS
    with pytest.raises(ConfigError, match="add prompts"):
        quality.summarise("narrow", {}, [])
