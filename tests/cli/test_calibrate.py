"""``vidaccel calibrate``, ``solve`` and ``check`` on a tiny pipeline."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from vidaccel.calibration.cost import Costs
from vidaccel.configs.artifact import load_plan

pytestmark = pytest.mark.full

CANDIDATES = """
name: few
summary: for tests
tile: [2, 2, 2]
compensations: [none, pooled_tail]
precisions: [native]
patterns:
  - {name: sliding_tile, window: [1, 1, 1]}
  - {name: sliding_tile, window: [1, 1.0, 1.0]}
  - {name: pooled_top_k, density: 0.4}
"""

Run = Callable[..., Any]


@pytest.fixture
def candidates(tmp_path: Path) -> Path:
    path = tmp_path / "few.yaml"
    path.write_text(CANDIDATES)
    return path


@pytest.fixture
def common(tiny_model: Path, small: tuple[str, ...], candidates: Path) -> tuple[Any, ...]:
    efforts = ("--bins", 2, "--probes", 2, "--whole-probes", 2, "--tiles", 4)
    return ("-m", tiny_model, *small, "--candidates", candidates, *efforts)


def test_from_prompts_to_plan_page_and_other_plans(
    vidaccel: Run, common: tuple[Any, ...], tiny_model: Path, small: tuple[str, ...], tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setattr("vidaccel.calibration.calibrate.cost_cache", lambda: tmp_path / "costs")
    plan, page, figures = tmp_path / "plan.safetensors", tmp_path / "page.html", tmp_path / "figures.json"
    prompts = ("--prompt", "a red ball", "--prompt", "a blue cat")
    files = ("-o", plan, "--html", page, "--json", figures)
    result = vidaccel("calibrate", *common, *prompts, "--density", 0.6, "--validate", 1, "--check-heads", 3, *files)
    assert "no plan can be faster than" in result.stderr
    made = json.loads(figures.read_text())
    calibration = made["calibration"]
    assert calibration["predicted"]["density"] <= 0.6
    assert calibration["measured"]["density"] == pytest.approx(calibration["predicted"]["density"], abs=0.05)
    assert len(calibration["prediction"]) == 3 and len(made["prompts"]) == 1 and made["prompts"][0]["seed"] == 1000
    assert "data:video/mp4;base64," in page.read_text()
    assert dict(load_plan(plan).provenance)["budget"] == "--density 0.6"
    assert b"a red ball" not in plan.read_bytes()  # of which a copy may go to anyone

    # both predictions stand beside what was measured, and the later one is used from now on
    before, after = calibration["predicted"]["error"], calibration["after_validation"]["error"]
    assert calibration["measured"]["error"] == pytest.approx(made["prompts"][0]["latent_error"])
    assert before > 0 and after > 0 and before != after
    assert calibration["after_validation"]["transfer"]["prompts"] == calibration["transfer"]["prompts"] + 1
    assert "the same, prediction fitted to these runs too" in page.read_text()

    # others from the same observations, without the model
    observations = plan.with_suffix(".observations.safetensors")
    errors = []
    for density in (0.45, 0.55, 0.65, 0.8, 1.0):
        other = tmp_path / f"{density}.safetensors"
        told = tmp_path / f"{density}.json"
        vidaccel("solve", observations, "--density", density, "-o", other, "--json", told)
        assert load_plan(other).name == str(density)
        errors.append(json.loads(told.read_text())["predicted"]["error"])
    assert errors == sorted(errors, reverse=True) and errors[-1] == 0
    assert "predicted error by cost, along the front" in vidaccel("solve", observations).output

    # for a GPU that is not here
    told = tmp_path / "h200.json"
    result = vidaccel("solve", observations, "--speedup", 1.2, "--gpu", "H200", "--json", told)
    assert "seconds of self-attention, predicted for H200" in result.output
    elsewhere = json.loads(told.read_text())
    assert elsewhere["costs"]["origin"] == "predicted"
    assert elsewhere["predicted"]["seconds"] <= elsewhere["dense"]["seconds"] / 1.2
    assert any("no seconds were measured" in note for note in elsewhere["notes"])

    # and checked at another size, where the fingerprint's grid does not fit but the windows carry
    larger = [option.replace("--width=64", "--width=96") for option in small]
    told = tmp_path / "check.json"
    result = vidaccel("check", plan, "-m", tiny_model, *larger, "--prompt", "a red ball", "--json", told)
    assert "heads have drifted" in result.output
    found = json.loads(told.read_text())
    assert found["then"] is not None and found["now"] > 0 and found["heads"]
    assert f"rank correlation of the errors of heads then and now: {found['rank_correlation']:.3f}" in result.output


def test_a_speed_that_no_plan_can_reach_is_refused_before_observing(
    vidaccel: Run, common: tuple[Any, ...], tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setattr("vidaccel.calibration.calibrate.cost_cache", lambda: tmp_path / "costs")
    plan = tmp_path / "p.safetensors"
    result = vidaccel("calibrate", *common, "-o", plan, "--prompt", "a", "--speedup", 50, code=2)
    assert "asks for more than can be won at this size" in result.stderr and not plan.exists()


def test_what_is_refused(refused: Callable[..., str], common: tuple[Any, ...], tmp_path: Path) -> None:
    out = ("-o", tmp_path / "p.safetensors", "--prompt", "a")
    assert "no budget is given; give one of --speedup, --seconds" in refused("calibrate", *common, *out)
    both = ("--density", 0.5, "--speedup", 2)
    assert "several budgets are given" in refused("calibrate", *common, *out, *both)
    name = refused("calibrate", *common, "-o", tmp_path / "p.yaml", "--prompt", "a", "--density", 0.5)
    assert "does not end in .safetensors" in name
    assert "there are no prompts" in refused("calibrate", *common, "-o", tmp_path / "p.safetensors", "--density", 0.5)
    assert "there is no observations file" in refused("solve", tmp_path / "none.safetensors", "--density", 0.5)
    damaged = tmp_path / "damaged.safetensors"
    damaged.write_bytes(b"nothing")
    assert "truncated" in refused("solve", damaged, "--density", 0.5)
    told = refused("calibrate", *common, *out, "--density", 0.5, "--state", damaged)
    assert "truncated" in told and damaged.read_bytes() == b"nothing"
    same = refused("solve", damaged, "--density", 0.5, "-o", damaged)
    assert "is the observations themselves" in same and damaged.read_bytes() == b"nothing"
    assert "--validate is 0" in refused("calibrate", *common, *out, "--psnr", 30, "--validate", 0)
    assert not (tmp_path / "p.safetensors").exists()
    assert "is dense everywhere" in refused("check", "dense", *common[:7], "--prompt", "a")


def test_for_a_gpu_that_is_not_here(
    vidaccel: Run, refused: Callable[..., str], common: tuple[Any, ...], tmp_path: Path
) -> None:
    plan, figures = tmp_path / "plan.safetensors", tmp_path / "figures.json"
    asked = ("calibrate", *common, "--prompt", "a red ball", "--speedup", 1.1, "-o", plan)
    vidaccel(*asked, "--target-gpu", "H200", "--validate", 1, "--json", figures)
    made = json.loads(figures.read_text())["calibration"]
    assert made["costs"] == {
        "device": "H200 SXM", "origin": "predicted", "seconds": "seconds of self-attention, predicted for H200 SXM"
    }  # fmt: skip
    # the validation ran here, so its seconds are no measurement of that prediction
    assert "seconds" not in made["measured"] and made["measured"]["error"] >= 0
    assert dict(load_plan(plan).provenance)["costs"] == "predicted on H200 SXM"
    assert "nothing is known about a GPU" in refused(*asked, "--target-gpu", "abacus")


def test_minutes_bound_everything(vidaccel: Run, common: tuple[Any, ...], tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("vidaccel.calibration.calibrate.cost_cache", lambda: tmp_path / "costs")
    monkeypatch.setattr("vidaccel.calibration.calibrate.Calibrator.left", lambda self: 0.0)
    plan, figures = tmp_path / "plan.safetensors", tmp_path / "figures.json"
    asked = ("--prompt", "a red ball", "--density", 0.6, "--check-heads", 2, "--max-minutes", 60)
    vidaccel("calibrate", *common, *asked, "-o", plan, "--json", figures)
    made = json.loads(figures.read_text())
    assert "prompts" not in made and "prediction" not in made["calibration"] and load_plan(plan).rules
    notes = " ".join(made["calibration"]["notes"])
    assert "the time was up before validation" in notes and "after 0 of 2 single heads" in notes


def test_step_caches_are_chosen_with_the_plan(
    vidaccel: Run, refused: Callable[..., str], common: tuple[Any, ...], tmp_path: Path, monkeypatch: Any
) -> None:
    made_up = Costs("test", "measured", 1e-3, {})

    def costs(candidates: Any, *_: Any, **__: Any) -> Costs:
        return replace(made_up, table={p: 1e-4 * (2 + i) for i, p in enumerate(candidates) if not p.is_dense})

    monkeypatch.setattr("vidaccel.calibration.calibrate.measure_costs", costs)
    common = tuple("--num-inference-steps=6" if str(o).startswith("--num-inf") else o for o in common)
    plan, page, figures = tmp_path / "plan.safetensors", tmp_path / "page.html", tmp_path / "figures.json"
    asked = ("calibrate", *common, "--prompt", "a red ball", "--bins", 1, "--probes", 1, "--whole-probes", 0)
    asked += ("--density", 0.5, "--validate", 1, "-o", plan)
    assert "the cache 'tea:3' is not known" in refused(*asked, "--caches", "none,tea:3")
    caches = ("--caches", "none, taylorseer:2, first-block:0.5")
    vidaccel(*asked, *caches, "--json", figures, "--html", page)
    made = json.loads(figures.read_text())["calibration"]
    found = made["caches"]
    assert [one["cache"] for one in found["alone"]] == ["taylorseer:2", "first-block:0.5"]
    assert all(0 < one["calls"] < 1 and one["error"] > 0 and one["prompts"] == 1 for one in found["alone"])
    assert len(found["pairs"]) == 3 and all(one["measured"] for one in found["pairs"])
    # with a cache, fewer token pairs are dropped for the same budget
    for one in found["pairs"]:
        assert one["predicted"]["density"] <= 0.5 + 1e-6
        assert one["measured"]["density"] == pytest.approx(one["predicted"]["density"], rel=0.25)
    (chosen,) = [one for one in found["pairs"] if one["chosen"]]
    within = [one for one in found["pairs"] if one["measured"]["density"] <= 0.5 * 1.02]
    if within:
        assert chosen["measured"]["error"] == min(one["measured"]["error"] for one in within)
    assert made["predicted"] == chosen["predicted"] and made["measured"]["error"] == chosen["measured"]["error"]
    saved = load_plan(plan)
    assert (saved.cache or "none") == chosen["cache"] and dict(saved.provenance)["budget"] == "--density 0.5"
    assert "Step caches, each with its best plan" in page.read_text() and "taylorseer:2" in page.read_text()

    # again from the observations alone, and with none of them as without the option
    observations, other, told = plan.with_suffix(".observations.safetensors"), tmp_path / "o.safetensors", figures
    result = vidaccel("solve", observations, "--density", 0.3, "--caches", "auto", "-o", other, "--json", told)
    assert "taylorseer:2" in result.output
    pairs = json.loads(told.read_text())["caches"]["pairs"]
    assert load_plan(other).cache == (None if pairs[0]["cache"] == "none" else pairs[0]["cache"])
    assert [one["predicted"]["error"] for one in pairs] == sorted(one["predicted"]["error"] for one in pairs)
    vidaccel("solve", observations, "--density", 0.3, "--caches", "none", "-o", other)
    with_none = load_plan(other)
    vidaccel("solve", observations, "--density", 0.3, "-o", other)
    assert with_none.rules == load_plan(other).rules and with_none.cache is None
    assert "was not measured" in refused("solve", observations, "--density", 0.3, "--caches", "pab")
    assert "no budget is given" in refused("solve", observations, "--caches", "auto")
